"""The sizes that memory and traffic are computed from, as one rank sees them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from proma_megatron.config.run import RunConfig
from proma_megatron.planning.counts import Counts
from proma_megatron.planning.quantized import input_bytes
from proma_megatron.planning.shapes import Precision


@dataclass(frozen=True)
class Sizes:
    """Widths of one token's activations on a tensor-parallel rank, and the tokens of a microbatch.

    T, k, h and V as in `records`; widths count entries.
    """

    tokens: int  # T
    own_tokens: int  # T, or T/tp under sequence parallelism, between the linear layers
    dense_tokens: int  # rows x longest sequence, which attention unpacks T into
    sequences: int  # k
    hidden: int
    ffn: int  # local
    query: int  # local heads x head_dim
    key: int  # local KV heads x head_dim
    heads: int  # local
    head_dim: int
    vocab: int  # local columns, with padding
    tensor: int  # tensor-parallel ranks
    qkv: int  # output of the fused projection
    qkv_kept: int  # the same as attention keeps it: of all ranks where KV heads are shared
    query_copied: bool  # heads of several KV groups: a norm keeps a copy of the query
    qk_norm: bool
    precision: Precision
    kept_input: float  # bytes of an entry of a linear layer's input until backward
    kept_output: float  # of attention's output, as such

    @classmethod
    def of(cls, config: RunConfig, vocab_size: int, counts: Counts) -> Sizes:
        model, tp = config.model, config.parallel.tensor
        heads = model.heads // tp
        groups = max(1, model.kv_heads // tp)
        whole = (model.heads + 2 * model.kv_heads) * model.head_dim
        return cls(
            tokens=counts.tokens_per_microbatch,
            own_tokens=counts.tokens_per_microbatch // (tp if config.parallel.sequence else 1),
            dense_tokens=counts.rows * counts.longest,
            sequences=counts.sequences_per_microbatch,
            hidden=model.hidden_size,
            ffn=model.ffn_hidden_size // tp,
            query=heads * model.head_dim,
            key=groups * model.head_dim,
            heads=heads,
            head_dim=model.head_dim,
            vocab=-(-vocab_size // tp),
            tensor=tp,
            qkv=whole // tp,
            qkv_kept=whole if model.kv_heads < tp else whole // tp,
            query_copied=groups > 1 and heads > groups,
            qk_norm=model.qk_norm,
            precision=Precision.of(model.dtype),
            kept_input=input_bytes(config),
            kept_output=input_bytes(config, of_projection=True),
        )

    @property
    def in_compute_dtype(self) -> Sizes:
        """The same for a layer that is not in FP8."""
        e = self.precision.compute
        return dataclasses.replace(self, kept_input=e, kept_output=e)

    @property
    def sharded_sequence(self) -> bool:
        return self.own_tokens != self.tokens

    @property
    def stream(self) -> int:
        """Bytes of hidden states between layers, as a rank holds them."""
        return self.own_tokens * self.hidden * self.precision.compute

    @property
    def gathered(self) -> int:
        """Bytes of hidden states of all T tokens."""
        return self.tokens * self.hidden * self.precision.compute

    @property
    def logits(self) -> int:
        """Bytes of this rank's logits, or of their gradient."""
        return self.tokens * self.vocab * self.precision.compute
