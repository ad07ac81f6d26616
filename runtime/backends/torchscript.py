"""TorchScript on a CPU or a CUDA GPU: `decoder.pt` calls the ops of export/fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import BundleError
from ...export.fused import torch_op  # noqa: F401  (registers what decoder.pt calls)
from .paged import PagedBackend


class TorchScriptBackend(PagedBackend):
    """Raises BundleError when an archive cannot be opened. `.pt` archives are code: the caller checks that
    they may be trusted (trust.py)."""

    _decoder: Any = None
    _vision: Any = None

    def load(self) -> None:
        read = {graph: self._read(graph) for graph in self.graphs}
        self._decoder, self._vision = read.get("decoder"), read.get("vision")

    def _read(self, graph: str) -> Any:
        path = self.bundle.read_path(self.bundle.graphs[graph].path)
        try:
            return torch.jit.load(str(path), map_location=self.device).eval()
        except Exception as e:
            line = str(e).strip().splitlines()[0]
            raise BundleError(f"{path} cannot be opened by torch {torch.__version__}: {line}") from e

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        # between its products nothing is left to fuse, and torch's fuser would compile for shape after shape
        with torch.jit.optimized_execution(False):
            return self._decoder(*(inputs[name] for name in self.names))

    def forward_vision(self, pixels: Tensor) -> Tensor:
        with torch.jit.optimized_execution(False):
            return self._vision(pixels)

    def unload(self) -> None:
        self._decoder = self._vision = None
