"""Bytes that one transformer layer of this code keeps for its backward pass, by part.

Derived from the modules' autograd graph: RMSNorm keeps its normalized value, its output (the next
linear layer's input) and, in bfloat16, its input widened to float32; attention keeps the fused
projection's output, queries and keys before and after their norms and rotary embedding, and the
unpacked rows that scaled_dot_product_attention saw; SwiGLU keeps its two halves, the activated gate
and its own output. The kernels of scaled_dot_product_attention on the CPU keep the logarithm of the
softmax's sum and no probabilities, as flash attention on a GPU does. On a GPU this is unmeasured.
"""

from __future__ import annotations

from dataclasses import dataclass

from proma_megatron.planning.sizes import Sizes


@dataclass(frozen=True)
class Kept:
    """Bytes that one layer keeps of one microbatch."""

    residual: int  # the stream after attention and after the MLP, where norms read it directly
    input_norm: int
    projected: int  # output of the fused q, k, v projection
    qk_norm: int
    rotary: int
    dense: int  # attention's unpacked rows, its output, and the softmax's sums
    proj_input: int
    mlp_norm: int
    fc1: int
    gated: int  # activated gate and second half
    fc2_input: int  # their product

    @property
    def attention(self) -> int:
        return self.projected + self.qk_norm + self.rotary + self.dense + self.proj_input

    @property
    def mlp(self) -> int:
        return self.fc1 + self.gated + self.fc2_input

    @property
    def total(self) -> int:
        return self.residual + self.input_norm + self.attention + self.mlp_norm + self.mlp


def kept_by_layer(sizes: Sizes) -> Kept:
    """Return what a layer keeps without recomputation."""
    e, wide = sizes.precision.compute, sizes.precision.wide
    tokens, dense = sizes.tokens, sizes.dense_tokens
    widened = wide > e  # norms compute in float32 from a copy
    qk = 0
    if sizes.qk_norm:
        qk = tokens * (sizes.query + sizes.key) * (e + (wide if widened else 0))
        if not widened and sizes.query_copied:
            qk += tokens * sizes.query * e
    rotated = tokens * (sizes.query + sizes.key) * e
    angles = 4 * tokens * sizes.head_dim * e  # sine and cosine, for queries and for keys
    return Kept(
        residual=0 if widened else 2 * sizes.stream,
        input_norm=_norm_kept(sizes, sizes.kept_input),
        projected=tokens * sizes.qkv_kept * e,
        qk_norm=qk,
        rotary=rotated + angles,
        dense=4 * dense * sizes.query * e + dense * sizes.heads * wide,
        proj_input=int(tokens * sizes.query * sizes.kept_output),
        mlp_norm=_norm_kept(sizes, sizes.kept_input),
        fc1=2 * tokens * sizes.ffn * e,
        gated=2 * tokens * sizes.ffn * e,
        fc2_input=int(tokens * sizes.ffn * sizes.kept_input),
    )


def final_norm_kept(sizes: Sizes) -> int:
    """Return what the norm before the head keeps, which is never in FP8."""
    return _norm_kept(sizes, sizes.precision.compute)


def _norm_kept(sizes: Sizes, output: float) -> int:
    """Return what a norm over the hidden states keeps: normalized, output, and the widened input.

    Args:
        output: bytes that an entry of it takes, as the input of the next linear layer.
    """
    e, wide = sizes.precision.compute, sizes.precision.wide
    per_entry = e + output + (wide if wide > e else 0)
    return int(sizes.own_tokens * (sizes.hidden * per_entry + wide))


def norm_backward(sizes: Sizes, entries: int) -> int:
    """Return temporaries of a norm's backward over so many entries: it is a chain of operators.

    Besides what it keeps: five tensors in the wide dtype at the worst moment.
    """
    return 5 * entries * sizes.precision.wide
