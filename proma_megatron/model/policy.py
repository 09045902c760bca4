"""Build the sharded policy: Megatron's GPTModel with Qwen's options and our capturing layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from proma_megatron.config.fp8 import token_multiple
from proma_megatron.config.model import ModelConfig
from proma_megatron.distributed.devices import Backend
from proma_megatron.distributed.topology import Topology
from proma_megatron.model.attention import KeyValueCache, PackedLayout
from proma_megatron.types import Microbatch
from proma_megatron.weights.mapping import parameter_shards

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class PolicyModel(GPTModel):
    """GPTModel that rotates every token by its own position, packed or in a `KeyValueCache`."""

    def _preprocess(self, input_ids: Any, position_ids: Any, *args: Any, **kwargs: Any) -> Any:
        out: Any = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        cache, layout = kwargs.get("inference_context"), kwargs.get("packed_seq_params")
        if not isinstance(cache, KeyValueCache) and not isinstance(layout, PackedLayout):
            return out
        decoder_input, angles, *rest = out
        # (b, s) positions -> angles (s, b, 1, dim) of these tokens, in place of one table for all.
        return decoder_input, angles[:, 0, 0][position_ids.t()][:, :, None, :], *rest


class Frozen(torch.nn.Module):
    """A chunk that is only read: it stands where Megatron's DDP would, without its buffers."""

    def __init__(self, module: PolicyModel) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.config = module.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Policy:
    """The model chunks of this rank, wrapped in Megatron's DDP, with what is known about them."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel | Frozen],
        config: TransformerConfig,
        model: ModelConfig,
        vocab_size: int,
        topology: Topology,
        backend: Backend = "torch",
    ) -> None:
        self.chunks: list[Any] = list(chunks)
        self.backend: Backend = backend
        self.config = config
        self.model = model
        self.vocab_size = vocab_size
        self.topology = topology
        self.shards = [
            shard
            for chunk in self.modules
            for shard in parameter_shards(chunk, model, vocab_size, topology)
        ]

    @property
    def modules(self) -> list[Any]:
        """The bare `PolicyModel`s, in the order of virtual pipeline stages."""
        return [chunk.module for chunk in self.chunks]

    @property
    def token_multiple(self) -> int:
        """What the tokens of a microbatch are padded to a multiple of."""
        topology = self.topology
        return token_multiple(
            self.model.fp8, topology.tensor.size, sequence_parallel=topology.sequence_parallel
        )

    @property
    def first_token(self) -> int:
        """The token of this rank's first column of the vocabulary."""
        tensor = self.topology.tensor
        return tensor.rank * -(-self.vocab_size // tensor.size)

    def forward_packed(self, chunk: torch.nn.Module, microbatch: Microbatch) -> torch.Tensor:
        """Return logits (T, V/tp) on the last stage, hidden states for the next stage elsewhere."""
        layout = PackedLayout.of(microbatch.lengths, microbatch.num_tokens, self.topology.device)
        return chunk(microbatch.tokens, microbatch.positions, None, packed_seq_params=layout)

    def delayed_scaling(self) -> list[torch.Tensor]:
        """Return what delayed scaling remembers on this rank, the layers' own tensors, float32."""
        if self.model.fp8 != "delayed":
            return []
        with self.topology.megatron_calls():
            return [
                found
                for module in self.modules
                for layer in module.modules()
                if hasattr(layer, "remembered")
                for found in layer.remembered()
            ]

    @contextlib.contextmanager
    def rollout_mode(self) -> Iterator[None]:
        """Evaluate without sequence parallelism: a decoding step has one token to shard.

        And without FP8, whose recipes ask for 16 tokens or more: its copies of weights make room
        for the key-value cache.
        """
        for module in self.modules:
            module.eval()
            for layer in module.modules():
                if hasattr(layer, "drop_copies"):
                    layer.drop_copies()
        self._set_sequence_parallel(False)
        fp8, self.config.fp8 = self.config.fp8, None
        try:
            yield
        finally:
            self.config.fp8 = fp8
            self._set_sequence_parallel(self.topology.sequence_parallel)
            for module in self.modules:
                module.train()

    def _set_sequence_parallel(self, on: bool) -> None:
        if not self.topology.sequence_parallel:
            return
        self.config.sequence_parallel = on
        names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
        for module in self.modules:
            for layer in module.modules():
                for name in names:
                    if hasattr(layer, name):
                        setattr(layer, name, on)
