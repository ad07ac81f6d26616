"""ONNX Runtime CUDA: the graph with com.microsoft.PagedAttention, its caches bound in place.

(Never run on real hardware yet: the tests run this file on a CPU, with that node written out in standard
operators.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import BundleError, MissingDependency, UserError
from ..step import Result, Step
from .onnx import import_onnxruntime
from .paged import PagedBackend

# torch's types as ONNX numbers them (NumPy has no bfloat16)
_ONNX = {torch.float32: 1, torch.uint8: 2, torch.int32: 6, torch.int64: 7, torch.float16: 10,
         torch.bfloat16: 16}  # fmt: skip


class OnnxPagedBackend(PagedBackend):
    """Raises BundleError when a graph cannot be opened, UserError without ONNX Runtime's CUDA provider."""

    captures = False  # ONNX Runtime allocates while it runs
    _decoder: Any = None
    _vision: Any = None

    def load(self) -> None:
        ort = import_onnxruntime()
        if self.cuda and "CUDAExecutionProvider" not in ort.get_available_providers():
            raise UserError(
                f"bundle {self.bundle.name} needs ONNX Runtime's CUDA provider, this onnxruntime "
                f"{ort.__version__} has none: pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
            )
        # the encoder first: it would open on a CPU too, and so tells that CUDA's provider cannot be loaded
        sessions = {graph: self._session(graph) for graph in sorted(self.graphs, reverse=True)}
        self._decoder, self._vision = sessions.get("decoder"), sessions.get("vision")
        self._nothing = torch.empty(1, device=self.device)
        self._run = ort.RunOptions()
        # our stream is ONNX Runtime's too: nothing is to be waited for here
        self._run.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def _session(self, graph: str) -> Any:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        provider: Any = "CPUExecutionProvider"
        if self.cuda:
            cuda = {"device_id": str(self.device.index or 0)}
            if graph == "decoder" and self.stream is not None:
                cuda["user_compute_stream"] = str(self.stream.cuda_stream)
            provider = ("CUDAExecutionProvider", cuda)
        path = self.bundle.read_path(self.bundle.graphs[graph].path)
        try:
            session = ort.InferenceSession(path, options, providers=[provider])
        except Exception as e:
            line = str(e).splitlines()[0]
            raise BundleError(f"{path} cannot be opened by ONNX Runtime: {line}") from e
        if self.cuda and "CUDAExecutionProvider" not in session.get_providers():
            raise MissingDependency(
                f"ONNX Runtime {ort.__version__} cannot load its CUDA provider, most often for want of CUDA's"
                " or cuDNN's libraries: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        return session

    def step(self, step: Step) -> Result:
        totals = [past + count for past, count in zip(step.pasts, step.counts, strict=True)]
        self._metadata = np.array([max(step.counts), max(totals)], np.int32)  # wanted on the host
        return super().step(step)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        graph = self.bundle.graphs["decoder"]
        binding = self._decoder.io_binding()
        for spec in graph.inputs:
            if spec.name == "attention_metadata":
                binding.bind_cpu_input(spec.name, self._metadata)
            else:
                self._bind(binding.bind_input, spec.name, inputs[spec.name])
        rows = inputs["logits_rows"].shape[0]
        logits = torch.empty(rows, self.bundle.model.vocab_size, device=self.device)
        self._bind(binding.bind_output, "logits", logits)
        for past, new in zip(self.caches, graph.outputs[1:], strict=True):
            self._bind(binding.bind_output, new.name, inputs[past.name])
        self._decoder.run_with_iobinding(binding, self._run)
        return logits

    def _bind(self, bind: Any, name: str, tensor: Tensor) -> None:
        tensor = tensor.contiguous()
        kind, index = self.device.type, self.device.index or 0
        # no rows of logits: torch's empty tensors have no address, and ONNX Runtime wants one
        address = tensor.data_ptr() or self._nothing.data_ptr()
        bind(name, kind, index, _ONNX[tensor.dtype], list(tensor.shape), address)

    def forward_vision(self, pixels: Tensor) -> Tensor:
        rows = self._vision.run(["image_embeds"], {"pixels": pixels.cpu().numpy()})[0]
        return torch.from_numpy(np.asarray(rows))

    def unload(self) -> None:
        self._decoder = self._vision = None
