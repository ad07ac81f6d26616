"""Train the two sample checkpoints, from nothing, on drawn shapes.

    python scripts/train_sample.py                      both, into tests/checkpoints/
    python scripts/train_sample.py --only qwen_vl
    python scripts/train_sample.py --eval               only measure what is there
    python scripts/train_sample.py --quick --output /tmp/smoke

Trained together from nothing, tower and decoder learn colours and no shapes. So: the tower first,
where every patch is told what covers it (shape, colour, place, box); LLaVA's tower starts from a
copy of it. Then the decoder with the resampler or projector, the tower frozen; at last all
together. The resampler starts as a map: each of its 256 queries looks at its own place.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import shapes
import torch
import torch.nn.functional as F
from sample_model import (
    GRID,
    HEADS,
    HIDDEN,
    LAYERS,
    PATCH,
    ROOT,
    SIZE,
    WIDTH,
    LlavaPrompts,
    Prompts,
    QwenPrompts,
    Sample,
    copy_tower,
    read_checkpoint,
    start_tower,
    write_checkpoint,
)
from torch import Tensor, nn

from rtp_llm.export.vision import LlavaVision, QwenVisual

BINS, IGNORED = 24, -100
MAX_OBJECTS = 3
SPOTS = 4  # a side, in every patch, for the outlines


@dataclass(frozen=True)
class Budget:
    """How much of everything: scenes drawn per stage, steps, rows per step."""

    scenes: int = 24_000
    tower: int = 1500
    retower: int = 300  # LLaVA's tower, from Qwen-VL's
    frozen: int = 900
    joint: int = 300
    # at last: steps, rate, share of steps with pairs, share of one-shape scenes skipped, even, shown
    drill: dict[str, list[tuple[Any, ...]]] = field(
        default_factory=lambda: {
            "qwen_vl": [
                (380, 1e-3, 0.4, 0.8),
                (800, 1.5e-3, 0.15, 0.6, True),
                (700, 2e-3, 0.25, 0.85, True),
                (480, 1.5e-3, 0.25, 0.85, True, True),
                (620, 1.5e-3, 0.4, 0.5, False, True),
            ],
            "llava": [(600, 1.2e-3, 0.5, 0.5, True), (700, 1.5e-3, 0.7, 0.8, True)],
        }
    )
    rows: int = 24
    held_out: int = 2000


QUICK = Budget(
    scenes=300,
    tower=8,
    retower=4,
    frozen=6,
    joint=3,
    rows=6,
    held_out=60,
    drill={"qwen_vl": [(3, 1e-3, 0.4, 0.8, True, True)], "llava": []},
)

# ------------------------------------------------------------------------------------------ scenes


@dataclass
class Pool:
    """Scenes as tensors for the towers, and as things for the questions."""

    pixels: Tensor  # uint8 [N, SIZE, SIZE, 3]
    owner: Tensor  # int64 [N, GRID²]: 0 background, i + 1 where thing i covers a patch
    outline: Tensor  # uint8 [N, GRID², SPOTS²]: 1 where something covers that spot of the patch
    labels: Tensor  # int64 [N, 1 + MAX_OBJECTS, 8]: shape, colour, rank, place, box; row 0 unused
    scenes: list[shapes.Scene]  # without their images

    def __len__(self) -> int:
        return len(self.scenes)


def _row(job: tuple[str, bool]) -> tuple[Any, ...]:
    name, pad = job
    scene = shapes.draw(name)
    pixels = np.array(shapes.fit(scene.image, SIZE, pad))
    ids = np.array(shapes.fit(scene.owner, SIZE, pad)).reshape(GRID, PATCH, GRID, PATCH)
    ids = ids.transpose(0, 2, 1, 3).reshape(GRID**2, PATCH**2)
    covered = np.stack([(ids == i).sum(1) for i in range(1, MAX_OBJECTS + 1)], 1)
    owner = np.where(covered.max(1) > 0.4 * PATCH**2, covered.argmax(1) + 1, 0)
    centres = np.arange(SPOTS) * PATCH // SPOTS + PATCH // SPOTS // 2
    outline = ids.reshape(-1, PATCH, PATCH)[:, centres][:, :, centres].reshape(-1, SPOTS**2) > 0
    labels = np.full((1 + MAX_OBJECTS, 8), IGNORED)
    width, height = scene.image.size
    for i, thing in enumerate(scene.things):
        labels[i + 1, :4] = (
            shapes.SHAPES.index(thing.shape),
            list(shapes.COLOURS).index(thing.colour),
            i,
            shapes.PLACES.index(thing.place) if thing.place else IGNORED,
        )
        for side, edge in enumerate(thing.box):
            if pad:  # in the padded square's coordinates
                share = (width, height)[side % 2] / max(width, height)
                edge = (1 - share) / 2 + edge * share
            labels[i + 1, 4 + side] = min(BINS - 1, int(BINS * edge))
    bare = shapes.Scene(None, None, scene.things)  # type: ignore[arg-type]
    return pixels, owner, outline, labels, bare


def draw_pool(prefix: str, count: int, pad: bool) -> Pool:
    """The scenes prefix/0 … as a tower with that fitting sees them."""
    jobs = [(f"{prefix}/{i}", pad) for i in range(count)]
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        rows = list(workers.map(_row, jobs, chunksize=128))
    *columns, scenes = zip(*rows, strict=True)
    pixels, owner, outline, labels = (torch.from_numpy(np.stack(x)) for x in columns)
    return Pool(pixels, owner.long(), outline, labels.long(), list(scenes))


# ---------------------------------------------------------------------------------------- training


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


class Descent:
    """AdamW under a warm-up and a cosine, with a line now and then."""

    def __init__(self, title: str, groups: list[tuple[list[nn.Parameter], float]], steps: int):
        self.title, self.steps, self.started = title, steps, time.time()
        self.parameters = [p for group, _ in groups for p in group]
        self.adam = torch.optim.AdamW(
            [{"params": group, "lr": rate} for group, rate in groups],
            betas=(0.9, 0.98),
            weight_decay=0.02,
        )
        warm = max(1, min(100, steps // 10))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adam,
            lambda i: min(1, (i + 1) / warm) * (0.02 + 0.49 * (1 + math.cos(math.pi * i / steps))),
        )

    def step(self, i: int, loss: Tensor, note: str = "") -> None:
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.schedule.step()
        if (i + 1) % 50 == 0 or i + 1 == self.steps:
            pace = (time.time() - self.started) / (i + 1)
            progress = f"{self.title} {i + 1}/{self.steps} loss {loss.item():.3f}"
            print(f"{progress} {note} {pace:.2f} s/step", flush=True)


HEAD = (
    1 + len(shapes.SHAPES),
    len(shapes.COLOURS),
    MAX_OBJECTS,
    len(shapes.PLACES),
    *[BINS] * 4,
    MAX_OBJECTS,
    SPOTS**2,
)  # shape or background, colour, rank from the left, place, box; how many; outline


def tower_loss(features: Tensor, head: nn.Module, pool: Pool, index: Tensor) -> tuple[Tensor, str]:
    """Every patch is to know all about the thing that covers it, and the number of things.

    And which of its spots are covered: without outlines, shapes are learned late.
    """
    logits = head(features).float().split(HEAD, -1)
    owner, labels = pool.owner[index].to(features.device), pool.labels[index].to(features.device)
    target = labels.gather(1, owner[..., None].expand(-1, -1, labels.shape[2]))  # [N, GRID², 8]
    covered = owner > 0
    kind = torch.where(covered, target[..., 0] + 1, 0)
    loss = F.cross_entropy(logits[0].flatten(0, 1), kind.flatten())
    inside = target[covered]
    right = (logits[0][covered].argmax(-1) == inside[:, 0] + 1).float().mean()
    loss = loss + 2 * F.cross_entropy(logits[0][covered], inside[:, 0] + 1)
    for column in range(1, 8):
        weight = 0.5 if column >= 4 else 1.0
        value = F.cross_entropy(logits[column][covered], inside[:, column], ignore_index=IGNORED)
        loss = loss + weight * value
    number = owner.amax(1)[:, None].expand(-1, owner.shape[1]) - 1
    loss = loss + F.cross_entropy(logits[8].flatten(0, 1), number.flatten())
    outline = pool.outline[index].to(features.device).float()
    loss = loss + 4 * F.binary_cross_entropy_with_logits(logits[9], outline)
    return loss, f"shape {right:.3f}"


def train_tower(
    title: str,
    vision: QwenVisual | LlavaVision,
    pool: Pool,
    steps: int,
    rate: float,
    head: nn.Linear,
    device: torch.device,
) -> None:
    parameters = [p for name, p in vision.named_parameters()]
    descent = Descent(title, [(parameters, rate), (list(head.parameters()), rate)], steps)
    order = random.Random(title)
    for i in range(steps):
        index = torch.tensor(order.sample(range(len(pool)), min(48, len(pool))))
        with autocast(device):
            features = vision.encode(pool.pixels[index].to(device))
            loss, note = tower_loss(features, head, pool, index)
        descent.step(i, loss, note)


@dataclass
class Batch:
    """Rows that begin with pictures, each followed by several questions that share them.

    A question sees the pictures and itself; in a dialogue also what was said before it.
    """

    ids: Tensor  # int64 [B, T]; −1 where pictures are
    positions: Tensor  # int64 [B, T]
    mask: Tensor  # bool [B, T, T]
    answers: Tensor  # int64 [B, T]: the segment whose answer the NEXT token belongs to, or −1
    targets: Tensor  # int64 [B, T]: the next token
    pictures: list[int]  # of the pool, in the order of the rows


Row = tuple[tuple[int, ...], list[shapes.Question]]  # pictures in the pool, what is asked


def pack(
    prompts: Prompts,
    rows: list[Row],
    per_picture: int,
    forms: tuple[str, ...],
    rng: random.Random,
    dialogues: float,
    device: torch.device,
) -> Batch:
    sequences = []
    for pictures, asked in rows:
        form = rng.choice(forms)
        dialogue = form != "raw" and rng.random() < dialogues
        ids = prompts.prefix(form, len(pictures), per_picture, rng)
        start = len(ids)
        segments, positions, answer = [0] * start, list(range(start)), [-1] * start
        for s, q in enumerate(asked):
            before, after = prompts.turn(form, q.text, q.answer, first=s == 0 or not dialogue)
            ids = ids + before + after
            first = positions[-1] + 1 if dialogue else start
            positions += range(first, first + len(before) + len(after))
            segments += [0 if dialogue else s + 1] * (len(before) + len(after))
            answer += [-1] * (len(before) - 1) + [s]  # where the answer's first token is foretold
            answer += [s] * (len(after) - 1) + [-1]
        sequences.append((ids, positions, segments, answer))
    length = max(len(ids) for ids, *_ in sequences)
    length = -(-length // 32) * 32  # few different shapes: every new one costs compilation
    table = torch.zeros(4, len(rows), length, dtype=torch.long)
    table[2:] = -1
    for b, columns in enumerate(sequences):
        table[:, b, : len(columns[0])] = torch.tensor(columns)
    ids, positions, segments, answers = table
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    mask = same & torch.ones(length, length, dtype=torch.bool).tril()
    targets = torch.cat([ids[:, 1:], ids[:, :1] * 0], 1)
    tensors = [t.to(device) for t in (ids, positions, mask, answers, targets)]
    return Batch(*tensors, pictures=[p for pictures, _ in rows for p in pictures])


def answer_logits(sample: Sample, batch: Batch, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and targets at the places of answers, in row order."""
    x = sample.decoder(sample.splice(batch.ids, features), batch.positions, batch.mask)
    place = batch.answers >= 0
    return sample.decoder.head(x[place]).float(), batch.targets[place]


