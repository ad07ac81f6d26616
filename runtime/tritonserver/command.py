"""`rtp-llm tritonserver`: a bundle → an assembled repository, or a server on it until a signal."""

from __future__ import annotations

import dataclasses
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InternalError, MissingDependency, UserError
from ...trust import registry_path
from ..server.settings import FIELDS
from . import binary as binaries
from . import launch, repository
from .options import SECRET, Options

if TYPE_CHECKING:
    from ...export.bundle import Bundle

RESTRICTED = "shared-memory,model-repository,trace,logging"  # they open files and memory of the server


def run(
    options: Options, open_bundle: Callable[[], Bundle], ask: Callable[[str], bool], quiet: bool = False
) -> int:
    """Assemble, or serve until a signal; returns the exit code.

    open_bundle: may export a checkpoint first. ask: whether Triton may be downloaded. Raises RtpLlmError.
    """
    if options.output is None:
        return _serve(options, open_bundle, ask, quiet)
    bundle = open_bundle()
    repository.check_output(options.output, bundle, options.force)
    print(_assemble(options, bundle, options.output))
    if not quiet:
        _say(f"to run it: tritonserver --model-repository={options.output.resolve()}")
    return 0


def _serve(
    options: Options, open_bundle: Callable[[], Bundle], ask: Callable[[str], bool], quiet: bool
) -> int:
    front = options.openai_port
    for name, port in {**options.ports, "openai": front or 0}.items():
        try:
            launch.free_ports(options.settings.host, port)
        except UserError as e:
            raise UserError(f"--{name}-port: {e}") from e
    if (front is not None or ":" in options.vision) and not find_spec("tritonclient"):
        flag = "--vision HOST:PORT" if front is None else "--openai-port"
        raise MissingDependency(f'{flag} needs tritonclient: pip install "tritonclient[grpc]"')
    if front is not None and not find_spec("fastapi"):  # missed now, not when the model is loaded
        raise MissingDependency('--openai-port needs fastapi: pip install fastapi "uvicorn<1"')
    binary = binaries.find(ask)
    for word in options.extra:
        if word.startswith("-") and word.partition("=")[0] not in binary.flags:
            raise UserError(f"-- {word}: tritonserver has no such flag (see {binary.path} --help)")
    if problem := binary.problem():
        raise MissingDependency(": ".join(problem))
    with _signals() as signals:
        bundle = open_bundle()
        _check_backend(options, binary, bundle)
        with ExitStack() as stack:
            folder = tempfile.TemporaryDirectory(prefix="rtp-llm-repository-")
            models = _assemble(options, bundle, Path(stack.enter_context(folder)) / "models")
            server = _server(options, binary, models)
            server.resources.push(stack.pop_all())
        signals.server = server
        try:
            _until_signal(server, bundle, options, signals, quiet)
            server.stop()
        except _Killed as e:
            server.stop(0)
            return 128 + e.signal
        except _Asked:  # nothing runs yet
            server.stop(0)
        except BaseException:
            server.stop(0)
            raise
    return 0


def _until_signal(
    server: launch.Tritonserver, bundle: Bundle, options: Options, signals: _Signals, quiet: bool
) -> None:
    """Start and serve. Raises what ended the server, if it was no signal."""
    say = (lambda line: None) if quiet else _say
    server.start()
    say(f"Triton Inference Server loads {bundle.name}" + (f", its log is {server.log}" if server.log else ""))
    if not options.settings.loopback:
        _say(f"--insecure: anybody who reaches {server.host} may use the models, Triton asks for no key")
    try:
        server.wait_until_ready(_Progress(server, signals, quiet))
        say(f"ready: http://{server.http} grpc://{server.grpc} metrics http://{server.metrics}/metrics")
        if options.openai_port is not None:
            from . import front

            front.run(server, bundle, options.settings, options.openai_port, quiet)
            signals.asked = True
        while not signals.asked and server.process.poll() is None and not server.lost():
            time.sleep(launch.POLL)
        if not signals.asked:
            raise server.reason()
    except InternalError:
        if not options.echo:
            print(server.last_lines(), file=sys.stderr)
        raise
    say("running requests finish; another signal ends them")


