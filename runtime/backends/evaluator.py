"""ONNX's own reference evaluator, on NumPy: what a paged graph means, apart from every runtime.

For `verify` and a first look at the numbers of a GPU's bundle (bf16, fp8, int4, …) on a machine without
one: with device="cpu". It is slow: seconds a token for a large model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .paged import PagedBackend


class EvaluatorBackend(PagedBackend):
    decoder: Any = None
    _vision: Any = None

    def load(self) -> None:
        from onnx.reference import ReferenceEvaluator

        from ...export.paged_attention.reference import operators

        if "decoder" in self.graphs:
            model = self.model()
            self.wanted = [value.name for value in model.graph.input]
            self.outputs = [value.name for value in model.graph.output]
            self.decoder = ReferenceEvaluator(model, new_ops=operators())
        if "vision" in self.graphs:
            self._vision = ReferenceEvaluator(str(self.bundle.read_path(self.bundle.graphs["vision"].path)))

    def model(self) -> Any:
        """The decoder with its weights."""
        import onnx

        return onnx.load(self.bundle.read_path(self.bundle.graphs["decoder"].path))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        arrays = {name: _array(inputs[name]) for name in self.wanted}
        found = dict(zip(self.outputs, self.decoder.run(None, arrays), strict=True))
        for spec, name in zip(self.caches, self.outputs[1:], strict=True):
            _array(inputs[spec.name])[:] = found[name]
        return torch.from_numpy(np.asarray(found["logits"], np.float32))

    def forward_vision(self, pixels: Tensor) -> Tensor:
        return torch.from_numpy(self._vision.run(None, {"pixels": pixels.numpy()})[0])

    def unload(self) -> None:
        self.decoder = self._vision = None


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as NumPy's, which has bfloat16 from ml_dtypes."""
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
