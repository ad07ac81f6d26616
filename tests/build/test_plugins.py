"""The plugins through TensorRT's own Python code, of every supported version: what it learns of shapes,
memory, grids and arguments, and that the PTX which it puts into a plan is what it will launch."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from rtp_llm.build import plugins
from rtp_llm.build.rewrite import KINDS, rewrite
from rtp_llm.errors import InternalError

HOST = (Path(__file__).parent / "plugin_host.py").read_text()
HEADS, KV_HEADS, D, BLOCK, SPLITS, SCALE = 4, 2, 64, 16, 8, 0.125
SIZES = [
    {"T": 1, "R": 1, "M": 3, "blocks": 7},
    {"T": 32, "R": 32, "M": 128, "blocks": 4096},
    {"T": 513, "R": 5, "M": 40, "blocks": 300},
]
STEP = [[["R1"], "int32"], [["R"], "int32"], [["R", "M"], "int32"]]


def nodes(dtype: str = "bfloat16", **attributes: Any) -> list[dict]:
    """The plugin nodes of one rewritten layer, with the types of what they read."""
    inputs = ["query", "key", "value", "key_cache", "value_cache", "lengths", "past", "table"]
    attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": SCALE} | attributes
    outputs = ["y", "keys", "values"]
    layer = helper.make_node("PagedAttention", inputs, outputs, "a", domain="com.microsoft", **attributes)
    graph = helper.make_graph([layer], "g", [], [])
    query, new = [["T", HEADS * D], dtype], [["T", KV_HEADS * D], dtype]
    pool = [["blocks", BLOCK, KV_HEADS, D], dtype]
    reads = {
        "CacheWrite": [new, new, pool, pool, *STEP],
        "PartialAttention": [query, pool, pool, *STEP],
        "Combine": [[[SPLITS, "T", HEADS, D], "float32"], [[SPLITS, "T", HEADS, 2], "float32"], query],
    }
    found = []
    for node in rewrite(helper.make_model(graph), SPLITS).graph.node:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        given = {name: v.decode() if isinstance(v, bytes) else v for name, v in given.items()}
        assert len(node.input) == len(reads[node.op_type])
        found.append({"kind": node.op_type, "attributes": given, "inputs": reads[node.op_type]})
    return found


def build(capability: str = "9.0", dtype: str = "bfloat16", size: dict[str, int] = SIZES[0]) -> dict:
    return {"capability": capability, "nodes": nodes(dtype), "sizes": {**size, "R1": size["R"] + 1}}


CAPABILITIES = ["8.0", "8.9", "9.0", "10.0", "12.0"]
BUILDS = [build(size=size) for size in SIZES] + [build(c) for c in CAPABILITIES] + [build(dtype="float16")]


@pytest.fixture(scope="module")
def answers(bindings: Any) -> list[dict[str, dict]]:
    """What TensorRT learns in each of BUILDS, by kind of plugin, all in one process of one version."""
    found = bindings.run(HOST, builds=BUILDS)
    return [dict(zip(KINDS, answer, strict=True)) for answer in found]


@pytest.mark.slow
def test_tensorrt_learns_the_shapes_and_types_of_what_the_kernels_write(answers: list[dict]) -> None:
    for made, answer in zip(BUILDS, answers, strict=True):
        T, dtype = made["sizes"]["T"], made["nodes"][0]["inputs"][0][1]
        pool = [made["sizes"]["blocks"], BLOCK, KV_HEADS, D]
        assert {kind: (a["shapes"], a["types"]) for kind, a in answer.items()} == {
            "CacheWrite": ([pool, pool], [dtype, dtype]),
            "PartialAttention": ([[SPLITS, T, HEADS, D], [SPLITS, T, HEADS, 2]], ["float32", "float32"]),
            "Combine": ([[T, HEADS * D]], [dtype]),
        }
        # what the next plugin asks for when it is built must be known then
        assert answer["CacheWrite"]["static"] == [[None, BLOCK, KV_HEADS, D]] * 2
        assert answer["PartialAttention"]["static"][0] == [SPLITS, None, HEADS, D]


@pytest.mark.slow
def test_the_written_caches_are_the_memory_of_the_pools(answers: list[dict]) -> None:
    aliased = {kind: a["aliased"] for kind, a in answers[0].items()}
    assert aliased == {"CacheWrite": [2, 3], "PartialAttention": [-1, -1], "Combine": [-1]}


@pytest.mark.slow
def test_every_type_of_cache_is_offered_in_plain_layout(answers: list[dict]) -> None:
    i, f = "int32", "float32"
    wanted = {
        "CacheWrite": lambda d: [d, d, d, d, i, i, i, d, d],
        "PartialAttention": lambda d: [d, d, d, i, i, i, f, f],
        "Combine": lambda d: [f, f, d, d],
    }
    for kind, a in answers[0].items():
        assert a["linear"]
        assert a["formats"] == [wanted[kind](d) for d in ("float16", "bfloat16", "float32")]


@pytest.mark.slow
def test_grids_and_arguments_are_those_of_the_launchers_for_the_same_sizes(answers: list[dict]) -> None:
    from rtp_llm.export.paged_attention import kernels

    for size, answer in zip(SIZES, answers, strict=False):
        T, R, M = size["T"], size["R"], size["M"]
        for kind, kernel in zip(KINDS, kernels.KERNELS, strict=True):
            shapes = {"kv_heads": KV_HEADS, "heads": HEADS, "head_dim": D, "block_size": BLOCK}
            if kind == "CacheWrite":
                shapes["heads"] = KV_HEADS  # all that it sees
            constants = kernels.constants(kernel, "bfloat16", **shapes, splits=SPLITS, scale=SCALE)
            built = kernels.compile(kernel, "bfloat16", 90, **shapes, splits=SPLITS, scale=SCALE)
            a = answer[kind]
            assert a["grid"] == list(kernels.grid(kernel, T, R, constants))
            assert plugins.SPLITS == kernels.SPLITS == SPLITS
            assert (a["block"], a["shared"]) == ([32 * built.num_warps, 1, 1], built.shared)
            assert a["scalars"] == ([T] if kind == "Combine" else [T, R, M])
            assert a["ptx"].split("\n{", 1)[1] == built.ptx.split("\n{", 1)[1]  # window, scale, splits too


@pytest.mark.slow
def test_the_ptx_is_for_each_gpu_and_takes_what_tensorrt_passes_in_that_order(
    answers: list[dict],
) -> None:
    """Pointers of inputs, int32 scalars, pointers of outputs: in the PTX, and in the kernel's signature."""
    from rtp_llm.export.paged_attention import kernels

    for made, answer in zip(BUILDS, answers, strict=True):
        for node, kernel in zip(made["nodes"], kernels.KERNELS, strict=True):
            a = answer[node["kind"]]
            pointers = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}
            passed = [pointers[dtype] for _, dtype in node["inputs"]]
            passed += ["i32"] * len(a["scalars"]) + [pointers[dtype] for dtype in a["types"]]
            declared = kernels.signature(kernel, node["inputs"][-1 if kernel == "combine" else 0][1])
            assert list(declared.values())[: len(passed)] == passed
            assert set(list(declared.values())[len(passed) :]) == {"constexpr"}
            scalars = [name for name, kind in declared.items() if kind == "i32"]
            assert scalars == ["T", "R", "M"][: len(a["scalars"])]

            target = f"sm_{made['capability'].replace('.', '')}"
            assert re.search(rf"^\.target {target}a?\b", a["ptx"], re.MULTILINE)
            entry = re.search(rf"\.visible \.entry {a['name']}\((.*?)\)", a["ptx"], re.DOTALL)
            assert entry
            kinds = re.findall(r"\.param \.(u64 \.ptr|u32)", entry[1])
            assert kinds == ["u32" if p == "i32" else "u64 .ptr" for p in passed]
            assemble(a["ptx"])


