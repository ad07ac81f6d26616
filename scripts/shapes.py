"""Scenes of drawn shapes, and the questions about them: what the sample checkpoints know.

A scene is a function of its name alone: the training script draws names that begin with "train/",
the measurement names that begin with "held-out/", so neither can meet the other's scenes.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (215, 35, 35),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 40),
    "green": (40, 160, 60),
    "blue": (35, 80, 215),
    "purple": (135, 45, 165),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
PLACES = ("left", "right", "top", "bottom", "centre")
NUMBERS = ("one", "two", "three")
SIZES = ((0.25, 0.6), (0.25, 0.45), (0.25, 0.38))  # of the longer side, with 1, 2, 3 shapes
PAD = (122, 116, 104)  # LLaVA's canvas

Box = tuple[
    float, float, float, float
]  # left, top, right, bottom, as shares of the picture's sides
RGB = tuple[int, ...]


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    box: Box

    @property
    def name(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"

    @property
    def place(self) -> str | None:
        """In one word; None where people would not agree on the word."""
        dx = (self.box[0] + self.box[2]) / 2 - 0.5
        dy = (self.box[1] + self.box[3]) / 2 - 0.5
        near, far = sorted((abs(dx), abs(dy)))
        if far < 0.11:
            return "centre"
        if far < 0.17 or far - near < 0.07:
            return None
        if far == abs(dx):
            return "left" if dx < 0 else "right"
        return "top" if dy < 0 else "bottom"


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    owner: Image.Image  # "L", as large: 0 the background, i + 1 where things[i] is
    things: tuple[Thing, ...]  # from left to right


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    box: Box | None = None  # of "locate": scored by its overlap


# ----------------------------------------------------------------------------------------- drawing


def draw(name: str, things: list[tuple[str, str]] | None = None) -> Scene:
    """The scene of that name; `things` fixes the shapes and colours, from left to right."""
    rng = random.Random(name)  # of a string: from its SHA-512
    if things is None:
        count = rng.choices((1, 2, 3), (0.4, 0.3, 0.3))[0]
        things = [(rng.choice(SHAPES), rng.choice(list(COLOURS))) for _ in range(count)]
    longer = rng.randint(96, 288)
    shorter = round(longer / rng.choice((1.0, rng.uniform(1, 1.5))))
    width, height = rng.choice(((longer, shorter), (shorter, longer)))
    squares = _arrange(rng, len(things), width, height)
    colours = [_jitter(rng, COLOURS[colour]) for _, colour in things]
    image = Image.fromarray(_background(rng, width, height, colours))
    owner = Image.new("L", image.size)
    canvas, ids = ImageDraw.Draw(image), ImageDraw.Draw(owner)
    found = []
    for i, ((shape, colour), (x, y, size)) in enumerate(zip(things, squares, strict=True)):
        _shape(canvas, shape, x, y, size, colours[i])
        _shape(ids, shape, x, y, size, (i + 1,))
        box = (x / width, y / height, (x + size) / width, (y + size) / height)
        found.append(Thing(shape, colour, box))
    return Scene(image, owner, tuple(found))


def _arrange(rng: random.Random, count: int, width: int, height: int) -> list[tuple[int, int, int]]:
    """Left, top and size of squares that neither overlap nor share a column's centre."""
    longer = max(width, height)
    while True:
        squares: list[tuple[int, int, int]] = []
        for _ in range(30 * count):
            size = round(longer * rng.uniform(*SIZES[count - 1]))
            x, y = rng.randint(0, width - size), rng.randint(0, height - size)
            if all(_apart((x, y, size), other, longer) for other in squares):
                squares.append((x, y, size))
            if len(squares) == count:
                return sorted(squares, key=lambda s: s[0] + s[2] / 2)


def _apart(a: tuple[int, int, int], b: tuple[int, int, int], longer: int) -> bool:
    dx = abs(a[0] + a[2] / 2 - b[0] - b[2] / 2)
    dy = abs(a[1] + a[2] / 2 - b[1] - b[2] / 2)
    return max(dx, dy) > (a[2] + b[2]) / 2 + 0.02 * longer and dx > 0.1 * longer


def _jitter(rng: random.Random, colour: RGB) -> RGB:
    return tuple(min(255, max(0, c + rng.randint(-12, 12))) for c in colour)