def ask(
    prompts: Prompts, pool: Pool, count: int, rng: random.Random, pairs: float, skipped: float
) -> list[Row]:
    """One step's rows: one picture each with up to five questions; or pairs, with that chance."""
    if rng.random() < pairs:
        rows: list[Row] = []
        while len(rows) < max(1, count // 2):
            a, b = rng.randrange(len(pool)), rng.randrange(len(pool))
            if asked := shapes.which(pool.scenes[a], pool.scenes[b]):
                rows.append(((a, b), asked))
        return rows
    rows = []
    for _ in range(count):
        i = rng.randrange(len(pool))
        while skipped and len(pool.scenes[i].things) == 1 and rng.random() < skipped:
            i = rng.randrange(len(pool))
        asked = shapes.questions(pool.scenes[i], locate=not prompts.pad)
        rest = rng.sample(asked[1:], min(4, len(asked) - 1))
        asked = [asked[0], *rest]
        rng.shuffle(asked)
        rows.append(((i,), asked))
    return rows


def train_answers(
    title: str,
    sample: Sample,
    pool: Pool,
    steps: int,
    rate: float,
    tower_rate: float,
    count: int,
    device: torch.device,
    pairs: float = 0.2,
    skipped: float = 0.0,
    even: bool = False,
    shown: bool = False,
) -> None:
    tower, per_picture = sample.tower(), sample.vision.tokens
    known = {id(p) for p in tower}
    groups = [([p for p in sample.parameters() if id(p) not in known], rate)]
    if tower_rate:
        groups.append((tower, tower_rate))
    for parameter in tower:
        parameter.requires_grad_(tower_rate > 0)
    # Which of two pictures a row is from is in no row at the start, and the answers alone teach it
    # late: so where pairs are practised, the first layer's output is to tell.
    teller, early = nn.Linear(HIDDEN, 1).to(device), []
    groups.append((list(teller.parameters()), rate))
    hook = sample.decoder.blocks[0].register_forward_hook(lambda *seen: early.append(seen[2]))
    late: list[tuple[Tensor, ...]] = []
    look = sample.decoder.blocks[-1].register_forward_pre_hook(lambda _, seen: late.append(seen))
    descent, rng = Descent(title, groups, steps), random.Random(title)
    for i in range(steps):
        asked = ask(sample.prompts, pool, count, rng, pairs, skipped)
        batch = pack(
            sample.prompts,
            asked,
            per_picture,
            sample.prompts.forms,
            rng,
            0.15,
            device,
        )
        with autocast(device):
            features = sample.vision.encode(pool.pixels[batch.pictures].to(device))
            logits, targets = answer_logits(sample, batch, features)
        loss = F.cross_entropy(logits, targets, reduction="none")
        if even:  # every answer counts the same: the digits of boxes do not drown one word
            segment = batch.answers + 1000 * torch.arange(len(batch.ids), device=device)[:, None]
            _, which, sizes = segment[batch.answers >= 0].unique(
                return_inverse=True, return_counts=True
            )
            loss = loss / sizes[which] * len(loss) / len(sizes)
        loss = loss.mean()
        rows = batch.ids < 0
        second = (rows.cumsum(1) > per_picture)[rows].float()
        told = teller(early.pop()[rows].float()).squeeze(-1)
        if pairs > 0.2:
            loss = loss + 0.3 * F.binary_cross_entropy_with_logits(told, second)
        if shown and len(asked[0][0]) == 1:
            with autocast(device):
                things = named_things(asked, batch, pool, rng)
                loss = loss + 0.5 * look_loss(sample.decoder.blocks[-1], late[-1], batch, things)
        late.clear()
        right = (logits.argmax(-1) == targets).float().mean()
        marked = ((told > 0) == (second > 0)).float().mean()
        descent.step(i, loss, f"tokens {right:.3f} picture {marked:.3f}")
    hook.remove()
    look.remove()


def named_things(
    asked: list[Row], batch: Batch, pool: Pool, rng: random.Random
) -> list[tuple[int, int, Tensor]]:
    """Where an answer about a named shape is foretold, and which of the picture's rows show it.

    (row of the batch, token, bool [rows of a picture]); at most four tokens of an answer.
    """
    found = []
    side = math.isqrt(int((batch.ids[0] < 0).sum()))
    for b, (pictures, questions) in enumerate(asked):
        owner = pool.owner[pictures[0]].view(1, 1, GRID, GRID).float()
        owner = F.interpolate(owner, (side, side)).flatten()
        for s, q in enumerate(questions):
            if q.kind not in ("colour", "where", "locate"):
                continue
            things = pool.scenes[pictures[0]].things
            thing = next(i for i, thing in enumerate(things) if thing.shape in q.text)
            if not (here := owner == thing + 1).any():
                continue
            tokens = (batch.answers[b] == s).nonzero().flatten().tolist()
            found += [(b, t, here) for t in rng.sample(tokens, min(4, len(tokens)))]
    return found


def look_loss(
    block: nn.Module, seen: tuple[Tensor, ...], batch: Batch, things: list[tuple[int, int, Tensor]]
) -> Tensor:
    """Two heads of a block are to look at the thing that is asked about: −log of their attention."""
    x, cos, sin, mask = seen[:4]
    b, t = (torch.tensor(column, device=x.device) for column in list(zip(*things, strict=True))[:2])
    here = torch.stack([h for *_, h in things]).to(x.device)
    qkv = block.qkv(block.norm_1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)[:2, :, :2]
    q, k = (
        h * cos + torch.cat([-h.chunk(2, -1)[1], h.chunk(2, -1)[0]], -1) * sin for h in qkv.float()
    )
    scores = torch.einsum("nhd,nhkd->nhk", q[b, :, t], k[b]) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask[b, 0, t][:, None], -torch.inf)
    rows = torch.zeros_like(batch.ids[b], dtype=torch.bool)
    rows[batch.ids[b] < 0] = here.flatten()
    share = scores.log_softmax(-1).masked_fill(~rows[:, None], -torch.inf).logsumexp(-1)
    return -share.mean()


