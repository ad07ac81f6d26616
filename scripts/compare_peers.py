"""This project beside its peers: the same random weights, prompts and precision, on a CPU, in turns.

    python scripts/compare_peers.py setup FOLDER     # virtual environments; llama.cpp is built for 15 minutes
    python scripts/compare_peers.py run FOLDER --precision int4
    python scripts/compare_peers.py run FOLDER --precision int4 --image
    python scripts/compare_peers.py report FOLDER --output benchmarks/peers.md

Every peer is a process with an environment of its own (scripts/peers/, a file each) and stays loaded; the
others stand still (SIGSTOP) while one is asked. Who begins changes from round to round. A ratio is of one
round: the peer's seconds over ours. `run` adds its rounds to FOLDER/results.json, so that several short runs
make one measurement, until the file is deleted. Who cannot be installed, loaded or asked, or dies, is
reported with the reason; the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import serving
from PIL import Image

HERE = Path(__file__).resolve().parent / "peers"
LIMIT_S = 600  # of one question
SHORT = 32  # tokens of each prompt of several streams
TEXT = "What is this picture about?"
# of results.json's times: what it is, and of how many tokens
TIMES = {
    "prefill": "prefill of {prompt} tokens, s",
    "decode": "decode, tokens/s",
    "streams": "decode of {streams} streams, tokens/s",
    "picture": "time to first token with a picture, s",
}


@dataclass(frozen=True)
class Peer:
    title: str
    file: str
    how: str
    packages: tuple[str, ...] = ()  # of its environment; none: it runs in ours
    writes: bool = True  # files of its own, before it can load


PEERS = {
    "ours": Peer(
        "this project", "ours.py",
        "Pipeline with its default options; the tower in int8 beside int4, else in float32",
    ),
    "llamacpp": Peer(
        "llama.cpp", "llamacpp.py",
        "Q4_0 or Q8_0 in every matrix, Q8_0 in the tower's; streams are sequences of one llama_decode, as "
        "its server's slots are, without HTTP",
        ("llama-cpp-python", "gguf", "numpy"),
    ),
    "openvino": Peer(
        "OpenVINO GenAI", "ov.py",
        "optimum-intel's defaults but symmetric blocks of 32 at int4; embeddings, head and tower in 8 bits; "
        "computes in bfloat16 where the CPU has it, its cache in 8 bits; continuous batching",
        ("openvino-genai", "optimum-intel", "nncf", "accelerate"),
    ),
    "genai": Peer(
        "ONNX Runtime GenAI", "genai.py", "its model builder's defaults; embeddings in float32",
        ("onnxruntime-genai", "torch", "transformers", "onnx-ir", "numpy"),
    ),
    "torchao": Peer(
        "transformers with torchao", "hf.py",
        "eager, in bfloat16; the linear layers' weights at int4 or int8, neither embeddings nor the tower's",
        ("torch", "transformers", "torchao", "pillow"), writes=False,
    ),
    "transformers": Peer("transformers, float32", "hf.py", "eager", writes=False),
}  # fmt: skip
Questions = dict[str, dict[str, Any]]  # what is asked → with what


class Failed(Exception):
    """Why a peer cannot."""


def python_of(name: str, folder: Path) -> Path:
    return folder / "venvs" / name / "bin" / "python" if PEERS[name].packages else Path(sys.executable)


def setup(folder: Path, names: list[str]) -> None:
    for name in names:
        if packages := PEERS[name].packages:
            venv.create(folder / "venvs" / name, with_pip=True)
            command = [python_of(name, folder), "-m", "pip", "install", *packages]
            settings = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
            if subprocess.run(command, env=settings).returncode:
                print(f"{name}: pip failed", file=sys.stderr)


class Worker:
    """A peer's process: loaded when made, and still until it is asked. Raises Failed."""

    def __init__(self, name: str, folder: Path, precision: str, image: bool, threads: int):
        if name == "transformers":
            precision = "fp32"
        python = python_of(name, folder)
        if not python.exists():
            raise Failed("not installed: compare_peers.py setup")
        program = [python, HERE / PEERS[name].file]
        model = [folder, precision]
        # what libraries take for the number of threads unless told
        settings = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        log = open(folder / f"{name}.log", "w")
        for part in range(image + 1 if PEERS[name].writes else 0):
            done = folder / f"prepared-{name}-{precision}-{part}"
            if not done.exists():
                print(f"{name}: being prepared", file=sys.stderr)
                command = [*program, "prepare", *model, str(part)]
                if subprocess.run(command, stdout=log, stderr=log, env=settings).returncode:
                    raise Failed(f"not prepared: {last_line(log.name)}")
                done.touch()
        self.log = log.name
        command = [*program, "serve", *model, str(threads), str(int(image))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=settings
        )
        try:
            self.versions = self._answer()["versions"]
        except Failed:
            self.close()
            raise

    def ask(self, do: str, **question: Any) -> dict[str, Any]:
        """Raises Failed with the worker's reason."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.send_signal(signal.SIGCONT)
            self.process.stdin.write(json.dumps({"do": do, **question}).encode() + b"\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], LIMIT_S)[0]:
            self.close()
            raise Failed(f"no answer within {LIMIT_S} s")
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"its process ended with status {self.process.wait()}: {last_line(self.log)}")
        self.process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "reason" in answer:
            raise Failed(answer["reason"])
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def last_line(file: str) -> str:
    lines = Path(file).read_text(errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else "it said nothing"


class Results:
    """FOLDER/results.json: a list of measurements, one of each precision and kind, that grow by rounds."""

    def __init__(self, folder: Path):
        self.file = folder / "results.json"
        self.all: list[dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else []

    def of(self, **what: Any) -> dict[str, Any]:
        for one in self.all:
            if what.items() <= one.items():
                return one
        self.all.append({**what, "rounds": [], "facts": {}, "reasons": {}})
        return self.all[-1]

    def save(self) -> None:
        self.file.write_text(json.dumps(self.all, indent=1) + "\n")


def measure(folder: Path, names: list[str], args: argparse.Namespace) -> None:
    facts = json.loads((folder / "model.json").read_text())
    results = Results(folder)
    mine = results.of(
        precision=args.precision, image=args.image, threads=args.threads, prompt=args.prompt_tokens,
        streams=args.streams,
    )  # fmt: skip
    workers: dict[str, Worker] = {}

    def ask(name: str, do: str, **question: Any) -> dict[str, Any]:
        """The answer, or {} and the reason noted; a peer that is dead is asked no more."""
        if name not in workers:
            return {}
        try:
            return workers[name].ask(do, **question)
        except Failed as e:
            mine["reasons"].setdefault(name, {})[do] = str(e)
            print(f"{name}, {do}: {e}", file=sys.stderr)
            if workers[name].process.poll() is not None:
                del workers[name]
            return {}

    try:
        for name in names:
            mine["reasons"].pop(name, None)
            try:
                workers[name] = Worker(name, folder, args.precision, args.image, args.threads)
                mine["facts"].setdefault(name, {})["versions"] = workers[name].versions
            except Failed as e:
                mine["reasons"][name] = {"load": str(e)}
                print(f"{name}: {e}", file=sys.stderr)
        for turn in range(-1, args.rounds):  # the first warms up
            rng = random.Random(f"{args.precision} {len(mine['rounds'])} {turn}")
            make = picture if args.image else texts
            questions = make(folder, facts, args, rng)
            begins = turn % len(names)
            found: dict[str, dict[str, float]] = {}
            for do, question in questions.items():
                for name in [*names[begins:], *names[:begins]]:
                    found.setdefault(name, {}).update(ask(name, do, **question))
            if turn >= 0:
                mine["rounds"].append({name: times for name, times in found.items() if times})
            results.save()
            print(f"round {turn + 1}: {json.dumps(found)}", file=sys.stderr)
        for name in list(workers):
            mine["facts"][name]["memory"] = ask(name, "memory")
        if not args.image:
            ids = ids_of(facts, args.prompt_tokens, random.Random("logits"))
            expected = reference(folder, ids, args.threads, workers.get("transformers"))
            for name in list(workers):
                mine["facts"][name] |= ask(name, "size") | divergence(ask(name, "logits", ids=ids), expected)
    finally:
        for worker in workers.values():
            worker.close()
        results.save()


def ids_of(facts: dict[str, int], count: int, rng: random.Random) -> list[int]:
    """Words; neither the special tokens at the table's start nor the picture's at its end."""
    return [rng.randrange(3, facts["vocabulary"] - 1) for _ in range(count)]


def texts(folder: Path, facts: dict[str, int], args: argparse.Namespace, rng: random.Random) -> Questions:
    short, n = min(SHORT, args.prompt_tokens), args.new_tokens
    return {
        "generate": {"ids": ids_of(facts, args.prompt_tokens, rng), "n": n},
        "streams": {"prompts": [ids_of(facts, short, rng) for _ in range(args.streams)], "n": n},
    }


def picture(folder: Path, facts: dict[str, int], args: argparse.Namespace, rng: random.Random) -> Questions:
    """One that nobody has seen."""
    edge = facts["edge"]
    Image.frombytes("RGB", (edge, edge), rng.randbytes(3 * edge * edge)).save(folder / "picture.png")
    return {"picture": {"path": str(folder / "picture.png"), "text": TEXT}}


def reference(folder: Path, ids: list[int], threads: int, loaded: Worker | None) -> np.ndarray:
    """transformers' float32 logits of the last position, kept in FOLDER."""
    file = folder / f"reference-{len(ids)}.npy"
    if not file.exists():
        worker = loaded or Worker("transformers", folder, "fp32", False, threads)
        np.save(file, worker.ask("logits", ids=ids)["logits"])
        if not loaded:
            worker.close()
    return np.load(file)


