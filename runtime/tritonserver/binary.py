"""Where the server program comes from: `tritonserver` on PATH (NVIDIA's container), else a pinned wheel.

The wheel (nvidia-pytriton, Triton 2.51) is unpacked into the user's cache folder and never installed: only
its server, its Python backend and its cache are used. Its Python stub was compiled against numpy 1, so models
run in a private environment that sees numpy 1.26 first and then everything of the running Python.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...errors import InternalError, MissingDependency
from ...export.bundle import writing

TRITON = "2.51.0"
WHEEL = "nvidia-pytriton==0.7.0"
WHEEL_SHA256 = "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"
NUMPY = "numpy==1.26.4"  # the last of the line that the wheel's stubs were compiled against
NUMPY_SHA256 = {  # by Python's minor version
    11: "666dbfb6ec68962c033a450943ded891bed2d54e6755e35e5835d63f4f6931d5",
    12: "675d61ffbfa78604709862923189bad94014bef562cc35cf61d3a07bba02a7ed",
}
DOWNLOAD = "about 75 MB"
STUB = "triton_python_backend_stub"
CONTAINER_BACKENDS = Path("/opt/tritonserver/backends")
SHARED_MEMORY = 64 << 20  # bytes free: regions of a megabyte each, that grow with the pictures
IMPORTS = "import rtp_llm.pipeline, rtp_llm.runtime.tritonserver, prometheus_client; print('ok')"
CONTAINER = "NVIDIA's container nvcr.io/nvidia/tritonserver"
MINOR = sys.version_info.minor


@dataclass(frozen=True)
class Binary:
    """A server program that can be started: `[path, *arguments]` with the environment `env`."""

    path: Path
    backends: Path
    caches: Path | None  # None: the program's own default
    env: dict[str, str]

    @property
    def arguments(self) -> list[str]:
        flags = (("--backend-directory", self.backends), ("--cache-directory", self.caches))
        return [f"{flag}={folder}" for flag, folder in flags if folder and folder != CONTAINER_BACKENDS]

    def backend_names(self) -> list[str]:
        """Of the backends that it has: "python", "tensorrt", "pytorch", …"""
        return sorted(path.parent.name for path in self.backends.glob("*/libtriton_*.so"))

    @functools.cached_property
    def flags(self) -> frozenset[str]:
        """All that the program takes, like "--http-port", as its --help says."""
        return frozenset(re.findall(r"^\s*(--[a-z][a-z0-9-]+)", self._run([str(self.path), "--help"]), re.M))

    def problem(self) -> tuple[str, str] | None:
        """What keeps our models from running in it, and the fix."""
        stub = self.backends / "python" / STUB
        if not stub.is_file():
            return f"there is no Python backend in {self.backends}", f"run inside {CONTAINER}"
        linked = self._run(["ldd", str(stub)])
        version = next(iter(re.findall(r"libpython(3\.\d+)", linked)), f"3.{MINOR}")
        if version != f"3.{MINOR}":
            return (f"Triton's Python stub runs Python {version}, this is 3.{MINOR}",
                    f"install vlmbundle into Python {version} and start from there")  # fmt: skip
        if missing := re.search(r"^\s*(libpython\S+) => not found", linked, re.M):
            return (f"Triton's Python stub needs {missing[1]}, which is not on this machine",
                    f"apt-get install libpython3.{MINOR} (Fedora: python3.{MINOR}-libs), or use a Python "
                    "built with --enable-shared")  # fmt: skip
        if (why := self._run(["python3", "-c", IMPORTS])) != "ok\n":
            line = (why.strip().splitlines() or ["it ended without a word"])[-1]
            package = "prometheus_client" if "prometheus_client" in line else "vlmbundle"
            return (f"the Python that Triton's models run in does not work: {line}",
                    f"{sys.executable} -m pip install {package}")  # fmt: skip
        return None

    def numpy(self) -> str:
        """Version that the models see."""
        return self._run(["python3", "-c", "import numpy; print(numpy.__version__)"]).strip()

    def _run(self, command: list[str]) -> str:
        """Output of a program that runs as the server's own would."""
        found = shutil.which(command[0], path=self.env["PATH"]) or command[0]
        try:
            done = subprocess.run([found, *command[1:]], env=self.env, cwd="/", stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  timeout=60)  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as e:
            return f"{command[0]}: {e}"
        return done.stdout


@dataclass(frozen=True)
class Part:
    """Of what the server needs. `needed`: nothing runs without it."""

    name: str
    there: bool
    found: str
    fix: str = ""
    needed: bool = True


def examine(cache: Path | None = None) -> list[Part]:
    """What is there and what is missing, for --check and for the doctor. Downloads nothing."""
    parts = []
    try:
        binary = find(cache=cache)
    except MissingDependency as e:
        what, _, fix = str(e).partition(": ")
        parts.append(Part("tritonserver", False, what, fix))
    else:
        origin = "on PATH" if binary.caches is None else f"{TRITON}, of the wheel {WHEEL}"
        parts.append(Part("tritonserver", True, f"{binary.path} ({origin})"))
        names = binary.backend_names()
        parts.append(Part("backends", "python" in names, ", ".join(names) or f"none in {binary.backends}",
                          "" if "python" in names else f"run inside {CONTAINER}"))  # fmt: skip
        problem = binary.problem()
        found = problem[0] if problem else f"3.{MINOR} with numpy {binary.numpy()}"
        parts.append(Part("python", not problem, found, problem[1] if problem else ""))
    client = importlib.util.find_spec("tritonclient") is not None
    parts.append(Part("tritonclient", client, "installed" if client else "not installed: no --openai-port, "
                      "no --vision HOST:PORT", "" if client else 'pip install "tritonclient[grpc,http]"',
                      needed=False))  # fmt: skip
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    parts.append(Part("shared memory", free >= SHARED_MEMORY, f"{free / 1e6:.0f} MB free in /dev/shm",
                      "" if free >= SHARED_MEMORY else "give the container more: docker run --shm-size=1g",
                      needed=False))  # fmt: skip
    return parts


