"""A conversation in a terminal, or from a pipe: `rtp-llm chat`."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RtpLlmError, UserError

if TYPE_CHECKING:
    from .pipeline import Pipeline


def picture(name: str) -> str:
    """A picture's name, checked if it is a file's; raises UserError."""
    if name.startswith(("http://", "https://", "data:", "file:")):
        return name
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"no such picture: {name}")
    return str(path)


HELP = (
    "/image FILE adds a picture to your next words, /reset forgets, /quit or Ctrl-D leaves, "
    "Ctrl-C stops an answer"
)


@dataclass
class Talk:
    """A conversation: its turns so far, and the pictures that go with the next words."""

    pipeline: Pipeline
    config: dict[str, Any]
    system: str | None = None
    quiet: bool = False
    turns: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    interactive: bool = False  # Ctrl-C ends an answer, not the program

    def ask(self, text: str) -> None:
        """Stream one answer; the turn is kept unless it failed."""
        images, self.images = self.images, []
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in images]
        asked = {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        answer = self.show(self.pipeline.chat([*system, *self.turns, asked], self.config))
        self.turns += [asked, {"role": "assistant", "content": answer}]

    def show(self, responses: Any) -> str:
        """Print an answer while it grows; returns it. Ctrl-C in a conversation keeps what came."""
        text, last = "", None
        try:
            for last in responses:
                full = last.batch_response[0]
                print(full[len(text) :], end="", flush=True)
                text = full
        except KeyboardInterrupt:
            print(" …", flush=True)
            responses.close()
            if not self.interactive:
                raise
            return text
        except RtpLlmError:
            print(end="\n" if text else "", flush=True)
            raise
        print(flush=True)
        if last is not None and not self.quiet:
            a = last.generate_outputs[0].aux_info
            rest = (a.cost_time - a.first_token_cost_time) / 1000
            rate = (
                f", then {(a.output_len - 1) / rest:.1f} tokens a second"
                if a.output_len > 1 and rest > 0
                else ""
            )
            print(
                f"[{a.input_len} tokens in, {a.output_len} out; first after "
                f"{a.first_token_cost_time / 1000:.2f} s{rate}]",
                file=sys.stderr,
            )
        return text

    def loop(self) -> int:
        """Until the input ends. The exit code of the last failed turn, if the input is no terminal."""
        self.interactive = terminal = sys.stdin.isatty()
        code = 0
        if terminal:
            with contextlib.suppress(ImportError):  # line editing in input()
                import readline  # noqa: F401
            if not self.quiet:
                print(HELP, file=sys.stderr)
        while True:
            try:
                line = (input("> ") if terminal else next(sys.stdin)).strip()
                if line in ("/quit", "/exit"):
                    return code
                self._line(line)
            except (EOFError, StopIteration):
                if terminal:
                    print()
                return code
            except KeyboardInterrupt:
                if not terminal:
                    raise
                print()  # a line half typed; Ctrl-D leaves
            except RtpLlmError as e:
                print(f"rtp-llm chat: {' '.join(str(e).split())}", file=sys.stderr)
                code = 0 if terminal else e.exit_code

    def _line(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if not line:
            return
        if word == "/reset":
            self.turns, self.images = [], []
        elif word == "/image":
            self.images.append(picture(rest.strip()))
        elif word == "/help":
            print(HELP, file=sys.stderr)
        elif word.startswith("/") and word[1:].isalpha() and not rest:
            raise UserError(f"unknown command {word}: {HELP}")
        else:
            self.ask(line)
