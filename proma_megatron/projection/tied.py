"""Tied embedding and head over pipeline stages, exactly.

The tensor's gradient has a part from the head (last stage) and one from the embedding (first
stage), and the Gram matrix of their sum has cross terms. The accumulator of the tensor lives on the
last stage; after each microbatch the first stage sends its per-token gradients (T, h) there, which
are activation-sized, not vocabulary-sized. The last stage holds the head's factors until they
arrive.

They travel over Gloo, through the host's memory; models with tied embeddings are small. By design
the host waits for a GPU there, once a microbatch at each end. Nothing deadlocks: a microbatch is
only waited for once a later forward proves that the first stage has passed its backward (`lag`
below), or at the end of the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from proma_megatron.distributed.topology import Topology
from proma_megatron.types import Microbatch


@dataclass(frozen=True)
class HeldHead:
    microbatch: Microbatch
    x: torch.Tensor  # (T, h)
    dy: torch.Tensor  # (T, V/tp)


class TiedEnds:
    """The first and the last stage of one pipeline, as the tied tensor sees them."""

    def __init__(self, topology: Topology) -> None:
        assert topology.tied_ends is not None
        self.group = topology.tied_ends
        # 1F1B: the first stage runs backward(m) before forward(m + stages). Interleaved, it runs
        # at most pipeline * (virtual + 1) - 2 chunk forwards ahead, so twice the stages suffice.
        self.lag = topology.pipeline.size * (2 if topology.virtual_pipeline > 1 else 1)
        self._held: deque[HeldHead] = deque()
        self._sending: list[tuple[dist.Work | None, torch.Tensor]] = []

    def send(self, dy: torch.Tensor) -> None:
        """First stage: this microbatch's gradients of the embedding's output, (T, h)."""
        dy = dy.contiguous().cpu()
        self._sending.append((dist.isend(dy, group=self.group, group_dst=1), dy))

    def hold(self, microbatch: Microbatch, x: torch.Tensor, dy: torch.Tensor) -> None:
        """Last stage: keep the head's factors until the embedding's arrive."""
        self._held.append(HeldHead(microbatch, x, dy))

    def ready(self, stop: int) -> Iterator[HeldHead]:
        """Held microbatches with an index below ``stop``, in order."""
        while self._held and self._held[0].microbatch.index < stop:
            yield self._held.popleft()

    def receive(self, held: HeldHead, dtype: torch.dtype) -> torch.Tensor:
        """The embedding's per-token gradients (T, h) of a held microbatch."""
        dy = torch.empty_like(held.x, device="cpu")
        dist.recv(dy, group=self.group, group_src=0)
        return dy.to(held.x.device, dtype)

    def forget(self) -> None:
        """Drop what a step left that was broken off."""
        self._held.clear()
        self._sending.clear()

    def wait(self) -> None:
        """End of a step: every send has been received."""
        for work, _ in self._sending:
            if work is not None:
                work.wait()
        self._sending.clear()