def find(fetch: bool | Callable[[str], bool] = False, cache: Path | None = None) -> Binary:
    """The server program and what it runs in.

    fetch: whether the wheel may be downloaded when there is none; or who is asked, with the question.
    cache: where it is kept [`tritonserver` in the user's cache folder]. Raises MissingDependency with what
    to do, InternalError when the download fails.
    """
    if path := shutil.which("tritonserver"):
        own = Path(path).resolve().parent.parent / "backends"  # of another place than the container's
        backends = own if own.is_dir() else CONTAINER_BACKENDS
        return Binary(Path(path), backends, None, _environment(Path(sys.executable).parent))
    cache = cache or _cache()
    if why := unsupported():
        raise MissingDependency(f"no tritonserver on PATH, and {why}: run inside {CONTAINER}")
    wheel = cache / f"{WHEEL.replace('==', '-')}-cp3{MINOR}"
    if not wheel.is_dir():
        question = f"Triton Inference Server {TRITON} is not here. Download it ({DOWNLOAD}) into {cache}?"
        if not (fetch(question) if callable(fetch) else fetch):
            raise MissingDependency(
                f"no tritonserver on PATH nor in {cache}: rtp-llm tritonserver --check --yes "
                f"downloads it ({DOWNLOAD}), or run inside {CONTAINER}"
            )
        with _lock(cache):
            if not wheel.is_dir():  # another process may have been quicker
                _download(wheel)
    home = _prepare(cache, wheel)
    env = _environment(home / "env" / "bin")
    env.pop("PYTHONPATH", None)  # the stub ignores it; its folders stand in the environment's .pth
    env["LD_LIBRARY_PATH"] = os.pathsep.join(
        filter(None, (str(wheel / "nvidia_pytriton.libs"), str(home / "lib"), env.get("LD_LIBRARY_PATH")))
    )
    server = wheel / "pytriton" / "tritonserver"
    return Binary(server / "bin" / "tritonserver", home / "backends", server / "caches", env)


def unsupported() -> str:
    """Why the wheel cannot run here; "" when it can."""
    libc, version = platform.libc_ver()
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the wheel of Triton is for Linux on x86_64, this is {platform.system()} {platform.machine()}"
    if libc != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return f"the wheel of Triton needs glibc 2.35, this is {libc or 'another libc'} {version}".rstrip()
    if MINOR not in NUMPY_SHA256:
        known = " and ".join(f"3.{minor}" for minor in NUMPY_SHA256)
        return f"the wheel of Triton needs numpy 1, which there is for Python {known}, this is 3.{MINOR}"
    return ""


def _cache() -> Path:
    from ...model_factory import cache_folder

    return cache_folder() / "tritonserver"


def _environment(python: Path) -> dict[str, str]:
    """The stub finds its Python as `python3` on PATH."""
    return {**os.environ, "PATH": os.pathsep.join((str(python), os.environ.get("PATH", os.defpath)))}


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _download(wheel: Path) -> None:
    if importlib.util.find_spec("pip"):
        install = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
    elif uv := shutil.which("uv"):
        install = [uv, "pip", "install", "--python", sys.executable]
    else:
        raise MissingDependency(
            f"the download of Triton needs pip or uv: {sys.executable} -m ensurepip, or install uv"
        )
    with writing(wheel) as folder:
        wanted = folder / "requirements.txt"
        wanted.write_text(
            f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n{NUMPY} --hash=sha256:{NUMPY_SHA256[MINOR]}\n"
        )
        command = [*install, "-q", "--no-deps", "--only-binary=:all:", "--require-hashes",
                   "--target", str(folder), "-r", str(wanted)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            error = next((line for line in lines if "ERROR" in line or "error:" in line), lines[-1])
            raise InternalError(f"Triton Inference Server cannot be downloaded: {error.strip()[:300]}")


def _prepare(cache: Path, wheel: Path) -> Path:
    """The folder with what depends on the running Python: `env`, `backends`, `lib`."""
    places = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    roots = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(path)]
    lines = [str(wheel), *roots, *(f"import site; site.addsitedir({place!r})" for place in places)]
    text = "\n".join(lines) + "\n"
    key = hashlib.sha256(f"{sys.base_prefix} {sys.version} {text}".encode()).hexdigest()[:16]
    home = cache / f"python-3.{MINOR}-{key}"
    if home.is_dir():
        return home
    with _lock(cache):
        if home.is_dir():
            return home
        with writing(home) as folder:
            venv.EnvBuilder(symlinks=True, with_pip=False).create(folder / "env")
            packages = next((folder / "env" / "lib").glob("python3*")) / "site-packages"
            (packages / "rtp_llm.pth").write_text(text)
            (folder / "lib").mkdir()
            name = f"libpython3.{MINOR}.so.1.0"
            for place in (sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix, "lib")):
                if place and Path(place, name).is_file():  # the running Python's own, before the system's
                    (folder / "lib" / name).symlink_to(Path(place, name))
                    break
            server = wheel / "pytriton" / "tritonserver"
            backend = folder / "backends" / "python"
            shutil.copytree(server / "backends" / "python", backend)
            stub = backend / STUB
            shutil.copy(server / "python_backend_stubs" / f"3.{MINOR}" / stub.name, stub)
            stub.chmod(0o755)
    return home
