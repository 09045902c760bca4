"""Operations of a step by formula, and what GPUs are published to do.

Forward and backward of one microbatch with T tokens in sequences of L each:

    6 N T  +  layers * 6 L D T

N counts the entries of linear weights: q, k, v, o, gate, up and down of each layer, and the head,
tied or not; looking up embeddings multiplies nothing. Each entry takes a multiplication and an
addition for every token, forward, towards the input and towards the weight. In attention, of
``D = heads * head_dim``, a token takes 4 L D operations forward (scores and their sum over values),
twice that backward, and the causal mask leaves half: 6 L D, which is 12 L D halved. Recompute and
the projection's own products don't count: a utilization says how fast the useful work is done.
"""

from __future__ import annotations

from dataclasses import dataclass

from proma_megatron.config.model import ModelConfig


@dataclass(frozen=True)
class Peak:
    """TFLOP/s of dense matrix products."""

    bf16: float
    fp8: float | None  # None: the GPU has none

    def of(self, fp8: str) -> float | None:
        return self.bf16 if fp8 == "none" else self.fp8


# NVIDIA's data sheets, half of the figures that are given with sparsity; by the name that
# `torch.cuda.get_device_name` gives. Any other GPU goes without a utilization.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": Peak(312.0, None),
    "NVIDIA A100-SXM4-80GB": Peak(312.0, None),
    "NVIDIA H100 80GB HBM3": Peak(989.4, 1978.9),  # SXM
    "NVIDIA H100 PCIe": Peak(756.0, 1513.0),
    "NVIDIA H100 NVL": Peak(835.5, 1670.5),
    "NVIDIA H200": Peak(989.4, 1978.9),  # SXM
    "NVIDIA H200 NVL": Peak(835.5, 1670.5),
    "NVIDIA GH200 480GB": Peak(989.4, 1978.9),
    "NVIDIA B200": Peak(2250.0, 4500.0),
}


def linear_entries(model: ModelConfig) -> int:
    """N: entries of all linear weights."""
    assert model.vocab_size is not None
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    attention = model.hidden_size * (2 * query + 2 * key)
    return (
        model.layers * (attention + 3 * model.hidden_size * model.ffn_hidden_size)
        + model.hidden_size * model.vocab_size
    )


def linear_operations(model: ModelConfig, tokens: int) -> int:
    """Of linear layers, for so many tokens."""
    return 6 * linear_entries(model) * tokens


def attention_operations(model: ModelConfig, length: int, sequences: int) -> int:
    """Of so many sequences of one length."""
    return 6 * model.layers * model.heads * model.head_dim * length**2 * sequences


def step_operations(model: ModelConfig, length: int, sequences: int) -> int:
    return linear_operations(model, length * sequences) + attention_operations(
        model, length, sequences
    )


def utilization(operations: int, seconds: float, device: str, fp8: str) -> float | None:
    """Of the peak that is published for the precision; None where none is known."""
    peak = PEAKS[device].of(fp8) if device in PEAKS else None
    return None if peak is None else operations / seconds / (peak * 1e12)