@functools.cache
def assemble(ptx: str) -> None:
    """NVIDIA's assembler, which comes with the Triton language, takes the PTX."""
    from triton import knobs

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target
    blackwell = int(re.sub(r"\D", "", target[1])) >= 100
    tool = getattr(knobs.nvidia, "ptxas_blackwell" if blackwell else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.ptx").write_text(ptx)
        command = [tool.path, f"-arch={target[1]}", "kernel.ptx", "-o", "kernel.cubin"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)


PTX = """.visible .entry copy(
\t.param .u64 .ptr .global .align 1 copy_param_0,
\t.param .u32 copy_param_1,
\t.param .u64 .ptr .global .align 1 copy_param_2,
\t.param .u64 .ptr .global .align 1 copy_param_3
)
.reqntid 128
{
\tld.param.b32 %r1, [copy_param_1];
\tld.param.b64 %rd1, [copy_param_0];
}
"""


def test_parameters_that_no_one_wrote_are_taken_from_the_entry() -> None:
    lines = PTX.splitlines(keepends=True)
    kept = [*lines[:2], lines[2].replace(",\n", "\n"), *lines[5:]]
    assert plugins.visible("copy", PTX, 2) == "".join(kept)
    assert plugins.visible("copy", PTX, 4) == PTX


def test_a_hidden_parameter_that_the_kernel_reads_is_an_error() -> None:
    with pytest.raises(InternalError, match="reads copy_param_1, which TensorRT does not pass"):
        plugins.visible("copy", PTX, 1)
    with pytest.raises(InternalError, match="has 4 parameters, not 5"):
        plugins.visible("copy", PTX, 5)


def test_importing_the_module_loads_neither_tensorrt_nor_the_triton_language() -> None:
    code = "import sys, rtp_llm.build.plugins; print({'tensorrt', 'triton', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
