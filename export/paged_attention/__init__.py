"""`com.microsoft.PagedAttention`: attention of packed tokens over a cache of blocks anywhere in a pool.

    query                      [T, heads · D]      rotated; the new tokens of all rows, one row after another
    key, value                 [T, kv_heads · D]
    key_cache, value_cache     [blocks, block_size, kv_heads, D]   updated in place
    cumulative_sequence_length int32 [R + 1]       row r owns tokens cu[r] … cu[r + 1] − 1 (none: an idle row)
    past_seqlens               int32 [R]           tokens that row r has in the cache already
    block_table                int32 [R, M]        the row's blocks in order; −1: unmapped
    → output                   [T, heads · D]

Token j of row r stands at position t = past[r] + j. Its key and value go to block_table[r, t // block_size],
place t % block_size; then it sees positions max(0, t − window + 1) … t. What a row would keep in an unmapped
block is dropped, and not seen; a token that sees nothing, or belongs to no row (T > cu[R]), gets zeros: so a
captured CUDA graph can be padded with idle rows and tokens. Rows of one step must not write to one block.

`reference` is the specification in NumPy, `kernels` the three kernels in the Triton language (cache write,
partial attention, combine), `torch_op` the op `rtp_llm::paged_attention` for CPU and CUDA. Import the parts:
nothing heavy is loaded here.
"""

BLOCK_SIZE = 16
"""Tokens of a block in our bundles: ONNX Runtime takes powers of two from 16 on."""