def _check_backend(options: Options, binary: binaries.Binary, bundle: Bundle) -> None:
    kind = repository.platform(bundle)
    if options.vision in ("separate", "only") and kind and kind not in binary.backend_names():
        raise UserError(
            f"{bundle.path}: its vision graph is for Triton's {kind} backend, {binary.path} has only "
            f"{', '.join(binary.backend_names())}: run inside {binaries.CONTAINER}, or leave --vision out"
        )


def _assemble(options: Options, bundle: Bundle, output: Path) -> Path:
    given = {name: value for name, value in options.given.items() if name not in SECRET}
    return repository.assemble(
        bundle, output, options.vision, given, options.vision_instances,
        trusted=options.settings.trust_engines, copies=options.output is not None,
    )  # fmt: skip


def _server(options: Options, binary: binaries.Binary, models: Path) -> launch.Tritonserver:
    ports, settings = options.ports, options.settings
    extra = list(options.extra)
    for flag in ("--http-restricted-api", "--grpc-restricted-protocol"):
        if flag in binary.flags and not any(word.partition("=")[0] == flag for word in extra):
            # a key that nobody is told
            extra.append(f"{flag}={RESTRICTED}:{secrets.token_hex(8)}={secrets.token_hex(16)}")
    # what the models are told stands in their config, and HOST or API_KEY are none of theirs
    env = {name: value for name, value in binary.env.items() if name not in {f.name.upper() for f in FIELDS}}
    env |= {name.upper(): options.given[name] for name in SECRET if name in options.given}
    server = launch.Tritonserver(
        models, ports["http"], ports["grpc"], ports["metrics"], extra, options.log, host=settings.host,
        binary=dataclasses.replace(binary, env=env), drain=settings.drain_seconds, echo=options.echo,
    )  # fmt: skip
    if options.log is None and not options.echo:
        server.log = registry_path().parent / f"tritonserver-{server.http_port}.log"
    return server


class _Asked(BaseException):
    """A signal came while the models were loading."""


class _Killed(BaseException):
    """The second signal."""

    def __init__(self, number: int):
        self.signal = number


class _Signals:
    """The first one asks; the second one interrupts whatever runs."""

    asked = False
    server: launch.Tritonserver | None = None

    def __call__(self, number: int, frame: Any) -> None:
        if number == signal.SIGHUP:  # the HTTP server in front knows only the others
            signal.raise_signal(signal.SIGTERM)
        elif self.asked or self.server is None:  # nothing to finish
            raise _Killed(number) if self.asked else KeyboardInterrupt
        else:
            self.asked = True


@contextmanager
def _signals() -> Iterator[_Signals]:
    handler = _Signals()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    old = [signal.signal(number, handler) for number in numbers]
    try:
        yield handler
    finally:
        for number, before in zip(numbers, old, strict=True):
            signal.signal(number, before)


class _Progress:
    """While models load: a line that is written over, or one every ten seconds."""

    def __init__(self, server: launch.Tritonserver, signals: _Signals, quiet: bool):
        self.server, self.signals, self.quiet = server, signals, quiet
        self.start = self.shown = time.monotonic()
        self.live = sys.stderr.isatty() and not server.echo

    def __call__(self) -> None:
        if self.signals.asked:
            raise _Asked
        now = time.monotonic()
        if self.quiet or now - self.shown < (0.2 if self.live else 10):
            return
        self.shown = now
        line = f"loading {', '.join(self.server.loading) or 'models'}: {now - self.start:.0f} s"
        print(
            f"\r{line}\x1b[K" if self.live else line,
            end="\r" if self.live else "\n",
            file=sys.stderr,
            flush=True,
        )


def _say(line: str) -> None:
    print(line + ("\x1b[K" if sys.stderr.isatty() else ""), file=sys.stderr, flush=True)
