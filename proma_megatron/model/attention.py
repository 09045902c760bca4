"""Attention over packed sequences in training and over a key-value cache in rollouts.

Megatron's local core attention refuses packed sequences and its static inference path rotates the
whole cache at every step; both are replaced here on top of scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule

# Sequences up to this length attend together whatever their lengths: padding costs less than calls.
SHORT = 128


@dataclass(frozen=True)
class Block:
    """Sequences of like length, which attend together, padded to the longest of them."""

    slots: torch.Tensor  # (n,) places of their n tokens in (rows * longest)
    rows: int
    longest: int


@dataclass
class PackedLayout(PackedSeqParams):
    """Megatron's packed-sequence parameters, and how the sequences are unpacked for attention.

    Attention costs the square of a sequence's length, and padding counts. Sequences therefore stand
    in blocks of like length: none is padded to more than about 1.4 times its length, unless short.
    Padding tokens, if any, form one last sequence.
    """

    blocks: tuple[Block, ...] = ()
    order: torch.Tensor | None = None  # (T,) tokens in the order of blocks; None: they are in it
    inverse: torch.Tensor | None = None  # (T,) where each token is in that order

    @classmethod
    def of(cls, lengths: tuple[int, ...], total: int, device: torch.device) -> PackedLayout:
        """Lay out sequences of these lengths, padded to ``total`` tokens."""
        padding = total - sum(lengths)
        pieces = [*lengths, padding] if padding else list(lengths)
        cu_seqlens = torch.tensor([0, *pieces], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        members = _alike(pieces)
        order = inverse = None
        if len(members) > 1:
            starts = cu_seqlens.tolist()
            spans = [range(starts[i], starts[i + 1]) for block in members for i in block]
            order = torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(device)
            inverse = order.argsort()
        cu_seqlens = cu_seqlens.to(device)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max(pieces),
            max_seqlen_kv=max(pieces),
            blocks=tuple(_block([pieces[i] for i in block], device) for block in members),
            order=order,
            inverse=inverse,
        )


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Group places of lengths: in a block none is below 1 / sqrt(2) of one that is not short.

    Within a block they keep their order.
    """
    blocks: list[list[int]] = []
    longest = 0
    for at in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not blocks or (longest > SHORT and 2 * lengths[at] ** 2 < longest**2):
            blocks.append([])
            longest = lengths[at]
        blocks[-1].append(at)
    return [sorted(block) for block in blocks]


def _block(lengths: Sequence[int], device: torch.device) -> Block:
    pieces, longest = torch.tensor(lengths), max(lengths)
    # Where each row begins in the padded batch, less where its sequence does in the packed one.
    shifts = torch.arange(len(lengths)) * longest - (pieces.cumsum(0) - pieces)
    slots = torch.arange(sum(lengths)) + shifts.repeat_interleave(pieces)
    return Block(slots.to(device), len(lengths), longest)


