"""`rtp-llm doctor`: what works on this machine, and the fix for what does not."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from .errors import MissingDependency, UserError

OK, NOTE, BROKEN = "ok", "note", "broken"
RUNTIME = ("numpy", "PIL", "tokenizers", "jinja2", "psutil")  # what every answer needs
EXPORT = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "huggingface_hub",
    "transformers",
    "sentencepiece",
)
ORT = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-silicon",
)


@dataclass
class Check:
    """`status`: ok; note (works without, or not everything works); broken (something needed)."""

    name: str
    status: str
    found: str
    fix: str = ""


def examine() -> list[Check]:
    """All checks, in order; none raises."""
    gpu = _gpu()
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("packages", _packages),
        ("torch", lambda: _torch(gpu)),
        ("export", _exporter),
        ("onnxruntime", lambda: _onnxruntime(gpu)),
        ("gpu", lambda: Check("gpu", OK if gpu else NOTE, gpu or "none: answers come from the CPU")),
        ("triton language", lambda: _kernels(gpu)),
        ("tensorrt", lambda: _tensorrt(gpu)),
        ("torch_tensorrt", _torch_tensorrt),
        ("tritonserver", _tritonserver),
        ("hub", _hub),
        ("memory", _memory),
    ]
    return [_safe(name, check) for name, check in checks]


def _safe(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as e:  # a broken package may raise anything
        line = " ".join(f"{type(e).__name__}: {e}".split())
        return Check(name, BROKEN, line, "reinstall the package that the error names")


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _broken_import(module: str) -> str | None:
    """Why a module cannot be imported; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as e:
        return " ".join(f"{type(e).__name__}: {e}".split())
    return None


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < (3, 11):  # noqa: UP036  (a wheel may be forced in)
        return Check("python", BROKEN, found, "install Python 3.11 or later")
    if other := version("rtp-llm"):
        return Check("python", BROKEN, f"{found}, beside rtp-llm {other}, which has the same import name",
                     "use an environment of its own, or: pip uninstall rtp-llm")  # fmt: skip
    return Check("python", OK, found)


def _packages() -> Check:
    bad = {m: why for m in RUNTIME if (why := _broken_import(m))}
    if bad:
        names = " ".join("pillow" if m == "PIL" else m for m in bad)
        return Check("packages", BROKEN, "; ".join(bad.values()), f"pip install {names}")
    return Check("packages", OK, ", ".join("pillow" if m == "PIL" else m for m in RUNTIME))


def _torch(gpu: str | None) -> Check:
    found = version("torch")
    if found is None:
        return Check("torch", NOTE, "not installed: bundles run, nothing can be exported",
                     "pip install torch (with uv: --torch-backend=cpu for the small build)")  # fmt: skip
    if why := _broken_import("torch"):
        return Check("torch", BROKEN, why, "pip install --force-reinstall torch")
    import torch

    if gpu and not torch.cuda.is_available():
        return Check("torch", NOTE, f"{found}, which does not see the GPU",
                     "install a CUDA build of torch: GPU bundles run through it")  # fmt: skip
    return Check("torch", OK, found + (f", CUDA {torch.version.cuda}" if torch.cuda.is_available() else ""))


def _exporter() -> Check:
    bad = {m: why for m in EXPORT[1:] if (why := _broken_import(m))}
    if bad:
        return Check(
            "export", NOTE, "; ".join(bad.values()), f"pip install {' '.join(bad)}".replace("_", "-")
        )
    return Check("export", OK, ", ".join(f"{m} {version(m)}" for m in EXPORT[1:]))


