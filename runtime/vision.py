"""Images → embedding rows: encoded in batches over all waiting requests, kept by content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ImageWrongFormat
from ..export.bundle import VisionSpec

BATCH = 4  # images: a larger one is no faster on a CPU, and holds up who came first
ELSEWHERE = 32  # where others encode them, who spread them over what they have


@dataclass(frozen=True)
class Embedded:
    """In place of a picture: the rows that it becomes, float32 [tokens, hidden]."""

    rows: np.ndarray


def check_embeds(embeds: Any, vision: VisionSpec) -> None:
    """Raises ImageWrongFormat unless they are as the vision graph gives them: finite float32
    [N, tokens, hidden]."""
    shape = f"[N, {vision.tokens}, {vision.hidden_size}]"
    if not isinstance(embeds, np.ndarray) or embeds.dtype != np.float32:
        found = f"an array of {embeds.dtype}" if isinstance(embeds, np.ndarray) else type(embeds).__name__
        raise ImageWrongFormat(f"image_embeds is {found}, expected float32 {shape}")
    if embeds.ndim != 3 or embeds.shape[1:] != (vision.tokens, vision.hidden_size):
        raise ImageWrongFormat(f"image_embeds has shape {list(embeds.shape)}, expected {shape}")
    if bad := [i for i, rows in enumerate(embeds, 1) if not np.isfinite(rows).all()]:
        raise ImageWrongFormat(
            f"image_embeds: image {bad[0]} of {len(embeds)} holds NaN or infinity, expected finite numbers"
        )


class EmbeddingCache(Mapping[bytes, np.ndarray]):
    """Image key → float32 [tokens, hidden], least recently used out first.

    `budget` bytes bound them, but for images that live sequences hold; while those exceed it, only the
    first sequence that waits gets more. One thread calls it: the engine's. `next_batch` gives out what is
    to be encoded, one batch at a time; `put` or `fail` ends it.
    """

    def __init__(self, budget: int, batch: int = BATCH):
        self.budget = budget
        self.batch = batch
        self.bytes = 0
        self.asked = self.hits = 0  # images of all sequences; encoded already, or about to be
        self._rows: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._pixels: dict[bytes, np.ndarray] = {}  # waiting to be encoded
        self._encoding: list[bytes] = []
        self._holders: dict[bytes, int] = {}

    def __getitem__(self, key: bytes) -> np.ndarray:
        return self._rows[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def hold(self, images: Mapping[bytes, np.ndarray], counted: bool = True) -> None:
        """A sequence needs these images until `drop`: key → pixels, uint8 [size, size, 3], or what they
        become, float32 [tokens, hidden].

        Not `counted`: another answer to a request whose images were.
        """
        for key, image in images.items():
            self._holders[key] = self._holders.get(key, 0) + 1
            self.asked += counted
            if key in self._rows:
                self._rows.move_to_end(key)
            elif image.ndim == 2:
                self._keep(key, image)
                self._shrink()
            elif key not in self._encoding and key not in self._pixels:
                self._pixels[key] = image
                continue
            self.hits += counted

    def drop(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self._pixels.pop(key, None)
        self._shrink()

    def ready(self, keys: Iterable[bytes]) -> bool:
        return all(key in self._rows for key in keys)

    def next_batch(self, first: Iterable[bytes] = ()) -> tuple[list[bytes], np.ndarray]:
        """Keys and pixels, uint8 [N, size, size, 3], of the images that have waited longest.

        No keys while a batch is being encoded. Beyond the budget only those that the `first` needs.
        """
        held = sum(self._rows[k].nbytes for k in self._holders if k in self._rows)
        waiting = [k for k in (self._pixels if held < self.budget else first) if k in self._pixels]
        if self._encoding or not waiting:
            return [], np.empty(0, np.uint8)
        # equal shapes only: recipes with images of any size come as separate batches
        shape = self._pixels[waiting[0]].shape
        keys = [k for k in waiting[: self.batch] if self._pixels[k].shape == shape]
        pixels = np.stack([self._pixels[k] for k in keys])
        for key in keys:
            del self._pixels[key]
        self._encoding = keys
        return keys, pixels

    def put(self, keys: list[bytes], rows: np.ndarray) -> None:
        """`rows`: float32 [N, tokens, hidden] of the batch."""
        self._encoding = []
        for key, one in zip(keys, rows, strict=True):
            self._keep(key, one.copy())  # a view would keep the whole batch alive
        self._shrink()

    def _keep(self, key: bytes, rows: np.ndarray) -> None:
        self._rows[key] = rows
        self.bytes += rows.nbytes

    def fail(self) -> None:
        """The batch could not be encoded: forget it."""
        self._encoding = []

    def clear(self) -> None:
        self._rows.clear()
        self._pixels.clear()
        self._holders.clear()
        self._encoding = []
        self.bytes = 0

    def _shrink(self) -> None:
        for key in list(self._rows):
            if self.bytes <= self.budget:
                return
            if key not in self._holders:
                self.bytes -= self._rows.pop(key).nbytes
