"""What the README says is true. `python tests/test_readme.py` brings its accuracy table up to date."""

from __future__ import annotations

import dataclasses
import http.server
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MARKS = "<!-- accuracy -->\n", "<!-- /accuracy -->"


def tracked() -> list[str]:
    """Files that git knows or would take; without git, the test is skipped."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git clone")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def tree() -> dict[str, str]:
    """Path → reason, of the README's tree."""
    block = README.read_text().split("## The tree")[1].split("```text\n")[1].split("```")[0]
    parents: list[str] = []
    found = {}
    for line in block.splitlines():
        match = re.fullmatch(r"((?:  )*)(\S.*?)  +(\S.*)", line)
        assert match, f"no reason: {line!r}"
        depth = len(match[1]) // 2
        for name in match[2].split():
            found["".join(parents[:depth]) + name] = match[3]
        parents[depth:] = [match[2]]
    return found


def test_the_tree_is_true() -> None:
    listed, files = tree(), tracked()
    folders = {p + "/" for f in files for p in map(str, Path(f).parents) if p != "."}
    assert sorted(set(listed) - set(files) - folders) == [], "in the README, but not there"
    wanted = {f for f in files if "/" not in f} | {f.split("/")[0] + "/" for f in files if "/" in f}
    wanted -= {".ci/", ".types/"}  # named by what they hold
    wanted |= {f for f in files if re.match(r"(export|runtime|build|model_repository)/.*\.py$", f)}
    wanted |= {f for f in files if f.startswith("scripts/")}
    assert sorted(wanted - set(listed)) == [], "there, but not in the README"


def test_it_begins_with_the_two_commands() -> None:
    first = README.read_text().split("```shell\n")[1].split("```")[0]
    assert README.read_text().index("```shell") < 20
    assert [line.split("  ")[0] for line in first.splitlines()] == [
        "bash scripts/demo.sh",
        "bash scripts/test.sh",
    ]


def test_every_setting_is_documented() -> None:
    from rtp_llm.model_factory import ModelConfig
    from rtp_llm.runtime.sequence import SamplingParams
    from rtp_llm.runtime.server.settings import Settings

    text = README.read_text()
    for cls in (ModelConfig, SamplingParams):
        for field in dataclasses.fields(cls):
            assert f"`{field.name}`" in text, f"{cls.__name__}.{field.name} is not in the README"
    for field in dataclasses.fields(Settings):
        name = field.name.upper() if field.metadata["env"] else f"--{field.name}"
        assert f"`{name}`" in text, f"the server's {name} is not in the README"


def accuracy_table() -> str:
    """The samples' accuracy.json files as a table: a row a question, a column a way of asking it."""
    files = sorted((ROOT / "tests" / "checkpoints").glob("*/accuracy.json"))
    reports = {file.parent.name: json.loads(file.read_text()) for file in files}
    columns = {f"{name}, {form}": t for name, r in reports.items() for form, t in r["forms"].items()}
    if not columns:
        return ""
    rows = list(dict.fromkeys(row for table in columns.values() for row in table))
    made = ", ".join(dict.fromkeys(f"{r['date']} on {r['machine']}" for r in reports.values()))
    scenes = ", ".join(dict.fromkeys(f"{r['held_out_scenes']:,}" for r in reports.values()))
    lines = [f"(share of exactly right greedy answers on {scenes} held-out scenes, measured {made})", ""]
    lines += ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for row in rows:
        cells = [f"{t[row]['share']:.1%}" if row in t else "–" for t in columns.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def test_accuracy_is_what_was_measured() -> None:
    shown = README.read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    assert shown == accuracy_table(), "run: python tests/test_readme.py"


@pytest.fixture
def picture_url(red_circle: Path) -> Iterator[str]:
    """A local web server that has one picture."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = red_circle.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/demo.jpeg"
        server.shutdown()


def test_the_tutorial_runs(
    picture_url: str,
    sample_qwen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Word for word, but for the checkpoint's and the picture's place."""
    monkeypatch.setenv("RTP_LLM_CACHE", str(tmp_path))
    code = README.read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("Qwen/Qwen-VL-Chat", str(sample_qwen)).replace("https://…/demo.jpeg", picture_url)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    names["pipeline"].stop()
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("['a red circle']")  # the whole answer; the next one begins with its first token
    assert lines[first + 1 :].count("['a red circle']") >= 1 and lines[-1] == "['a red circle']"
    assert lines.count(lines[0]) == 2, "both calls stream the same answer"


if __name__ == "__main__":
    before, rest = README.read_text().split(MARKS[0])
    README.write_text(before + MARKS[0] + accuracy_table() + MARKS[1] + rest.split(MARKS[1])[1])
