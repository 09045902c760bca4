"""Gradients of a layout beside those of one process: errors by kind of parameter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from proma_megatron.projection.units import kind_of

# Largest relative error of a tensor. In bfloat16 the forward pass of two layouts already differs in
# its third digit; docs/evidence/exactness.md has the figures.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.25}


@dataclass(frozen=True)
class KindError:
    """The largest relative error among the tensors of one kind."""

    kind: str
    tensors: int
    error: float  # |layout - one process| / |one process|, NaN if either is
    where: str  # the tensor

    def within(self, tolerance: float) -> bool:
        return self.error <= tolerance  # not so for NaN


def compare(layout: Path, alone: Path) -> list[KindError]:
    """Return the largest relative error of each kind of parameter, by its name.

    Raises:
        RuntimeError: the files don't hold the same tensors.
    """
    worst: dict[str, KindError] = {}
    with safe_open(layout, framework="pt") as left, safe_open(alone, framework="pt") as right:
        if set(left.keys()) != set(right.keys()):
            raise RuntimeError(f"{layout} and {alone} hold different tensors")
        for name in right.keys():  # noqa: SIM118, it is no mapping
            found, expected = left.get_tensor(name).double(), right.get_tensor(name).double()
            error = relative_error(found, expected)
            kind = kind_of(name)
            before = worst.get(kind, KindError(kind, 0, -1.0, name))
            worse = not error <= before.error and before.error == before.error
            worst[kind] = KindError(
                kind,
                before.tensors + 1,
                error if worse else before.error,
                name if worse else before.where,
            )
    return sorted(worst.values(), key=lambda found: found.kind)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ``|found - expected| / |expected|``; NaN if either holds NaN."""
    difference, norm = float((found - expected).norm()), float(expected.norm())
    if difference == 0:
        return 0.0
    return difference / norm if norm else float("inf")
