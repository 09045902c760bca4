"""Tied embedding and head, over pipeline stages too, exactly.

The tensor's gradient has a part from the head (last stage) and one from the embedding (first
stage), and the Gram matrix of their sum has cross terms: the head's factors, which come first, are
held until the embedding's are there. If that is another stage, the accumulator of the tensor lives
on the last one; after each microbatch the first stage sends its per-token gradients (T, h) there,
which are activation-sized, not vocabulary-sized.

They travel over Gloo, through the host's memory; models with tied embeddings are small. By design
the host waits for a GPU there, once a microbatch at each end. Nothing deadlocks: a microbatch is
only waited for once a later forward proves that the first stage has passed its backward (`lag`
below), or at the end of the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from proma_megatron.distributed.topology import Topology
from proma_megatron.projection.factors.embedding import Lookup
from proma_megatron.types import Microbatch
from proma_megatron.weights.shards import ParameterShard


@dataclass(frozen=True)
class HeldHead:
    microbatch: Microbatch
    x: torch.Tensor  # (T, h)
    dy: torch.Tensor  # (T, V/tp)


class TiedEnds:
    """The first and the last stage of one pipeline, and what goes from one to the other."""

    def __init__(self, topology: Topology) -> None:
        assert topology.tied_ends is not None
        self.group = topology.tied_ends
        # 1F1B: the first stage runs backward(m) before forward(m + stages). Interleaved, it runs
        # at most pipeline * (virtual + 1) - 2 chunk forwards ahead, so twice the stages suffice.
        self.lag = topology.pipeline.size * (2 if topology.virtual_pipeline > 1 else 1)
        self._sending: list[tuple[dist.Work | None, torch.Tensor]] = []

    def send(self, dy: torch.Tensor) -> None:
        """Send a microbatch's gradients of the embedding's output (T, h), from the first stage."""
        dy = dy.contiguous().cpu()
        self._sending.append((dist.isend(dy, group=self.group, group_dst=1), dy))

    def receive(self, held: HeldHead, dtype: torch.dtype) -> torch.Tensor:
        """Receive the embedding's per-token gradients (T, h) of a held microbatch."""
        dy = torch.empty_like(held.x, device="cpu")
        dist.recv(dy, group=self.group, group_src=0)
        return dy.to(held.x.device, dtype)

    def forget(self) -> None:
        """Drop what a step left that was broken off."""
        self._sending.clear()

    def wait(self) -> None:
        """Wait, at the end of a step, until every send has been received."""
        for work, _ in self._sending:
            if work is not None:
                work.wait()
        self._sending.clear()


class TiedTable:
    """The tied tensor on this rank, and the heads whose embeddings have not been captured yet.

    Args:
        shards: every parameter of this rank.

    Attributes:
        shard: the tensor as this rank's accumulator sees it: on the last stage if there are two.
            The copy of the first stage stays at 0; Megatron's sum over both ends gives it the
            result. None on stages that accumulate nothing of it.
        ends: None where one stage has both.
    """

    def __init__(self, topology: Topology, shards: Iterable[ParameterShard]) -> None:
        one_stage = topology.pipeline.size == 1
        name = "embedding.word_embeddings.weight" if one_stage else "output_layer.weight"
        self.shard = next((shard for shard in shards if shard.name == name), None)
        self.ends = TiedEnds(topology) if topology.tied_ends is not None else None
        self._tensor_rank = topology.tensor.rank
        self._held: deque[HeldHead] = deque()

    def hold(self, microbatch: Microbatch, x: torch.Tensor, dy: torch.Tensor) -> None:
        """Keep the head's factors until the embedding's are there: cross terms count."""
        self._held.append(HeldHead(microbatch, x, dy))

    def pop(self) -> HeldHead:
        """Return the head whose embedding has just been captured, on the same stage."""
        assert self._held, "the head's backward comes before the embedding's"
        return self._held.popleft()

    def drain(self, stop: int) -> Iterator[HeldHead]:
        """Yield held microbatches with an index below ``stop``, in order, and hold them no more."""
        while self._held and self._held[0].microbatch.index < stop:
            yield self._held.popleft()

    def receive(self, held: HeldHead) -> Lookup:
        """Receive the embedding's part of a microbatch, as this rank's rows of the table see it."""
        assert self.ends is not None
        assert self.shard is not None
        parameter = self.shard.parameter
        rows = self._local_rows(held.microbatch.tokens.flatten(), parameter.shape[0])
        dtype: torch.dtype = parameter.main_grad.dtype  # type: ignore[attr-defined]
        return Lookup(rows, self.ends.receive(held, dtype))

    def forget(self) -> None:
        """Drop what a step left that was broken off."""
        self._held.clear()
        if self.ends is not None:
            self.ends.forget()

    def _local_rows(self, tokens: torch.Tensor, size: int) -> torch.Tensor:
        """Return which of this rank's ``size`` rows tokens (T,) look up, -1 for other ranks'."""
        local = tokens - self._tensor_rank * size
        return local.masked_fill((local < 0) | (local >= size), -1)
