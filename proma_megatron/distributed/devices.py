"""Which device a run takes and how many processes its layout needs, known before Megatron loads."""

from __future__ import annotations

from typing import Literal

import torch

from proma_megatron.config.fp8 import RECIPES
from proma_megatron.config.model import ComputeConfig, ParallelConfig
from proma_megatron.config.run import RunConfig
from proma_megatron.distributed.libraries import transformer_engine_problem
from proma_megatron.errors import ConfigError

Backend = Literal["torch", "transformer_engine"]


def choose_device(requested: str, local_world_size: int) -> str:
    """Return "cuda" when every worker of this node can have a GPU of its own, else "cpu".

    Raises:
        ConfigError: GPUs were asked for and there are too few; NCCL can't share one.
    """
    available = torch.cuda.device_count()
    if requested == "cuda" and available < local_world_size:
        raise ConfigError(
            f"device is 'cuda' and this node has {available} of the {local_world_size} GPUs that "
            "the layout needs; use a smaller layout or device=cpu"
        )
    if requested == "cpu" or available < local_world_size:
        return "cpu"
    return "cuda"


def check_precision(config: RunConfig, device: str) -> None:
    """Check that layers and optimizer take this precision there; ConfigError if not."""
    check_backend(config.model, device)
    if device == "cuda" and config.model.dtype == "float64" and config.optimizer.clip_grad > 0:
        raise ConfigError(
            "model.dtype is float64 on GPUs, where Megatron's gradient clipping takes float32 "
            "only; set optimizer.clip_grad=0, or device=cpu"
        )


def choose_backend(model: ComputeConfig, device: str) -> Backend:
    """Return whose linear layers and attention a model has on this kind of device.

    Raises:
        ConfigError: it asks for Transformer Engine, or for FP8, where there is none.
    """
    if model.backend == "torch":
        return "torch"
    wanted = "model.backend is 'transformer_engine'"
    if model.backend == "auto":
        if model.fp8 == "none" and (device == "cpu" or model.dtype != "bfloat16"):
            return "torch"
        wanted = f"model.fp8 is '{model.fp8}', which is Transformer Engine's"
    if device == "cpu":
        raise ConfigError(
            f"{wanted}, but the run is on the CPU; use model.backend=torch model.fp8=none, or GPUs"
        )
    problem = transformer_engine_problem()
    if problem is None:
        return "transformer_engine"
    if model.backend == "auto" and model.fp8 == "none":
        return "torch"
    raise ConfigError(f"{wanted}, but {problem}, or use model.backend=torch model.fp8=none")


def check_backend(model: ComputeConfig, device: str) -> None:
    """Check that this machine has what the model computes with; ConfigError if not."""
    choose_backend(model, device)
    if model.fp8 == "none":
        return
    capability = torch.cuda.get_device_capability()
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    cuda = (int(major), int(minor))
    problem = RECIPES[model.fp8].refusal(capability, cuda)
    if problem is not None:
        fits = [
            f"model.fp8={name}"
            for name, rules in RECIPES.items()
            if rules.refusal(capability, cuda) is None
        ]
        raise ConfigError(
            f"model.fp8 is '{model.fp8}', which needs {problem}; use "
            + " or ".join([*fits, "model.fp8=none"])
        )


def check_replicas(config: RunConfig, world: int) -> None:
    """Check that every replica gets the same number of prompts; ConfigError if not.

    The number of replicas may be known only now, from the processes that torchrun started.
    """
    check_world_size(config.parallel, world)
    replicas = world // config.parallel.model_size
    shares = replicas * config.batching.minibatches
    if config.rollout.prompts_per_step % shares:
        raise ConfigError(
            f"rollout.prompts_per_step is {config.rollout.prompts_per_step}, expected a multiple "
            f"of {replicas} replicas x batching.minibatches = {shares}"
        )


def check_world_size(parallel: ParallelConfig, world: int) -> None:
    """Check that ``world`` processes make up this layout; ConfigError if not."""
    model = parallel.model_size
    if parallel.data is None:
        if world % model:
            raise ConfigError(
                f"{world} processes were started, which parallel.tensor x parallel.pipeline = "
                f"{model} does not divide; start a multiple of {model}"
            )
    elif world != model * parallel.data:
        raise ConfigError(
            f"{world} processes were started, expected parallel.tensor x pipeline x data = "
            f"{parallel.tensor} x {parallel.pipeline} x {parallel.data} = {model * parallel.data}; "
            "change the layout or the number of processes"
        )


def describe(parallel: ParallelConfig) -> str:
    """Describe a layout in words."""
    if parallel.world_size == 1:
        return "one process"
    parts = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}"]
    if parallel.virtual_pipeline:
        parts.append(f"virtual {parallel.virtual_pipeline}")
    parts.append(f"data {parallel.data or 1}")
    return " x ".join(parts) + (", sequence parallel" if parallel.sequence else "")


def ranks_on(count: int, device: str) -> str:
    backend = "NCCL" if device == "cuda" else "Gloo"
    return f"{count} worker{'s' if count > 1 else ''} on {device} ({backend})"
