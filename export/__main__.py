"""`python -m rtp_llm.export …` and, in the clone's root, `python -m export …`: `rtp-llm export …`."""

import sys

if __package__ == "rtp_llm.export":
    from rtp_llm.cli import main
else:  # the clone's root is the package rtp_llm, whatever its folder is called
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != root]  # its files are no modules
    spec = spec_from_file_location("rtp_llm", root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None and spec.loader is not None
    sys.modules["rtp_llm"] = package = module_from_spec(spec)
    spec.loader.exec_module(package)
    from rtp_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
