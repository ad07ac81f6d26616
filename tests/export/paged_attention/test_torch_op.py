"""The op in torch, on CPU: it equals the specification, and lives in traced graphs."""

from __future__ import annotations

import importlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from rtp_llm.export.paged_attention import reference, torch_op

from .cases import Case, array, cases, tensor

FEW = settings(derandomize=True, deadline=None, max_examples=60)
TOLERANCE = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}


def tensors(case: Case) -> list[Tensor]:
    return [tensor(x) for x in case.arrays()]


def assert_equals_reference(case: Case, out: Tensor, caches: list[Tensor]) -> None:
    want = reference.paged_attention(*case.arrays(), **case.attributes)
    for got, expected in zip(caches, want[1:], strict=True):
        np.testing.assert_array_equal(array(got).astype(float), expected.astype(float))
    assert array(out).dtype == want[0].dtype
    tolerance = TOLERANCE[case.dtype]
    np.testing.assert_allclose(array(out).astype(float), want[0].astype(float), rtol=0, atol=tolerance)


@FEW
@given(cases((8, 24, 64), dtypes=("float32", "float32", "float16", "bfloat16")))
def test_it_equals_the_reference_for_any_mixture_of_rows(case: Case) -> None:
    arguments = tensors(case)
    out = torch_op.paged_attention(*arguments, *case.attributes.values())
    assert_equals_reference(case, out, arguments[3:5])


class Layer(nn.Module):
    def __init__(self, attributes: dict[str, Any]):
        super().__init__()
        self.attributes = attributes

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        out = torch_op.paged_attention(*tensors, *self.attributes.values())
        return out * 1, tensors[3], tensors[4]


def test_a_traced_graph_saves_loads_and_runs_at_other_sizes() -> None:
    traced_with = Case(rows=((20, 1), (3, 1)))
    graph = torch.jit.trace(Layer(traced_with.attributes), tuple(tensors(traced_with)), check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(graph, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for case in (traced_with, Case(rows=((0, 40), (17, 1), (31, 18), (5, 0)), seed=3)):
        arguments = tensors(case)
        out, *caches = loaded(*arguments)
        assert_equals_reference(case, out, caches)
        assert [c.data_ptr() for c in caches] == [c.data_ptr() for c in arguments[3:5]], (
            "copied, not in place"
        )


@pytest.mark.parametrize("rows", [((20, 1), (3, 1)), ((0, 40), (17, 1))])
def test_its_schema_and_its_fake_tell_the_truth(rows: tuple[tuple[int, int], ...]) -> None:
    case = Case(rows=rows)
    arguments = [t.nan_to_num() for t in tensors(case)]
    torch.library.opcheck(
        torch.ops.rtp_llm.paged_attention.default,
        (*arguments, *case.attributes.values()),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_importing_it_again_is_harmless() -> None:
    importlib.reload(torch_op)
    case = Case(rows=((2, 2),))
    arguments = tensors(case)
    assert_equals_reference(
        case, torch_op.paged_attention(*arguments, *case.attributes.values()), arguments[3:5]
    )
