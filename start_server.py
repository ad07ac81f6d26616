"""The HTTP server: `python3 -m rtp_llm.start_server`, told by environment names or flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .errors import MissingDependency, RtpLlmError


def serve(args: argparse.Namespace, quiet: bool = False) -> int:
    """Run the server that parsed flags and the environment describe; returns the exit code."""
    try:
        from .runtime.server import lifecycle
    except ModuleNotFoundError as e:
        raise MissingDependency(
            f'the server needs {e.name}: pip install fastapi prometheus_client "uvicorn<1"'
        ) from e
    from .runtime.server.settings import from_args

    return lifecycle.run(from_args(args), quiet)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; one line on stderr and exit code 2 for wrong use, 1 for a failure."""
    from .runtime.server.settings import add_arguments

    parser = argparse.ArgumentParser(
        prog="python3 -m rtp_llm.start_server",
        description="Serve a model over HTTP. Every flag is also an environment name; the flag wins.",
        epilog="example:\n  python3 -m rtp_llm.start_server --checkpoint_path demo-bundle --start_port 8088",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return serve(args)
    except RtpLlmError as e:
        print(f"start_server: {' '.join(str(e).split())}", file=sys.stderr)
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
