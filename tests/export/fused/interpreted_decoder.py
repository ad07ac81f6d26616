"""A process for test_torch_op.py: a decoder traced over the ops, whose kernels the Triton language's
interpreter runs, beside the same in plain torch. Prints ‖difference‖ / ‖logits‖ and how many ops ran."""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from rtp_llm.export import torchscript
from rtp_llm.export.attention import specs
from rtp_llm.export.decoder import Decoder, DecoderConfig
from rtp_llm.export.fused import torch_op
from rtp_llm.export.paged_attention.torch_op import on_cuda
from rtp_llm.export.quantize import swap

precision = sys.argv[1]
c = DecoderConfig(
    vocab_size=97, hidden_size=48, intermediate_size=80, layers=2, heads=4, kv_heads=2, head_dim=12,
    rotary_dim=8, max_seq_len=64, eps=1e-6, logn=2, window=3, qkv_bias=True, o_bias=True, mlp_bias=True,
    qk_norm=True,
)  # fmt: skip
inputs, _ = specs("paged", c, {"fp32": "float32", "fp16": "float16"}[precision], metadata=False)
module = torchscript.Script(Decoder(c), torchscript.PagedOp, inputs).eval().requires_grad_(False)
swap(module, precision, "torchscript")
torch.manual_seed(0)
for name, p in module.named_parameters():
    p.detach().normal_(0, 0.3 if "norm" not in name else 1)
step = torchscript.example(inputs)
step[0].copy_(torch.tensor([5, 98, 7, 11]))  # the second: an image's
step[1].normal_()
step[2].copy_(torch.tensor([0, 1, 2, 2]))


def logits() -> torch.Tensor:
    with torch.inference_mode():
        traced = torch.jit.trace(module, step, check_trace=False)
        return traced(*(t.clone() for t in step))


plain = logits()
calls = 0


def counted(name: str):
    launch = on_cuda(torch_op.__package__, name, name)

    def call(*arguments):
        global calls
        calls += 1
        return launch(*arguments)

    return call


for name in torch_op.SCHEMAS:
    torch.library.impl(f"rtp_llm::{name}", "CPU", counted(name))
torchscript._scripted = lambda function: getattr(torch.ops.rtp_llm, function.__name__)
found = logits()
print(float((found - plain).norm() / plain.norm()), calls // 2)  # traced, and run
