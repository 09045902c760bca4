"""What K and c say about an update, summed over units and microbatches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from proma_megatron.projection.rules import Solution


@dataclass
class Tally:
    """Running sums; sums of different ranks and replicas add up."""

    solved: float = 0.0  # units x microbatches with something accumulated before
    clamped: float = 0.0
    removed: float = 0.0  # sum of |removed|^2
    accumulated: float = 0.0  # sum of |A|^2 before projecting
    effective_rank: float = 0.0  # sum of (tr K)^2 / |K|_F^2, over k
    cosine: float = 0.0  # sum of mean pairwise cosines
    cosines: float = 0.0  # how many of them (k >= 2)
    residual: float = 0.0  # largest |<A - G beta, u_s>| / |A|

    def add(self, gram: torch.Tensor, energy: torch.Tensor, solution: Solution) -> None:
        """Count a batch of units: gram (U, k, k), energy |A|^2 (U,)."""
        k = gram.shape[-1]
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        trace = diagonal.sum(dim=-1)
        square = gram.square().sum(dim=(-2, -1))
        rank = torch.where(square > 0, trace.square() / square.clamp(min=1e-300), 0.0) / k
        norms = diagonal.clamp(min=0).sqrt()
        product = norms[..., :, None] * norms[..., None, :]
        cosine = torch.where(product > 0, gram / product.clamp(min=1e-300), 0.0)
        present = (norms > 0).sum(dim=-1)
        pairs = (present * (present - 1)).double()
        off = cosine.sum(dim=(-2, -1)) - cosine.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        mean = torch.where(pairs > 0, off / pairs.clamp(min=1), 0.0)
        relative = torch.where(energy > 0, solution.residual / energy.sqrt().clamp(min=1e-300), 0.0)
        # One transfer for everything: on a GPU each .item() would wait for the device.
        sums = torch.stack(
            [
                solution.clamped.double().sum(),
                solution.removed.sum(),
                energy.sum(),
                rank.sum(),
                mean.sum(),
                (pairs > 0).double().sum(),
                relative.max(),
            ]
        ).tolist()
        self.solved += gram.shape[0]
        self.clamped += sums[0]
        self.removed += sums[1]
        self.accumulated += sums[2]
        self.effective_rank += sums[3]
        self.cosine += sums[4]
        self.cosines += sums[5]
        self.residual = max(self.residual, sums[6])

    def merge(self, other: Tally) -> None:
        for name in vars(self):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, max(mine, theirs) if name == "residual" else mine + theirs)

    def metrics(self) -> dict[str, float]:
        """Fractions and means, empty where no unit was projected (a single microbatch)."""
        if not self.solved:
            return {}
        return {
            "projection/removed_energy": self.removed / self.accumulated if self.accumulated else 0,
            "projection/clamp_rate": self.clamped / self.solved,
            "projection/effective_rank": self.effective_rank / self.solved,
            "projection/cosine": self.cosine / self.cosines if self.cosines else 0.0,
            "projection/orthogonality_residual": self.residual,
        }
