"""Images → embedding rows: encoded in batches over all waiting requests, kept by content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np


class EmbeddingCache(Mapping[bytes, np.ndarray]):
    """Image key → float32 [tokens, hidden], least recently used out first.

    `budget` bytes bound what nobody needs any more; an image that a live sequence holds stays.
    One thread calls it: the engine's.
    """

    def __init__(self, encode: Callable[[np.ndarray], np.ndarray], budget: int, batch: int = 8):
        self._encode = encode
        self.budget = budget
        self.batch = batch
        self.bytes = 0
        self._rows: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._pixels: dict[bytes, np.ndarray] = {}  # waiting to be encoded
        self._holders: dict[bytes, int] = {}

    def __getitem__(self, key: bytes) -> np.ndarray:
        return self._rows[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def hold(self, images: Mapping[bytes, np.ndarray]) -> None:
        """A sequence needs these images (key → uint8 [size, size, 3]) until `drop`."""
        for key, pixels in images.items():
            self._holders[key] = self._holders.get(key, 0) + 1
            if key in self._rows:
                self._rows.move_to_end(key)
            else:
                self._pixels.setdefault(key, pixels)

    def drop(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self._pixels.pop(key, None)
        self._shrink()

    def ready(self, keys: Iterable[bytes]) -> bool:
        return all(key in self._rows for key in keys)

    def lost(self, keys: Iterable[bytes]) -> bool:
        """Whether an image was forgotten because its batch failed."""
        return any(key not in self._rows and key not in self._pixels for key in keys)

    def encode_some(self) -> list[bytes]:
        """Encode one batch of the images that wait; returns their keys.

        When the batch fails its images are forgotten and the error goes to the caller.
        """
        keys = list(self._pixels)[: self.batch]
        if not keys:
            return []
        # equal shapes only: recipes with images of any size come as separate batches
        shape = self._pixels[keys[0]].shape
        keys = [k for k in keys if self._pixels[k].shape == shape]
        pixels = np.stack([self._pixels.pop(k) for k in keys])
        for key, rows in zip(keys, self._encode(pixels), strict=True):
            self._rows[key] = rows.copy()  # a view would keep the whole batch alive
            self.bytes += rows.nbytes
        self._shrink()
        return keys

    def clear(self) -> None:
        self._rows.clear()
        self._pixels.clear()
        self._holders.clear()
        self.bytes = 0

    def _shrink(self) -> None:
        for key in list(self._rows):
            if self.bytes <= self.budget:
                return
            if key not in self._holders:
                self.bytes -= self._rows.pop(key).nbytes
