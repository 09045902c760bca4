"""What a run needs, by arithmetic alone: no Megatron, no device and no file is touched.

Weights, main gradients, optimizer state and the key-value cache are exact. Activations, logits and
workspace follow from what this code's operators keep, and agree with the peak of live tensors of
real passes on the CPU (tests/planning); what FP8 layers keep, with what Transformer Engine's Python
keeps there (tests/te). On a GPU they are unmeasured: there torch's fused norms should need fewer
temporaries than are counted, and flash attention's backward a few more. The CUDA context, NCCL's
buffers and the allocator's fragments come on top: one or two GiB, more with many groups.

The fullest microbatch holds `batching.tokens_per_microbatch` tokens in rows of full length.
Attention unpacks a microbatch into sequences x longest, so one long sequence among many short ones
takes more than planned here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from proma_megatron.config.run import RunConfig
from proma_megatron.planning.counts import Counts, count
from proma_megatron.planning.decoding import rollout_moments
from proma_megatron.planning.knobs import Knob, find_knobs
from proma_megatron.planning.quantized import weight_copies
from proma_megatron.planning.resident import Resident, resident
from proma_megatron.planning.shapes import Precision, Stage, stages, total_parameters
from proma_megatron.planning.sizes import Sizes
from proma_megatron.planning.traffic import Traffic, traffic
from proma_megatron.planning.training import Moment, in_flight, training_moments

FP8 = "FP8 weights"  # a kind that most runs have nothing of
TIGHT = 0.9  # of a GPU's memory: beyond this what is not counted here may not fit


@dataclass(frozen=True)
class StagePlan:
    """One rank of a pipeline stage; the other tensor ranks and replicas need no more."""

    stage: int
    layers: int
    parameters: int  # on one rank, vocabulary padding included
    in_flight: int  # microbatches (of a model chunk) that wait for their backward, at most
    resident: Resident
    training: tuple[Moment, ...]
    update: Moment
    rollout: tuple[Moment, ...]
    traffic: Traffic  # in one RL step

    @property
    def peak_training(self) -> Moment:
        return max(self.training, key=lambda moment: moment.total)

    @property
    def peak_rollout(self) -> Moment:
        return max(self.rollout, key=lambda moment: moment.total)

    @property
    def peak(self) -> Moment:
        """The fullest moment of the whole step; phases follow one another."""
        phases = (self.peak_training, self.update, self.peak_rollout)
        return max(phases, key=lambda moment: moment.total)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.resident.total + self.peak.total

    def kinds(self, moment: Moment) -> dict[str, int]:
        """Return bytes by kind at a moment; they add up to what the rank holds then."""
        return {
            "weights": self.resident.weights,
            FP8: moment.fp8_weights,
            "main gradients": self.resident.main_gradients,
            "optimizer": self.resident.optimizer,
            "activations": moment.activations,
            "logits": moment.logits,
            "KV cache": moment.kv_cache,
            "workspace": moment.workspace,
        }


@dataclass(frozen=True)
class Plan:
    """Everything `proma plan` says."""

    parameters: int  # of the unsharded model
    gpus: int
    nodes: int
    gpu_memory: int  # bytes
    counts: Counts
    stages: tuple[StagePlan, ...]
    host_snapshot: int  # bytes of host memory on a rank: earlier weights that KL compares with
    projection_removes: bool | None  # None: no projection; False: there is nothing to project from
    knobs: tuple[Knob, ...]  # what saves memory, the most first

    @property
    def fullest(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def needed(self) -> int:
        """Bytes on the fullest rank."""
        return self.fullest.total

    @property
    def fits(self) -> bool:
        return self.needed <= self.gpu_memory

    @property
    def tight(self) -> bool:
        """Whether it fits with less room than the uncounted may take."""
        return self.fits and self.needed > TIGHT * self.gpu_memory

    def as_dict(self) -> dict[str, Any]:
        """Return the same as JSON-able values, in bytes."""
        found = dataclasses.asdict(self)
        for stage, planned in zip(found["stages"], self.stages, strict=True):
            stage["total"] = planned.total
            stage["peak"] = planned.peak.name
            stage["kinds"] = planned.kinds(planned.peak)
            stage["traffic"]["total"] = planned.traffic.total
        found |= {"needed": self.needed, "fits": self.fits, "tight": self.tight}
        return found


def make_plan(
    config: RunConfig, vocab_size: int, *, gpu_memory: int, gpus_per_node: int = 8
) -> Plan:
    """Plan memory, microbatches and traffic of a run, and what would lower the memory.

    Args:
        config: with the model's whole shape; ``parallel.data`` left open counts as 1.
        vocab_size: rows of the embedding; the layout pads them to a multiple of TP.
        gpu_memory: bytes of one GPU.

    Raises:
        ValueError: a number that must be positive is not.
    """
    for name, value in (
        ("vocab_size", vocab_size),
        ("gpu_memory", gpu_memory),
        ("gpus_per_node", gpus_per_node),
    ):
        if value <= 0:
            raise ValueError(f"{name} is {value}, expected a positive number")
    plan = _plan(config, vocab_size, gpu_memory, gpus_per_node)

    def needed(changed: RunConfig) -> int:
        return _plan(changed, vocab_size, gpu_memory, gpus_per_node).needed

    knobs = find_knobs(config, needed, plan.needed, gpu_memory, gpus_per_node)
    return dataclasses.replace(plan, knobs=knobs)


def _plan(config: RunConfig, vocab_size: int, gpu_memory: int, gpus_per_node: int) -> Plan:
    counts = count(config)
    sizes = Sizes.of(config, vocab_size, counts)
    planned = tuple(
        _stage(config, stage, sizes, counts, vocab_size) for stage in stages(config, vocab_size)
    )
    gpus = config.parallel.world_size
    entries = max(stage.parameters for stage in planned)
    # The running mean is kept in float32 or better.
    lagged = max(4, sizes.precision.compute) if config.trainer.kl_lagged_every else 0
    return Plan(
        parameters=total_parameters(config, vocab_size),
        gpus=gpus,
        nodes=-(-gpus // gpus_per_node),
        gpu_memory=gpu_memory,
        counts=counts,
        stages=planned,
        host_snapshot=entries * (sizes.precision.compute + lagged),
        projection_removes=(
            counts.microbatches > 1 or config.projection.acts_alone if config.projects else None
        ),
        knobs=(),
    )


def _stage(
    config: RunConfig, stage: Stage, sizes: Sizes, counts: Counts, vocab_size: int
) -> StagePlan:
    precision = Precision.of(config.model.dtype)
    replicas = config.parallel.data or 1
    held = resident(stage, precision, replicas, distributed=config.optimizer.distributed)
    # torch's Adam updates all parameters at once on a GPU, with one temporary of their size.
    update = Moment(
        "update",
        workspace=held.optimizer_entries * precision.state,
        fp8_weights=weight_copies(config, stage),
    )
    training = training_moments(config, stage, sizes, counts)
    if config.warm_start.steps and config.projects:
        # Supervised steps go through Megatron's own accumulation.
        plain = config.model_copy(update={"algorithm": "reinforce"})
        unprojected = Sizes.of(plain, vocab_size, counts)
        training += tuple(
            dataclasses.replace(moment, name=f"warm start: {moment.name}")
            for moment in training_moments(plain, stage, unprojected, counts)
        )
    return StagePlan(
        stage=stage.index,
        layers=stage.layers,
        parameters=sum(parameter.count for parameter in stage.parameters),
        in_flight=in_flight(config, counts, stage.index),
        resident=held,
        training=training,
        update=update,
        rollout=rollout_moments(config, stage, sizes, counts),
        traffic=traffic(config, stage, sizes, counts, held),
    )
