"""The command line as typed: exit codes, one-line errors, chat and batch."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rtp_llm import cli, doctor
from rtp_llm.errors import ImageDecodeError, UserError
from rtp_llm.runtime.batch import run
from rtp_llm.runtime.request import AuxInfo, GenerateOutput, GenerateResponse
from rtp_llm.talk import Talk

COMMANDS = ["export", "build", "verify", "inspect", "chat", "batch", "tritonserver", "bench", "doctor"]


def _response(text: str, finished: bool = True) -> GenerateResponse:
    aux = AuxInfo(cost_time=30.0, first_token_cost_time=10.0, input_len=5, output_len=3)
    return GenerateResponse([text], [GenerateOutput(finished=finished, aux_info=aux)], finished)


class Echo:
    """A pipeline that answers with what it was asked; the word `fail` fails."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.stopped = 0

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped += 1

    def _answer(self, text: str) -> Iterator[GenerateResponse]:
        if "fail" in text:
            raise ImageDecodeError("no\npicture")
        for end in range(1, len(text) + 1):
            yield _response(text[:end], end == len(text))

    def chat(self, messages: list[dict[str, Any]], config: Any = None) -> Iterator[GenerateResponse]:
        self.calls.append((messages, config))
        content = messages[-1]["content"]
        return self._answer(content if isinstance(content, str) else content[-1]["text"])

    def __call__(self, prompt: str, urls: Any = None, generate_config: Any = None) -> Any:
        self.calls.append((prompt, urls, generate_config))
        return self._answer(prompt)

    def batch(self, requests: Iterator[dict[str, Any]]) -> Iterator[Any]:
        waiting = []
        for i, request in enumerate(requests):
            self.calls.append(request)
            waiting.append((i, request))
            if len(waiting) == 3:  # as a window of requests that are taken ahead of the answers
                yield self._batched(*waiting.pop(0))
        for item in waiting:
            yield self._batched(*item)

    def _batched(self, i: int, request: dict[str, Any]) -> Any:
        if "fail" in request["prompt"]:
            return i, ImageDecodeError("no picture")
        return i, _response(request["prompt"].upper())


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Echo:
    pipeline = Echo()
    monkeypatch.setattr(cli, "_pipeline", lambda args: pipeline)
    return pipeline


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    assert f"example:\n  rtp-llm {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("nonsense", 2, "invalid choice: 'nonsense'"),
        ("chat", 2, "the following arguments are required: BUNDLE"),
        ("chat b --nonsense", 2, "unknown argument --nonsense"),
        ("chat b --top-k many", 2, "invalid int value: 'many'"),
        ("chat b --raw", 2, "--raw needs a PROMPT"),
        ("chat b hi --raw --system s", 2, "--system does not go with --raw"),
        ("chat b hi --image no.png", 2, "no such picture: no.png"),
        ("export", 2, "give --checkpoint PATH"),
        ("export --model nothing", 2, "known families are qwen_vl, llava"),
        ("export --checkpoint no/such/folder", 2, "does not exist"),
        ("export --model qwen_vl --checkpoint . --precision fp16", 2, "fp16 is refused on the CPU"),
        ("export --model qwen_vl --checkpoint . --backend tensorrt --device cpu", 2, "device cpu"),
        ("export --model qwen_vl --checkpoint . --opt-level 5", 2, "--opt-level goes with --backend"),
        ("export --model qwen_vl --checkpoint . --backend tflite", 2, "onnxruntime, torchscript or tensorrt"),
        ("inspect no/such/folder", 2, "does not exist"),
        ("batch b no.jsonl out.jsonl", 2, "no such file: no.jsonl"),
        ("bench no/such/folder", 2, "does not exist"),
        ("bench b --output plot.png", 2, "--output plot.png must be a .json file in a folder that exists"),
        ("bench b --output no/such/folder/a.json", 2, "must be a .json file in a folder that exists"),
    ],
)
def test_wrong_use_is_one_line(
    line: str,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHECKPOINT_PATH", raising=False)
    try:
        found = cli.main(line.split())
    except SystemExit as e:
        found = int(str(e.code))
    out, err = capsys.readouterr()
    assert (found, out) == (code, "")
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_breaks_is_one_line_unless_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(doctor, "examine", broken)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "rtp-llm doctor: ZeroDivisionError: by zero (--debug shows where)\n"
    assert cli.main(["doctor", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_importing_the_command_line_is_light() -> None:
    code = (
        "import sys, rtp_llm.cli; print(sorted({'torch', 'numpy', 'onnxruntime', 'PIL'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


# -------------------------------------------------------------------------------------------- chat


def test_chat_once(echo: Echo, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.touch()
    args = [
        "chat",
        "b",
        "hello",
        "--image",
        str(picture),
        "--system",
        "Be brief.",
        "--seed",
        "3",
        "--top-k",
        "0",
    ]
    assert cli.main(args) == 0
    messages, config = echo.calls[0]
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": str(picture)}},
                {"type": "text", "text": "hello"},
            ],
        },
    ]
    assert config == {"random_seed": 3, "top_k": 0}
    out, err = capsys.readouterr()
    assert out == "hello\n" and "5 tokens in, 3 out" in err
    assert echo.stopped == 1
    assert cli.main([*args, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_chat_raw(echo: Echo, capsys: pytest.CaptureFixture[str]) -> None:
    url = "https://example.com/a.png"
    assert cli.main(["chat", "b", "A:<img/>", "--raw", "--image", url, "--temperature", "0"]) == 0
    assert echo.calls == [("A:<img/>", [url], {"temperature": 0.0})]
    assert capsys.readouterr().out == "A:<img/>\n"


def test_chat_reports_a_failure(echo: Echo, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "b", "fail"]) == 2
    assert capsys.readouterr().err == "rtp-llm chat: no picture\n"


def test_a_conversation_from_a_pipe(
    echo: Echo, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "my picture.png"
    picture.touch()
    lines = ["one", "", f"/image {picture}", "two", "fail", "three", "/reset", "four", "/quit", "five"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert cli.main(["chat", "b"]) == 2  # of the turn that failed
    out, err = capsys.readouterr()
    assert out.split() == ["one", "two", "three", "four"]
    assert "rtp-llm chat: no picture" in err
    histories = [[m["role"] for m in messages] for messages, _ in echo.calls]
    turns = ["user", "assistant"]
    assert histories == [["user"], [*turns, "user"], [*turns * 2, "user"], [*turns * 2, "user"], ["user"]]
    assert echo.calls[1][0][2]["content"][0]["image_url"]["url"] == str(picture)
    assert echo.calls[3][0][-1]["content"] == "three"  # the picture went with `two` only


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(
    echo: Echo, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = []

    def interrupted() -> Iterator[GenerateResponse]:
        try:
            yield _response("half", False)
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    talk = Talk(echo, {}, interactive=True)  # type: ignore[arg-type]
    assert talk.show(interrupted()) == "half"
    assert closed == [True] and capsys.readouterr().out == "half …\n"
    talk.interactive = False
    with pytest.raises(KeyboardInterrupt):
        talk.show(interrupted())


# ------------------------------------------------------------------------------------------- batch

Batch = Callable[..., Any]


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    """Runs a batch of lines with an Echo; returns the tally and what stands in out.jsonl."""

    def go(lines: list[str] | None = None, **options: Any) -> Any:
        if lines is not None:
            (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
        pipeline = Echo()
        tally = run(lambda: pipeline, tmp_path / "in.jsonl", tmp_path / "out.jsonl", **options)  # type: ignore
        text = (tmp_path / "out.jsonl").read_text()
        return SimpleNamespace(tally=tally, text=text, asked=pipeline.calls,
                               lines=[json.loads(line) for line in text.splitlines()])  # fmt: skip

    return go


def _request(text: str, **fields: Any) -> str:
    return json.dumps({"prompt": text, **fields})


def test_batch_answers_in_order_and_one_failure_is_one_line(batch: Batch) -> None:
    first = _request("a", id="x", top_k=1, generate_config={"top_k": 5, "seed": 1})
    others = [_request("b", urls=["u"]), _request("c", generate_config=3)]
    lines = [first, "{torn", "", _request("fail"), "[]", *others, "{}{}"]
    done = batch(lines)
    assert [line["line"] for line in done.lines] == [1, 2, 4, 5, 6, 7, 8]
    assert [line.get("response") for line in done.lines] == ["A", None, None, None, "B", None, None]
    messages = [line["error"]["message"] for line in done.lines if "error" in line]
    assert "line 2 is not valid JSON" in messages[0]
    assert messages[1] == "no picture"
    assert messages[2] == "line 5 is list, expected an object"
    assert "line 7: generate_config is 3" in messages[3]
    assert "line 8 is not valid JSON" in messages[4]
    assert done.lines[0]["id"] == "x" and done.lines[2]["error"]["name"] == "903_MM_PROCESS_ERROR"
    assert done.asked[0] == {"prompt": "a", "generate_config": {"top_k": 1, "seed": 1}}
    assert (done.tally.total, done.tally.done, done.tally.failed) == (7, 7, 5)


def test_batch_goes_on_wherever_it_was_killed(batch: Batch, tmp_path: Path) -> None:
    lines = [_request(f"text {i}") for i in range(4)]
    whole = batch(lines).text
    output = tmp_path / "out.jsonl"
    for cut in range(len(whole)):
        output.write_text(whole[:cut])
        done = batch()
        assert done.text == whole
        assert len(done.asked) == 4 - whole[:cut].count("\n")
    assert batch().asked == []  # nothing left: the model is not even opened


def test_batch_notices_a_changed_input(batch: Batch, tmp_path: Path) -> None:
    first = [_request("a"), _request("b")]
    before = batch(first).text
    for changed in (["x", first[1]], [first[0]], ["", *first]):
        with pytest.raises(UserError, match="has changed since|more answers than"):
            batch(changed)
        assert (tmp_path / "out.jsonl").read_text() == before
    assert [line["response"] for line in batch([*first, _request("c")]).lines] == ["A", "B", "C"]
    assert [line["response"] for line in batch([_request("d")], force=True).lines] == ["D"]


def test_batch_never_touches_a_file_that_is_not_its_own(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("my notes\nand more\n")
    with pytest.raises(UserError, match="none of `rtp-llm batch`"):
        batch([_request("a"), _request("b")])
    assert (tmp_path / "out.jsonl").read_text() == "my notes\nand more\n"
    with pytest.raises(UserError, match="both input and output"):
        run(Echo, tmp_path / "in.jsonl", tmp_path / "in.jsonl")  # type: ignore[arg-type]


def test_batch_writes_arrays_as_json() -> None:
    import numpy as np

    from rtp_llm.runtime.batch import _answer, _plain

    output = GenerateOutput(loss=np.array([np.nan, 1.5]), logits=np.float32([[1, -np.inf]]))
    text = json.dumps(_answer(GenerateResponse(["a"], [output], True)), default=_plain, allow_nan=False)
    assert json.loads(text)["loss"] == [None, 1.5]
    assert json.loads(text)["logits"] == [[1.0, None]]


def test_batch_command(echo: Echo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(_request("a") + "\n")
    assert cli.main(["batch", "b", str(source), str(target)]) == 0
    assert f"1 answers in {target}, 0 failed" in capsys.readouterr().err
    source.write_text(_request("a") + "\n" + _request("fail") + "\n")
    assert cli.main(["batch", "b", str(source), str(target), "--quiet"]) == 1
    assert capsys.readouterr() == ("", "")


# --------------------------------------------------------------------------------- with the sample


def test_inspect(qwen_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(qwen_bundle), "--hashes"]) == 0
    screen = capsys.readouterr().out
    assert "qwen_vl, QWenLMHeadModel" in screen and "pixels uint8" in screen
    assert len(screen.splitlines()) <= 60
    assert cli.main(["inspect", str(qwen_bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["family"] == "qwen_vl"


@pytest.mark.parametrize("name", ["qwen_bundle", "llava_bundle"])
def test_chat_sees(
    name: str, request: pytest.FixtureRequest, red_circle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = request.getfixturevalue(name)
    args = ["chat", str(bundle), "--image", str(red_circle), "--temperature", "0", "What is this?"]
    assert cli.main(args) == 0
    assert capsys.readouterr().out == "a red circle\n"


def test_batch_sees(qwen_bundle: Path, red_circle: Path, tmp_path: Path) -> None:
    prompt = "Picture 1:<img/>\nWhat is this?"
    content = [
        {"type": "image_url", "image_url": {"url": str(red_circle)}},
        {"type": "text", "text": "What is this?"},
    ]
    lines: list[dict[str, Any]] = [
        {"prompt": prompt, "urls": [str(red_circle)], "top_k": 1, "calculate_loss": 2},
        {"prompt": prompt, "urls": ["no such file.png"]},
        {"messages": [{"role": "user", "content": content}], "top_k": 1, "num_return_sequences": 2},
        {"prompt": prompt, "urls": []},
        {"prompt": prompt, "urls": [str(red_circle)], "nonsense": 1},
        {"messages": 7},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    assert cli.main(["batch", str(qwen_bundle), *files, "--quiet"]) == 1
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert None in out[0]["loss"]  # the image's slots have none
    assert out[0]["response"] == "a red circle" and out[2]["response"] == ["a red circle"] * 2
    assert [("error" in line) for line in out] == [False, True, False, True, True, True]
    assert "nonsense" in out[4]["error"]["message"]


def test_export_is_not_done_twice(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["export", "--checkpoint", str(checkpoints / "llava"), "--output", str(tmp_path / "b")]
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'b'}\n" and "tracing" in err
    assert cli.main([*args, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["precision"] == "fp32" and "already the export" in err
    assert cli.main([*args, "--force", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
