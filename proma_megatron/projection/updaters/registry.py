"""Which updater works for which rule; `config.choices` has what each algorithm may name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.distributed.topology import Axis
from proma_megatron.projection.updaters.intra_proma import IntraPromaUpdater
from proma_megatron.projection.updaters.isopo import IsopoUpdater
from proma_megatron.projection.updaters.proma import PromaUpdater
from proma_megatron.projection.updaters.updater import Updater


class _Maker(Protocol):
    """How an updater is made: with the compute dtype, whose rounding sequence gradients carry."""

    def __call__(
        self, config: ProjectionConfig, tensor: Axis, dtype: torch.dtype
    ) -> Updater[Any, Any, Any]: ...


# Without "none", with which Megatron accumulates by itself.
UPDATERS: Mapping[str, _Maker] = {
    "exact": PromaUpdater,
    "iterative": PromaUpdater,
    "ridge": PromaUpdater,
    "subspace": IntraPromaUpdater,
    "kernel": IsopoUpdater,
    "norm": IsopoUpdater,
}


def make_updater(
    config: ProjectionConfig, tensor: Axis, dtype: torch.dtype
) -> Updater[Any, Any, Any]:
    """Make the updater of a configuration's rule.

    Args:
        tensor: over whose ranks a weight is cut.
        dtype: the one that the model computes in.

    Raises:
        ValueError: the rule has no updater.
    """
    if config.rule not in UPDATERS:
        raise ValueError(
            f"projection.rule={config.rule} has no updater, and needs no accumulator; expected one "
            f"of {', '.join(UPDATERS)}"
        )
    return UPDATERS[config.rule](config, tensor, dtype)
