"""Images → embedding rows: encoded in batches over all waiting requests, kept by content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

BATCH = 4  # images: a larger one is no faster on a CPU, and holds up who came first


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
        """A sequence needs these images (key → uint8 [size, size, 3]) until `drop`.

        Not `counted`: another answer to a request whose images were.
        """
        for key, pixels in images.items():
            self._holders[key] = self._holders.get(key, 0) + 1
            self.asked += counted
            if key in self._rows:
                self._rows.move_to_end(key)
            elif key not in self._encoding and key not in self._pixels:
                self._pixels[key] = pixels
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
            self._rows[key] = one.copy()  # a view would keep the whole batch alive
            self.bytes += one.nbytes
        self._shrink()

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
