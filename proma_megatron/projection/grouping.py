"""Which captures are solved together, and when.

Parameters of one transformer layer are finished together: one sum over tensor ranks for all of
them, and then the update of ``main_grad``; that of short vectors may wait for the end of the
backward pass. The sum is started with the layer's last capture and waited for at the next layer's
first, so that it runs beside what lies between.

Microbatches are told apart by `CaptureGroups.begin_backward`: under 1F1B forwards run ahead of
backwards, and recompute runs forwards inside backwards, so what the last forward was says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from proma_megatron.distributed.topology import Axis
from proma_megatron.projection.capture import Capture
from proma_megatron.projection.factors.workspace import Workspace
from proma_megatron.projection.sizes import kept_slices
from proma_megatron.projection.tied import TiedTable
from proma_megatron.projection.updaters.updater import Updater
from proma_megatron.types import Microbatch
from proma_megatron.weights.shards import ParameterShard

# Beyond so many bytes, units that wait for the end of the backward pass are solved at once.
LATE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class CaptureKey:
    """What captures that are finished together have in common."""

    chunk: int
    microbatch: int
    layer: int | None  # None: embedding, final norm and head


class CaptureGroups:
    """Captures of this rank on their way into ``main_grad``, a group after the other.

    Args:
        updater: the rule, which takes captures, and finishes groups of them.
        tensor: over whose ranks a group is summed. All of them make the same groups.
        workspace: where sequence gradients of a group are kept; free when that is finished.
        shards: every parameter of this rank.
        tied: the tensor that embedding and head share, if they do.
    """

    def __init__(
        self,
        updater: Updater[Any, Any, Any],
        tensor: Axis,
        workspace: Workspace,
        shards: Collection[ParameterShard],
        tied: TiedTable | None,
    ) -> None:
        self.updater = updater
        self._tensor = tensor
        self._workspace = workspace
        self._bytes = bytes_by_layer(shards, tied)
        self._expected = captures_by_layer(shards, tied, tensor)
        self._current: tuple[int, Microbatch] | None = None  # with the chunk, whose backward runs
        self._group: CaptureKey | None = None
        self._captured = 0  # parameters of the group
        self._pending: list[Any] = []
        self._held = 0  # bytes that the pending hold besides the workspace
        self._started: Any = None  # the group whose sum over tensor ranks is under way
        self._late: list[Any] = []  # units that wait for the end of the backward pass
        self._late_bytes = 0

    @property
    def microbatch(self) -> Microbatch:
        """The microbatch whose backward runs on this rank."""
        return self._now()[1]

    @property
    def waiting(self) -> bool:
        """Whether anything of a backward pass is not finished."""
        return bool(self._pending or self._late) or self._started is not None

    def forget(self) -> None:
        """Drop what a backward pass left that was broken off: it belongs to no step."""
        self._pending, self._held, self._group = [], 0, None
        self._started = None
        self._late, self._late_bytes = [], 0
        self._workspace.free()

    def begin_backward(self, chunk: int, microbatch: Microbatch) -> None:
        """Take what comes for captures of this microbatch, on this model chunk."""
        self._current = chunk, microbatch

    def end_backward(self) -> None:
        """Finish all that is left of the backward pass."""
        self.flush()
        self._finish_late(self.microbatch)
        self._current = self._group = None

    def enter(self, shard: ParameterShard) -> None:
        """Make this parameter's group the one that captures are added to.

        Another layer's capture closes the group before, and frees the workspace.
        """
        chunk, microbatch = self._now()
        group = CaptureKey(chunk, microbatch.index, shard.layer)
        if group == self._group:
            return
        if not self._joins(group, microbatch.sequences.count):
            self.flush()
        self._group, self._captured = group, 0

    def add(self, capture: Capture, microbatch: Microbatch) -> None:
        """Take a capture; with the group's last, start its sum over tensor ranks."""
        waiting = self.updater.take(capture, microbatch)
        if waiting:
            self._pending += waiting
            self._held += capture.factors.nbytes
        self._captured += 1
        layer = capture.shard.layer
        if layer is not None and self._captured == self._expected.get(layer):
            self._start()

    def flush(self) -> None:
        """Finish the group, if anything of it waits."""
        if self._pending or self._started is not None:
            self.finish(self.microbatch)

    def finish(self, microbatch: Microbatch) -> None:
        """Finish the group, whose captures are of this microbatch, and free the workspace."""
        self._start()
        started, self._started = self._started, None
        if started is not None:
            late = self.updater.finish(started, microbatch)
            self._late += late
            self._late_bytes += sum(unit.nbytes for unit in late)
        del started
        self._held = 0
        self._workspace.free()
        if self._late_bytes > LATE_BYTES:
            self._finish_late(microbatch)

    def _now(self) -> tuple[int, Microbatch]:
        assert self._current is not None, "begin_backward comes before captures"
        return self._current

    def _joins(self, group: CaptureKey, sequences: int) -> bool:
        """Tell whether what is pending can wait for this group, and save a sum over tensor ranks.

        The final norm and the head do for the last layer, the first layer for the embedding, if the
        workspace has room for both. Tensor ranks have shards of the same shapes, and so agree.
        """
        before = self._group
        if self._tensor.size == 1 or before is None or not self._pending:
            return False
        if (before.chunk, before.microbatch) != (group.chunk, group.microbatch):
            return False
        if None not in (before.layer, group.layer):
            return False
        slices = kept_slices(sequences, accumulates=self.updater.accumulates)
        size = slices * self._bytes.get(group.layer, 0)
        return self._held + self._workspace.held + size <= self._workspace.half

    def _start(self) -> None:
        """Start the sum over tensor ranks of what is pending; nobody waits for it here."""
        if self._pending:
            assert self._started is None, "one group after the other"
            self._started, self._pending = self.updater.start(self._pending), []

    def _finish_late(self, microbatch: Microbatch) -> None:
        late, self._late, self._late_bytes = self._late, [], 0
        if late:
            self.updater.finish_late(late, microbatch)


def bytes_by_layer(
    shards: Collection[ParameterShard], tied: TiedTable | None
) -> dict[int | None, int]:
    """Return what one sequence's gradients of a group take, by layer; None: see `CaptureKey`.

    The head's come before others, which is why only a tied table counts outside of layers.
    """
    sizes: dict[int | None, int] = {}
    for shard in shards:
        if shard.layer is not None or (tied is not None and shard is tied.shard):
            gradient = shard.parameter.main_grad  # type: ignore[attr-defined]
            size = shard.parameter.numel() * gradient.dtype.itemsize
            sizes[shard.layer] = sizes.get(shard.layer, 0) + size
    return sizes


def captures_by_layer(
    shards: Collection[ParameterShard], tied: TiedTable | None, tensor: Axis
) -> Counter[int]:
    """Return after how many captures a layer's sum can start: those that no other group joins.

    The first layer's waits for the embedding, if that is captured here.
    """
    expected = Counter(
        shard.layer for shard in shards if shard.layer is not None and shard.parameter.requires_grad
    )
    sends = tied is not None and tied.ends is not None  # to the last stage, which captures it
    embeds = not sends and any(s.name == "embedding.word_embeddings.weight" for s in shards)
    if embeds and expected and tensor.size > 1:
        del expected[min(expected)]
    return expected