def divergence(answer: dict[str, list[float]], expected: np.ndarray) -> dict[str, float]:
    if not answer:
        return {}
    found, norm = np.array(answer["logits"]), np.linalg.norm
    cosine = found @ expected / (norm(found) * norm(expected))
    return {"cosine": float(cosine), "error": float(norm(found - expected) / norm(expected))}


def cell(key: str, name: str, one: dict[str, Any]) -> str:
    """The median, and how many times faster ours is: median, least and most of the rounds with both."""
    own = [r[name][key] for r in one["rounds"] if key in r.get(name, {})]
    if not own:
        return "–"
    many = {"decode": 1, "streams": one["streams"]}.get(key)
    value = statistics.median(own)
    text = f"{many / value:.1f}" if many else f"{value:.2f}"
    both = [r for r in one["rounds"] if key in r.get(name, {}) and key in r.get("ours", {})]
    ratios = [r[name][key] / r["ours"][key] for r in both]
    if name == "ours" or not ratios:
        return text
    return f"{text}; {statistics.median(ratios):.2f}× ({min(ratios):.2f} to {max(ratios):.2f})"


def table(one: dict[str, Any], parameters: int) -> str:
    keys = ["picture"] if one["image"] else ["prefill", "decode", "streams"]
    heads = [TIMES[key].format(**one) for key in keys] + ["peak memory (files in it at the end), GB"]
    if not one["image"]:
        heads += ["bits per weight", "logits against float32: cosine, relative error"]
    rows = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, peer in PEERS.items():
        facts = one["facts"].get(name, {})
        if not any(name in r for r in one["rounds"]):
            continue
        cells = [cell(key, name, one) for key in keys]
        memory = facts.get("memory")
        cells.append(f"{memory['peak'] / 1e9:.2f} ({memory['file'] / 1e9:.2f})" if memory else "–")
        if not one["image"]:
            cells.append(f"{8 * facts['bytes'] / parameters:.2f}" if "bytes" in facts else "–")
            cells.append(f"{facts['cosine']:.4f}, {facts['error']:.3f}" if "cosine" in facts else "–")
        rows.append(f"| {peer.title} | {' | '.join(cells)} |")
    why = [
        f"- {PEERS[name].title}, {do}: {reason}"
        for name, reasons in one["reasons"].items() for do, reason in reasons.items()
    ]  # fmt: skip
    return "\n".join([*rows, "", f"Rounds: {len(one['rounds'])}.", *why])