# ------------------------------------------------------------------------------------- measurement


@torch.inference_mode()
def measure(sample: Sample, count: int, device: torch.device) -> dict[str, Any]:
    """Share of right answers by form and kind of question, on held-out scenes.

    Greedy decoding is right exactly where every token of the true answer, its end included, is the
    first choice after the ones before it: so all but boxes need no generation.
    """
    sample.to(device).eval()
    pool = draw_pool("held-out", count, sample.prompts.pad)
    rows: list[Row] = [
        ((i,), shapes.questions(scene, locate=False)) for i, scene in enumerate(pool.scenes)
    ]
    for i in range(count // 2):
        if asked := shapes.which(pool.scenes[i], pool.scenes[i + count // 2]):
            rows.append(((i, i + count // 2), asked))
    features = torch.cat(
        [sample.vision.encode(pool.pixels[i : i + 64].to(device)) for i in range(0, count, 64)]
    )
    table: dict[str, Any] = {}
    for form in sample.prompts.forms:
        scores: dict[str, list[float]] = defaultdict(list)
        rng = random.Random(f"held-out/{form}")
        for i in range(0, len(rows), 32):
            chunk = rows[i : i + 32]
            batch = pack(sample.prompts, chunk, sample.vision.tokens, (form,), rng, 0.0, device)
            logits, targets = answer_logits(sample, batch, features[batch.pictures])
            right = torch.ones_like(batch.answers, dtype=torch.bool)
            right[batch.answers >= 0] = logits.argmax(-1) == targets
            for b, (_, asked) in enumerate(chunk):
                for s, q in enumerate(asked):
                    scores[q.kind].append(float(right[b][batch.answers[b] == s].all()))
        if not sample.prompts.pad:
            scores["locate, overlap ≥ 0.5"] = locate(sample, pool, features, form, device)
        table[form] = {
            kind: {"share": round(sum(s) / len(s), 4), "of": len(s)} for kind, s in scores.items()
        }
    return table


def locate(
    sample: Sample, pool: Pool, features: Tensor, form: str, device: torch.device
) -> list[float]:
    """Generates the boxes, and scores their overlaps."""
    groups: dict[int, list[tuple[int, list[int], shapes.Box]]] = defaultdict(list)
    rng = random.Random(f"held-out/locate/{form}")
    for i, scene in enumerate(pool.scenes):
        for q in shapes.questions(scene, locate=True):
            if q.box:
                ids = sample.prompts.prefix(form, 1, sample.vision.tokens, rng)
                ids = ids + sample.prompts.turn(form, q.text, "", first=True)[0]
                groups[len(ids)].append((i, ids, q.box))
    scores = []
    for group in groups.values():  # of prompts that are equally long
        for start in range(0, len(group), 64):
            pictures, prompts, boxes = zip(*group[start : start + 64], strict=True)
            ids = torch.tensor(prompts, device=device)
            answers = generate(sample, ids, features[list(pictures)], 40)
            scores += [
                float(shapes.overlap(sample.prompts.decode(answer), box) >= 0.5)
                for answer, box in zip(answers, boxes, strict=True)
            ]
    return scores


def generate(sample: Sample, ids: Tensor, features: Tensor, limit: int) -> list[list[int]]:
    """Greedy: `limit` tokens each, as a box's end shows in the text."""
    count, length = ids.shape
    caches: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    x = sample.splice(ids, features)
    positions = torch.arange(length, device=ids.device).expand(count, -1)
    mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    mask = mask.expand(count, -1, -1)
    found = []
    for step in range(limit):
        x = sample.decoder(x, positions, mask, caches)[:, -1:]
        found.append(sample.decoder.head(x).argmax(-1))
        x = sample.decoder.embed(found[-1])
        positions = torch.full((count, 1), length + step, device=ids.device)
        mask = torch.ones(count, 1, length + step + 1, dtype=torch.bool, device=ids.device)
    return torch.cat(found, 1).tolist()


def show(name: str, table: dict[str, Any]) -> str:
    """The accuracy table, in Markdown."""
    forms = list(table)
    lines = [
        f"| {name} | " + " | ".join(forms) + " | questions |",
        "| --- |" + " ---: |" * (len(forms) + 1),
    ]
    for kind, cell in table[forms[0]].items():
        shares = " | ".join(f"{100 * table[form][kind]['share']:.1f} %" for form in forms)
        lines.append(f"| {kind} | {shares} | {cell['of']} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ stages


def train(family: str, budget: Budget, work: Path, device: torch.device) -> Sample:
    """All stages of one family, in order; what `work` holds of them is read, not done again."""

    def stage(name: str, sample: Sample, run: Callable[[], None]) -> None:
        path = work / f"{name}.pt"
        if path.exists():
            sample.load_state_dict(torch.load(path, weights_only=True, map_location=device))
            return
        torch.manual_seed(sum(name.encode()))
        run()
        work.mkdir(parents=True, exist_ok=True)
        torch.save(sample.state_dict(), path)

    def pool(prefix: str, pad: bool) -> Pool:
        return draw_pool(f"train/{prefix}", budget.scenes, pad)

    def answers(sample: Sample, name: str) -> None:
        scenes: list[Pool] = []  # drawn when first needed

        def run(part: str, steps: int, rate: float, tower_rate: float, *mixture: Any) -> None:
            scenes[:] = scenes or [pool(name, sample.prompts.pad)]
            title, drawn = f"{name} {part}", scenes[0]
            train_answers(
                title, sample, drawn, steps, rate, tower_rate, budget.rows, device, *mixture
            )

        stage(f"{name}-frozen", sample, lambda: run("frozen", budget.frozen, 2e-3, 0.0))
        stage(f"{name}-joint", sample, lambda: run("joint", budget.joint, 6e-4, 1e-4))
        for i, (steps, rate, *mixture) in enumerate(budget.drill[name]):
            part = "pairs" + str(i + 1) * (i > 0)
            stage(f"{name}-{part}", sample, partial(run, part, steps, rate, 0.0, *mixture))

    torch.manual_seed(1)
    qwen = Sample(QwenPrompts.trained()).to(device)
    start_tower(qwen.vision)
    head = nn.Linear(WIDTH, sum(HEAD)).to(device)
    stage(
        "tower",
        qwen,
        lambda: train_tower(
            "tower", qwen.vision, pool("tower", False), budget.tower, 1.5e-3, head, device
        ),
    )
    if family == "qwen_vl":
        answers(qwen, "qwen_vl")
        return qwen
    torch.manual_seed(2)
    llava = Sample(LlavaPrompts.trained()).to(device)
    copy_tower(qwen.vision, llava.vision)
    head = nn.Linear(WIDTH, sum(HEAD)).to(device)
    stage(
        "llava-tower",
        llava,
        lambda: train_tower(
            "llava tower",
            llava.vision,
            pool("llava-tower", True),
            budget.retower,
            5e-4,
            head,
            device,
        ),
    )
    answers(llava, "llava")
    return llava


CARD = """---
license: apache-2.0
---
# {name}

A tiny vision-language model in the exact layout of {layout}, for trying and testing an exporter
and a runtime where no real checkpoint can be had. **It knows drawn shapes only**: one to three
circles, squares, triangles and stars, in eight colours, on plain, gradient and noisy backgrounds.
About anything else it answers nonsense.

It answers "What is this?", "How many shapes are there?", "What colour is the star?", "Where is
the star?" (left, right, top, bottom, centre) and, with two pictures, "Which picture has the
star?"{extra}; as a raw prompt and as a chat turn ({forms}).

Made from nothing, tokenizer included, by

    python scripts/train_sample.py

on scenes that the script draws itself: no other data, no other model. {notes}Weights are float16.
The weights here were trained stage by stage (`--work` kept what was finished) while the last stages
were still being chosen; every stage has a seed of its own, but one run from start to end has not
been repeated.
Licence: Apache-2.0.

Share of exactly right greedy answers on {count} held-out scenes, measured {date} on {machine}
(also in accuracy.json):

{table}
"""

UNTRAINED = """The CLIP folder's text half, and
its last vision layer, which LLaVA does not run, are random. """


def publish(folder: Path, count: int, device: torch.device) -> None:
    """Measures what is on disk; writes its accuracy.json and card; prints the table."""
    sample = read_checkpoint(folder)
    table = measure(sample, count, device)
    date = datetime.date.today().isoformat()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {device.type}"
    report = {"held_out_scenes": count, "date": date, "machine": machine, "forms": table}
    (folder / "accuracy.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    name, qwen = sample.prompts.name, not sample.prompts.pad
    card = CARD.format(
        name=name,
        count=count,
        date=date,
        machine=machine,
        table=show(name, table),
        forms=", ".join(sample.prompts.forms),
        layout="Qwen-VL-Chat" if qwen else "the original LLaVA-1.5, with its CLIP tower beside it",
        extra=', and "Locate the star." with a box' if qwen else "",
        notes="" if qwen else UNTRAINED,
    )
    (folder / "README.md").write_text(card)
    print(show(name, table), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("qwen_vl", "llava"))
    parser.add_argument("--output", type=Path, default=ROOT / "tests" / "checkpoints")
    parser.add_argument(
        "--work", type=Path, help="where finished stages stay, so that a run goes on"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a smoke run: learns nothing")
    parser.add_argument("--eval", action="store_true", help="measure the checkpoints in --output")
    arguments = parser.parse_args()
    budget, device = QUICK if arguments.quick else Budget(), torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as passing:
        work = arguments.work or Path(passing)
        for family in [arguments.only] if arguments.only else ["qwen_vl", "llava"]:
            folder = arguments.output / f"{family}_shapes"
            if not arguments.eval:
                write_checkpoint(train(family, budget, work, device), folder)
            publish(folder, budget.held_out, device)


if __name__ == "__main__":
    main()