class KeyValueCache(StaticInferenceContext):
    """Rotated keys and values of a batch of prompts, left-padded to a common length.

    Every row keeps its own positions (0 at its first real token), so a row's numbers do not depend
    on the lengths of the others.
    """

    def __init__(self, batch: int, max_length: int, padding: torch.Tensor) -> None:
        super().__init__(max_batch_size=batch, max_sequence_length=max_length)
        self.padding = padding  # (batch,) unused slots at the left of each row
        self.length = 0  # slots filled so far, by all layers
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def append(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (n, batch, heads, dim) at the end; return all that is stored of this layer."""
        if layer not in self.layers:
            shape = (self.max_sequence_length, *key.shape[1:])
            self.layers[layer] = (key.new_empty(shape), value.new_empty(shape))
        keys, values = self.layers[layer]
        end = self.length + key.shape[0]
        keys[self.length : end] = key
        values[self.length : end] = value
        return keys[:end], values[:end]

    def positions(self, count: int) -> torch.Tensor:
        """Return (batch, count) positions of the next ``count`` slots; 0 on padding."""
        slots = torch.arange(self.length, self.length + count, device=self.padding.device)
        return (slots[None, :] - self.padding[:, None]).clamp(min=0)

    def mask(self, count: int) -> torch.Tensor:
        """Return (batch, 1, count, length + count) bool, True where attention is not allowed."""
        device = self.padding.device
        keys = torch.arange(self.length + count, device=device)
        queries = torch.arange(self.length, self.length + count, device=device)
        future = keys[None, :] > queries[:, None]
        unused = keys[None, :] < self.padding[:, None]
        # A padding query sees itself, so that its softmax stays finite; nobody reads its output.
        itself = keys[None, :] == queries[:, None]
        return ((future[None] | unused[:, None, :]) & ~itself[None])[:, None]

    def keep(self, rows: torch.Tensor) -> None:
        """Replace the rows by these (indices into the batch), some of them more than once."""
        self.padding = self.padding[rows]
        self.max_batch_size = len(rows)
        for layer, (keys, values) in self.layers.items():
            # One after the other: a copy of the whole cache may not fit beside it.
            self.layers[layer] = keys[:, rows], values[:, rows]


class CachedSelfAttention(SelfAttention):
    """Megatron's self-attention with a cache of rotated keys in rollouts.

    It rotates queries and keys itself: Megatron rotates packed sequences one after the other, in
    Python, and asks the device for their lengths in every layer.
    """

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Any,
        key: Any,
        value: Any,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # rotary_pos_emb holds the angle of each of these tokens; see PolicyModel._preprocess.
        query = apply_rotary_pos_emb(query, rotary_pos_emb[0], config=self.config)
        key = apply_rotary_pos_emb(key, rotary_pos_emb[1], config=self.config)
        if isinstance(inference_context, KeyValueCache):
            key, value = inference_context.append(self.layer_number, key, value)
        return query, key, value, None, self.attn_mask_type, None


class CoreAttention(MegatronModule):
    """Causal attention: packed (T, heads, dim) in training, (s, b, heads, dim) in rollouts."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if isinstance(packed_seq_params, PackedLayout):
            return _packed_attention(query, key, value, packed_seq_params)
        assert attention_mask is not None, "attention needs a packed layout or a mask"
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if query.shape[2] == 1:
            # The heads that share keys are as many queries of them: repeating the keys would copy
            # the whole cache for every token.
            grouped = query.reshape(len(query), key.shape[1], -1, query.shape[3])
            out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=~attention_mask)
            return out.flatten(1)[None]
        out = F.scaled_dot_product_attention(
            query,
            _repeat_heads(key, query.shape[1]),
            _repeat_heads(value, query.shape[1]),
            attn_mask=~attention_mask,
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def _packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout
) -> torch.Tensor:
    """Attend within each sequence: (T, heads, dim) -> (T, heads * dim)."""
    order, inverse = layout.order, layout.inverse
    if order is None or inverse is None:
        (block,) = layout.blocks
        return _block_attention(query, key, value, block)
    sizes = [len(block.slots) for block in layout.blocks]
    parts = zip(*(x.index_select(0, order).split(sizes) for x in (query, key, value)), strict=True)
    found = [
        _block_attention(q, k, v, block)
        for (q, k, v), block in zip(parts, layout.blocks, strict=True)
    ]
    return torch.cat(found).index_select(0, inverse)


def _block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: Block
) -> torch.Tensor:
    """Attend within each sequence of a block: (n, heads, dim) -> (n, heads * dim)."""

    def unpack(x: torch.Tensor) -> torch.Tensor:
        # index_copy and not advanced indexing: its backward is a gather, which is deterministic.
        dense = x.new_zeros((block.rows * block.longest, *x.shape[1:]))
        dense = dense.index_copy(0, block.slots, x)
        return dense.unflatten(0, (block.rows, block.longest)).transpose(1, 2)

    query, key, value = unpack(query), unpack(key), unpack(value)
    out = F.scaled_dot_product_attention(
        query,
        _repeat_heads(key, query.shape[1]),
        _repeat_heads(value, query.shape[1]),
        is_causal=True,
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, block.slots).flatten(1)


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat (b, groups, s, dim) to (b, heads, s, dim) for grouped-query attention."""
    repeat = heads // x.shape[1]
    return x if repeat == 1 else x.repeat_interleave(repeat, dim=1)
