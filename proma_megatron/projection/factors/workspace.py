"""Memory for sequence gradients, kept from one group of captures to the next.

Sequence gradients of a layer are the largest tensors of a projected backward pass, and die when the
layer is solved. Fresh pages for each cost more on a CPU than what is done with them: 26 ms for
100 MiB, of which 4 are for writing (docs/evidence/cost.md). So groups take turns in one piece of
memory, which grows to what the fullest group took. On a GPU it is given back when the step ends, to
whom torch's allocator likes; on a CPU it stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from proma_megatron.projection.sizes import BLOCK_BYTES

_ALIGNMENT = 256  # bytes; of every piece that is handed out


class Workspace:
    """Half of ``limit`` is for what is kept until a group is solved, half for blocks in passing."""

    def __init__(self, limit: float, device: torch.device) -> None:
        """Begin with nothing allocated.

        Args:
            limit: bytes.
        """
        self.half = int(limit) // 2
        self.block_bytes = max(1, min(self.half, BLOCK_BYTES))
        self.held = 0  # bytes that have been taken since the last `free`
        self._device = device
        self._kept = _Piece(device)
        self._passing = _Piece(device)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Hand out memory, not initialized, until `free`."""
        size = prod(shape) * dtype.itemsize
        start = -(-self.held // _ALIGNMENT) * _ALIGNMENT
        self.held = start + size
        return self._kept.part(start, size).view(dtype).view(*shape)

    def scratch(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Hand out memory, not initialized, until the next call."""
        return self._passing.part(0, prod(shape) * dtype.itemsize).view(dtype).view(*shape)

    def free(self) -> None:
        """Make all free again that was taken."""
        self.held = 0

    def release(self) -> None:
        """Give the memory of a GPU back; nothing of it is in use."""
        self.held = 0
        if self._device.type == "cpu":
            return
        self._kept = _Piece(self._device)
        self._passing = _Piece(self._device)


class _Piece:
    """A buffer that grows when nobody uses it, which is when its start is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._wanted = 0

    def part(self, start: int, size: int) -> torch.Tensor:
        """Hand out (size,) bytes of it; of their own as long as it can't grow."""
        self._wanted = max(self._wanted, start + size)
        if start == 0 and self._wanted > self._buffer.numel():
            self._buffer = self._buffer.new_empty(0)  # the old one goes before the new one comes
            self._buffer = self._buffer.new_empty(self._wanted)
        if start + size > self._buffer.numel():
            return self._buffer.new_empty(size)
        return self._buffer[start : start + size]