def _onnxruntime(gpu: str | None) -> Check:
    installed = [name for name in ORT if version(name)]
    if len(installed) > 1:
        keep = "onnxruntime-gpu" if gpu and "onnxruntime-gpu" in installed else "onnxruntime"
        return Check(
            "onnxruntime", BROKEN, f"{' and '.join(installed)} are both installed and overwrite each other",
            f"pip uninstall -y {' '.join(installed)} && pip install {keep}",
        )  # fmt: skip
    if why := _broken_import("onnxruntime"):
        return Check("onnxruntime", BROKEN, why, "pip install onnxruntime (or onnxruntime-gpu)")
    import onnxruntime

    from .runtime.backends.onnx import import_onnxruntime

    try:
        import_onnxruntime()
    except MissingDependency as e:
        return Check("onnxruntime", BROKEN, *str(e).split(": ", 1))
    providers = [p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()]
    found = f"{onnxruntime.__version__}, providers {', '.join(providers)}"
    if gpu and "CUDA" not in providers:
        return Check("onnxruntime", NOTE, f"{found}: bundles of export --device cuda do not run",
                     "pip uninstall -y onnxruntime && pip install onnxruntime-gpu")  # fmt: skip
    if gpu:  # listed by the wheel, whether or not its libraries are here
        found += "; CUDA's libraries are loaded when a bundle is"
    return Check("onnxruntime", OK, found)


def _gpu() -> str | None:
    """Name, memory and driver of the first GPU."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip().splitlines()[0] if out.returncode == 0 and out.stdout.strip() else None


def _kernels(gpu: str | None) -> Check:
    """The Triton language: attention of TorchScript on a GPU, and of the TensorRT plugins when built."""
    name = "triton language"
    why = _broken_import("triton")
    if not why:
        return Check(name, OK, f"{version('triton')}: paged attention on a GPU")
    found = "not installed" if version("triton") is None else why
    if not gpu:
        return Check(name, OK, f"{found}, and not needed without a GPU")
    return Check(name, NOTE, f"{found}: no TorchScript on the GPU, no paged engines built",
                 "pip install triton")  # fmt: skip


def _tensorrt(gpu: str | None) -> Check:
    from . import trt

    try:
        found = trt.version()
    except MissingDependency as e:
        found, _, fix = str(e).rpartition(": ")
        where = "" if gpu else "on Linux with an NVIDIA GPU: "
        return Check("tensorrt", NOTE, f"{found}, so no engines are built or run", where + fix)
    if not gpu:
        return Check("tensorrt", NOTE, f"{found}, but no GPU: engines are built and run where one is",
                     "run rtp-llm build on the machine with the GPU")  # fmt: skip
    try:
        return Check("tensorrt", OK, f"{found}, for {trt.gpu().name}")
    except UserError as e:
        return Check("tensorrt", NOTE, f"{found}: {e}", "install a CUDA build of torch")


def _torch_tensorrt() -> Check:
    if found := version("torch-tensorrt"):
        why = _broken_import("torch_tensorrt")
        fix = "install the torch-tensorrt that goes with this torch" if why else ""
        return Check("torch_tensorrt", NOTE if why else OK, why or found, fix)
    return Check("torch_tensorrt", OK, "not installed: rtp-llm build has no --vision-compiler torch_tensorrt")


def _tritonserver() -> Check:
    from .runtime.tritonserver import binary

    parts = binary.examine()
    missing = next((part for part in parts if not part.there), parts[0])
    return Check("tritonserver", OK if missing.there else NOTE, missing.found, missing.fix)


def _hub() -> Check:
    try:
        import huggingface_hub.constants as hub
    except ImportError:
        return Check("hub", NOTE, "huggingface_hub is not installed: only local checkpoints open",
                     "pip install huggingface_hub")  # fmt: skip
    if hub.is_offline_mode():
        return Check(
            "hub", NOTE, "offline: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE to download checkpoints"
        )
    try:
        urllib.request.urlopen(urllib.request.Request(hub.ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as e:
        why = " ".join(str(getattr(e, "reason", e)).split())
        fix = "give local checkpoints with --checkpoint PATH, or set HTTPS_PROXY or HF_ENDPOINT"
        return Check("hub", NOTE, f"{hub.ENDPOINT} cannot be reached: {why}", fix)
    token = "with a token" if os.environ.get("HF_TOKEN") else "without a token"
    return Check("hub", OK, f"{hub.ENDPOINT} answers, {token}")


def _memory() -> Check:
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    found = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    return Check("memory", OK, f"{found}, {cores} cores, {disk.free / 1e9:.1f} GB of disk free here")
