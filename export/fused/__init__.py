"""What stands between two matrix products of a decoder layer, in one op each: what TorchScript calls.

    add_rms_norm    x + delta, and its RMSNorm as the next product's operand
    qkv_attention   q/k norm, logn and rope on the output of the qkv product; keys and values go to the cache;
                    then the attention of `paged_attention`
    silu_mul        silu(gate) · up, as the operand of `down`
    token_scaled    operand of a product whose input may leave float16's range, with its scale

In all of them: x is float32 [T, width]. The output of a product is `value` [T, out], in the product's type,
with what belongs to it: `bias` float32 [out] and, of a scaled operand, `scale` float32 [T, 1] (each may be
absent); it stands for value / scale + bias. Everything is computed in float32 and rounded once, to `dtype`,
that of the next product's operands.

    add_rms_norm(x, value?, bias?, scale?, weight [width], eps, dtype) → sum float32, normed `dtype`
        sum = x + (value / scale + bias), a new tensor; normed = sum / √(mean(sum²) + eps) · weight
    qkv_attention(value [T, (heads + 2 · kv_heads) · D], bias?, logn? [T, 1], q_norm? [D], k_norm? [D],
                  cos, sin [T, rotary / 2], key_cache, value_cache, …) → [T, heads · cache D] as the caches
        queries and keys: normed with eps where q_norm and k_norm are given; queries times logn; rotated;
        heads filled with zeros to the caches' D; the rest as in paged_attention
    silu_mul(value [T, 2 · width], bias?, dtype) → `dtype` [T, width]: silu(left half) · right half
    token_scaled(x, float32 or 16 bits) → float16 x · scale, scale = quantize.token_scale(x)

`reference` is the specification in NumPy, `kernels` the kernels in the Triton language, `torch_op` plain
torch and, on CUDA, the ops `rtp_llm::…`. Import the parts: nothing heavy is loaded here.
"""
