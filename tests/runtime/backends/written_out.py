"""com.microsoft::PagedAttention written out in standard operators, for runtimes without a kernel for it.

Keys and values are scattered into the pool at [block, offset]; then every token meets the blocks of all rows
in one Attention, under a mask of what it may see. That is the op's meaning, at many times its cost.
"""

from __future__ import annotations

from pathlib import Path

import onnx

DOMAIN = "written_out"

FUNCTION = """
<opset_import: ["" : 23], domain: "written_out">
PagedAttention <num_heads, kv_num_heads, scale, local_window_size>
    (query, key, value, key_cache, value_cache, starts, past, table) => (output, key_out, value_out)
{
    zero = Constant <value_ints: ints = [0]> ()
    one = Constant <value_ints: ints = [1]> ()
    all = Constant <value_ints: ints = [-1]> ()
    nought = Constant <value_int: int = 0> ()
    step = Constant <value_int: int = 1> ()
    size = Shape <start: int = 1, end: int = 2> (key_cache)
    head = Shape <start: int = 2, end: int = 4> (key_cache)
    T = Shape <start: int = 0, end: int = 1> (query)
    count = Squeeze (T)
    starts64 = Cast <to: int = 7> (starts)
    past64 = Cast <to: int = 7> (past)
    table64 = Cast <to: int = 7> (table)

    token = Range (nought, count, step)
    tokens = Unsqueeze (token, one)
    R1 = Shape (starts64)
    ends = Slice (starts64, one, R1)
    ended = LessOrEqual (ends, tokens)
    ended64 = Cast <to: int = 7> (ended)
    row = ReduceSum <keepdims: int = 0> (ended64, one)
    first = Gather (starts64, row)
    before = Gather (past64, row)
    inside = Sub (token, first)
    position = Add (before, inside)

    place = Div (position, size)
    offset = Mod (position, size)
    row2 = Unsqueeze (row, one)
    place2 = Unsqueeze (place, one)
    cell = Concat <axis: int = 1> (row2, place2)
    offset2 = Unsqueeze (offset, one)
    block = GatherND (table64, cell)
    block2 = Unsqueeze (block, one)
    where = Concat <axis: int = 1> (block2, offset2)
    mapped = GreaterOrEqual (block, zero)
    written = Compress <axis: int = 0> (where, mapped)
    heads = Concat <axis: int = 0> (T, head)
    key3 = Reshape (key, heads)
    value3 = Reshape (value, heads)
    new_key = Compress <axis: int = 0> (key3, mapped)
    new_value = Compress <axis: int = 0> (value3, mapped)
    key_out = ScatterND (key_cache, written, new_key)
    value_out = ScatterND (value_cache, written, new_value)

    blocks = Reshape (table64, all)
    there = Max (blocks, zero)
    keys = Gather (key_out, there)
    values = Gather (value_out, there)
    D = Shape <start: int = 3, end: int = 4> (key_cache)
    key_shape = Concat <axis: int = 0> (one, all, head)
    query_shape = Concat <axis: int = 0> (one, T, all, D)
    k = Reshape (keys, key_shape)
    v = Reshape (values, key_shape)
    q = Reshape (query, query_shape)
    K = Transpose <perm: ints = [0, 2, 1, 3]> (k)
    V = Transpose <perm: ints = [0, 2, 1, 3]> (v)
    Q = Transpose <perm: ints = [0, 2, 1, 3]> (q)

    M = Shape <start: int = 1, end: int = 2> (table64)
    length = Mul (M, size)
    L = Shape <start: int = 2, end: int = 3> (K)
    keys_in_all = Squeeze (L)
    index = Range (nought, keys_in_all, step)
    key_row = Div (index, length)
    key_position = Mod (index, length)
    key_block = Div (index, size)
    its_block = Gather (blocks, key_block)
    real = GreaterOrEqual (its_block, zero)
    same = Equal (row2, key_row)
    position2 = Unsqueeze (position, one)
    causal = LessOrEqual (key_position, position2)
    window = Constant <value_int: int = @local_window_size> ()
    everything = Constant <value_int: int = 1000000> ()
    limited = Greater (window, nought)
    reach = Where (limited, window, everything)
    oldest = Sub (position2, reach)
    recent = Greater (key_position, oldest)
    mask1 = And (same, real)
    mask2 = And (causal, recent)
    mask = And (mask1, mask2)
    O = Attention <scale: float = @scale> (Q, K, V, mask)
    o = Transpose <perm: ints = [0, 2, 1, 3]> (O)
    like = Shape (query)
    output = Reshape (o, like)
}
"""


def write_out(path: Path) -> None:
    """Change the graph at `path` in place; its data file is left alone."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "PagedAttention":
            node.domain = DOMAIN
            del node.input[8:]
    model.functions.append(onnx.parser.parse_function(FUNCTION))
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    onnx.save(model, path)