def report(folder: Path, output: Path | None) -> None:
    parameters = json.loads((folder / "model.json").read_text())["parameters"]
    results = Results(folder).all
    parts = []
    for one in results:
        kind = "a whole LLaVA with one picture" if one["image"] else "the language model"
        parts.append(f"## {one['precision']}, {kind}\n\n{table(one, parameters)}")
    versions = {n: f["versions"] for one in results for n, f in one["facts"].items() if "versions" in f}
    parts.append("\n".join(f"- {PEERS[n].title}: {text}; {PEERS[n].how}." for n, text in versions.items()))
    body = "\n\n".join(parts)
    print(body)
    if output:
        about = (
            f"{parameters / 1e9:.2f} billion parameters of language model, {results[0]['threads']} threads. "
            "Behind a value: how many times faster this project is, the median of the rounds and their range."
        )
        output.write_text(serving.report("This project and its peers", about, body))
        output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["setup", "run", "report"])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER",
                        help=f"of {', '.join(PEERS)}")  # fmt: skip
    parser.add_argument("--precision", choices=["int4", "int8", "fp32"], default="int4")
    parser.add_argument("--image", action="store_true", help="the whole LLaVA, one picture, one token")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=["1b", "0.1b", "tiny"], default="1b")
    parser.add_argument("--prompt-tokens", type=int, default=576)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, metavar="FILE", help="of report; a .json beside it")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers end too
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if args.command == "setup":
        setup(folder, args.only)
    elif args.command == "run":
        if not (folder / "model.json").is_file():
            sys.path.append(str(HERE))
            from model import make

            make(folder, args.size)
        measure(folder, args.only, args)
    else:
        report(folder, args.output)


if __name__ == "__main__":
    main()
