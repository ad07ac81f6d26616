"""Bundle → a model repository that Triton loads: the templates of `model_repository/`, filled in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from string import Template

from ... import trust
from ...errors import BundleError, InternalError, UserError
from ...export.bundle import Bundle, writing

TEMPLATES = Path(__file__).resolve().parents[2] / "model_repository"
LANGUAGE = ("vlm", "vlm_complete")
VISION = ("vision_preprocess", "vision_tower", "vision_encoder")
MAX_IMAGE_BATCH = 8  # pictures of one run of the encoder, where no engine sets a limit
FILES = {"tensorrt": "model.plan", "pytorch": "model.pt"}  # as the backend wants its file called


def models(vision: str) -> tuple[str, ...]:
    """Names of the models of a repository with that `vision`."""
    return {"separate": LANGUAGE + VISION, "only": VISION}.get(vision, LANGUAGE)


def platform(bundle: Bundle) -> str | None:
    """Triton's backend for the vision graph: "python" (ONNX Runtime on the CPU), "tensorrt", "pytorch"; None
    for a model without one."""
    if bundle.backend == "tensorrt":
        return "tensorrt"
    if "vision" not in bundle.graphs:
        return None
    return "pytorch" if bundle.backend == "torchscript" else "python"


def max_image_batch(bundle: Bundle) -> int:
    """Pictures of one run of the encoder."""
    engine = bundle.engines.get("vision")
    return engine.limits["max_images"] if engine else MAX_IMAGE_BATCH


def assemble(
    bundle: Bundle,
    output: Path,
    vision: str = "in-process",
    settings: Mapping[str, str] | None = None,
    vision_instances: int = 1,
    trusted: bool = False,
    copies: bool = True,
) -> Path:
    """Write the repository of a bundle to `output`, which it replaces in one stroke; returns it.

    vision: "in-process", "separate", "only" or "HOST:PORT". settings: names of runtime/server/settings.py
    to strings, as from the environment. trusted: plans and archives of other machines may be opened. copies:
    the repository shall hold them itself, and not point into the bundle.
    Raises BundleError, also for a plan or archive of the encoder that Triton must not open.
    """
    graph = ""
    own = vision in ("separate", "only")
    kind = platform(bundle)
    if own and kind is None:
        raise BundleError(f"{bundle.path} has no vision graph: leave --vision={vision} out")
    if own and kind == "tensorrt":
        if "vision" not in bundle.engines:
            raise BundleError(
                f"{bundle.path} has no engine of its vision graph yet: rtp-llm build {bundle.path}"
            )
        graph = bundle.engines["vision"].path
    elif own and kind == "pytorch":
        graph = bundle.graphs["vision"].path
    if graph:  # Triton itself opens it
        trust.check(bundle, [graph], trusted)
    values = {
        "bundle": str(bundle.path),
        "settings": json.dumps(dict(settings or {}), sort_keys=True),
        "vision": vision,
        "max_image_batch": str(max_image_batch(bundle)),
        "vision_instances": str(vision_instances),
        "image_tokens": str(bundle.vision.tokens),
        "hidden_size": str(bundle.vision.hidden_size),
        "image_size": str(bundle.vision.size),
        "fingerprint": bundle.origin.fingerprint,
    }
    values = {name: _escaped(value) for name, value in values.items()}
    with writing(output) as folder:
        for name in models(vision):
            source = TEMPLATES / name
            if not (source / "config.pbtxt").is_file():
                raise InternalError(f"this rtp_llm lacks model_repository/{name}: install it again")
            shutil.copytree(
                source,
                folder / name,
                ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "__init__.py", "*.pbtxt"),
            )
            template = source / "config.pbtxt"
            if graph and name == "vision_tower":
                template = source / f"config.{kind}.pbtxt"
                shutil.rmtree(folder / name / "1", ignore_errors=True)
                (folder / name / "1").mkdir()
                _place(bundle.read_path(graph), folder / name / "1" / FILES[str(kind)], copies)
            text = Template(template.read_text(encoding="utf-8")).substitute(values)
            (folder / name / "config.pbtxt").write_text(text, encoding="utf-8")
            for version in (folder / name).glob("[0-9]*"):
                version.mkdir(exist_ok=True)
            if not any((folder / name).glob("[0-9]*")):  # an ensemble's version has nothing in it
                (folder / name / "1").mkdir()
    return output


def check_output(output: Path, bundle: Bundle, force: bool = False) -> None:
    """Raises UserError unless `output` is new, empty, an older repository of ours, or may be replaced."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file, give a folder")
    here = output.resolve()
    kept = (bundle.path.resolve(), Path.cwd(), Path.home())
    if any(path == here or here in path.parents for path in kept):
        raise UserError(f"--output {output} holds {next(p for p in kept if p == here or here in p.parents)}: "
                        "give a folder of its own")  # fmt: skip
    if here.is_relative_to(kept[0]):
        raise UserError(f"--output {output} lies in the bundle {bundle.path}: give a folder elsewhere")
    foreign = sorted(set(os.listdir(output)) - {*LANGUAGE, *VISION}) if output.is_dir() else []
    if foreign and not force:
        raise UserError(
            f"--output {output} holds {foreign[0]!r}, which is no model of ours: --force replaces it"
        )


def _place(file: Path, to: Path, copies: bool) -> None:
    """A copy that takes no room where the disk is the same."""
    if not copies:
        to.symlink_to(file.resolve())
        return
    try:
        os.link(file.resolve(), to)
    except OSError:
        shutil.copyfile(file, to)


def _escaped(text: str) -> str:
    """As inside the quotes of a pbtxt string."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