def _background(rng: random.Random, width: int, height: int, colours: list[RGB]) -> np.ndarray:
    """Plain, gradient or noisy, and nowhere near one of the colours."""
    kind = rng.choice(("plain", "gradient", "noise"))
    while True:
        ends = [np.array([rng.randint(0, 255) for _ in range(3)], float) for _ in range(2)]
        if kind != "gradient":
            ends[1] = ends[0]
        way = [ends[0] + (ends[1] - ends[0]) * t for t in np.linspace(0, 1, 7)]
        if all(np.linalg.norm(c - np.array(colour)) > 95 for c in way for colour in colours):
            break
    across = rng.random() < 0.5
    ramp = (
        np.linspace(0, 1, width)[None, :, None]
        if across
        else np.linspace(0, 1, height)[:, None, None]
    )
    picture = np.broadcast_to(ends[0] + (ends[1] - ends[0]) * ramp, (height, width, 3))
    if kind == "noise":
        amplitude = rng.randint(8, 40)
        noise = np.frombuffer(rng.randbytes(height * width * 3), np.uint8)
        picture = picture + (noise.reshape(height, width, 3) / 127.5 - 1) * amplitude
    return picture.clip(0, 255).astype(np.uint8)


def _shape(canvas: ImageDraw.ImageDraw, shape: str, x: int, y: int, size: int, fill: RGB) -> None:
    colour = fill if len(fill) == 3 else fill[0]
    if shape == "circle":
        canvas.ellipse((x, y, x + size - 1, y + size - 1), fill=colour)
    elif shape == "square":
        canvas.rectangle((x, y, x + size - 1, y + size - 1), fill=colour)
    else:
        points = [(0.5, 0.0), (0.0, 1.0), (1.0, 1.0)] if shape == "triangle" else _STAR
        canvas.polygon(
            [(x + px * (size - 1), y + py * (size - 1)) for px, py in points], fill=colour
        )


def _star() -> list[tuple[float, float]]:
    """Five points, filling the unit square."""
    corners = [
        (radius * math.sin(math.pi * i / 5), -radius * math.cos(math.pi * i / 5))
        for i, radius in enumerate([1, 0.42] * 5)
    ]
    xs, ys = zip(*corners, strict=True)
    return [
        ((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys)))
        for x, y in corners
    ]


_STAR = _star()


def fit(image: Image.Image, size: int, pad: bool) -> Image.Image:
    """The picture as its tower sees it: squashed (Qwen-VL) or padded (LLaVA) to a square."""
    owner = image.mode == "L"
    if pad:
        side = max(image.size)
        square = Image.new(image.mode, (side, side), 0 if owner else PAD)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    how = Image.Resampling.NEAREST if owner else Image.Resampling.BICUBIC
    return image.resize((size, size), how)


# --------------------------------------------------------------------------------------- questions


def questions(scene: Scene, locate: bool) -> list[Question]:
    """All that can be asked about one scene; about a shape only where there is one of it."""
    names = [thing.name for thing in scene.things]
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    found = [
        Question("what, one shape" if len(names) == 1 else "what, more", "What is this?", listed),
        Question("how many", "How many shapes are there?", NUMBERS[len(names) - 1]),
    ]
    shapes = [thing.shape for thing in scene.things]
    for thing in scene.things:
        if shapes.count(thing.shape) > 1:
            continue
        found.append(Question("colour", f"What colour is the {thing.shape}?", thing.colour))
        if thing.place:
            found.append(Question("where", f"Where is the {thing.shape}?", thing.place))
        if locate:
            x1, y1, x2, y2 = (min(999, int(1000 * edge)) for edge in thing.box)
            answer = f"<ref>the {thing.shape}</ref><box>({x1},{y1}),({x2},{y2})</box>"
            found.append(Question("locate", f"Locate the {thing.shape}.", answer, thing.box))
    return found


def which(first: Scene, second: Scene) -> list[Question]:
    """About two pictures: of every shape that only one of them has."""
    has = [{thing.shape for thing in scene.things} for scene in (first, second)]
    return [
        Question(
            "which picture",
            f"Which picture has the {shape}?",
            "the first" if shape in has[0] else "the second",
        )
        for shape in SHAPES
        if (shape in has[0]) != (shape in has[1])
    ]


def overlap(answer: str, box: Box) -> float:
    """Intersection over union of a written box and the true one; 0 where none is written."""
    written = re.search(r"<box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>", answer)
    if not written:
        return 0.0
    a = [int(edge) / 1000 for edge in written.groups()]
    width = max(0.0, min(a[2], box[2]) - max(a[0], box[0]))
    height = max(0.0, min(a[3], box[3]) - max(a[1], box[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (box[2] - box[0]) * (box[3] - box[1])
    return width * height / max(areas - width * height, 1e-9)
