"""What a checkpoint says of the model, the optimizer and the layout that it was saved with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proma_megatron.config.model import ComputeConfig, ModelConfig, ParallelConfig
from proma_megatron.config.trainer import OptimizerConfig
from proma_megatron.distributed.devices import describe
from proma_megatron.errors import ConfigError
from proma_megatron.runs.checkpoint_folder import Marker

if TYPE_CHECKING:
    from proma_megatron.distributed.topology import Topology

# A checkpoint's tensors have the shape that the rest says, whatever computes with them.
_NOT_SHAPE = {"path", "vocab_size", "init_std", *ComputeConfig.model_fields}


def shape_of(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Return what a marker says of a model."""
    return {**model.model_dump(mode="json", exclude=_NOT_SHAPE), "vocab_size": vocab_size}


def check_model(path: Path, marker: Marker, model: ModelConfig, vocab_size: int | None) -> None:
    """Check that the checkpoint is of a model of this shape; ConfigError if not.

    Args:
        vocab_size: None: not known yet, and not looked at.
    """
    for key, value in shape_of(model, vocab_size or 0).items():
        saved = marker.model.get(key, value)
        if saved != value and (key != "vocab_size" or vocab_size is not None):
            raise ConfigError(
                f"{path} is a checkpoint of another model: its model.{key} is {saved!r}, the "
                f"configuration's is {value!r}; use the configuration that it was saved with"
            )


def optimizer_of(model: ModelConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    """Return what a marker says of the form in which an optimizer keeps its state."""
    return {"model.dtype": model.dtype, "optimizer.distributed": optimizer.distributed}


def check_optimizer(
    path: Path, marker: Marker, model: ModelConfig, optimizer: OptimizerConfig
) -> None:
    """Check that an optimizer of this form can go on from the checkpoint; ConfigError if not."""
    for key, value in optimizer_of(model, optimizer).items():
        saved = marker.optimizer.get(key, value)
        if saved != value:
            raise ConfigError(
                f"{path} was saved with {key}={saved}, and a run can't go on from it with "
                f"{key}={value}; resume with {key}={saved}"
            )


def layout_of(topology: Topology) -> dict[str, Any]:
    """Return what a marker says of its layout, outside of which random states mean nothing."""
    return {
        "tensor": topology.tensor.size,
        "pipeline": topology.pipeline.size,
        "virtual_pipeline": topology.virtual_pipeline,
        "data": topology.data.size,
        "device": topology.device.type,
    }


def layout_in_words(layout: Mapping[str, Any]) -> str:
    """Describe a marker's layout to the user."""
    virtual = layout["virtual_pipeline"]
    parallel = ParallelConfig(
        tensor=layout["tensor"],
        pipeline=layout["pipeline"],
        virtual_pipeline=virtual if virtual > 1 else None,
        data=layout["data"],
    )
    return f"{describe(parallel)} on {layout['device']}"


def why_no_scaling(marker: Marker, now: Mapping[str, Any]) -> str:
    """Say why a checkpoint's memory of delayed scaling is of no use in this layout; "" if it is."""
    if "scaling" not in marker.holds:
        return "has none of its memory"
    if marker.layout != now:
        return "has its memory for another layout"
    return ""
