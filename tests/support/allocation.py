"""Jobs for the worker pool: what a rank really allocates and sends, to compare with a plan."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.live_bytes import LiveBytes
from proma_megatron.batching.packing import pack
from proma_megatron.config.model import ModelConfig
from proma_megatron.config.run import RunConfig
from proma_megatron.distributed.topology import Topology, layout
from proma_megatron.learner.optimizer import Optimizer
from proma_megatron.learner.schedule import forward_backward
from proma_megatron.losses.options import REINFORCE, UNIT
from proma_megatron.model.attention import KeyValueCache
from proma_megatron.model.build import build_policy
from proma_megatron.model.policy import Policy
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.rollout import megatron as generator
from proma_megatron.rollout.engine import SamplingOptions
from proma_megatron.rollout.megatron import generate
from proma_megatron.types import Microbatch, TrainingSequence

# --------------------------------------------------------------------------- what is live


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind these tensors, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


# --------------------------------------------------------------------------- what is sent


class SentBytes(TorchDispatchMode):
    """Bytes that this rank sends, with collectives as rings; see `planning/traffic.py`."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            kind = name.split(".")[1].strip("_")
            sizes = [t.nbytes for t in tree_iter(args) if isinstance(t, torch.Tensor)]
            self.sent[kind] = self.sent.get(kind, 0) + _sent(kind, sizes, _ranks(args))
        return func(*args, **(kwargs or {}))


def _ranks(args: tuple[Any, ...]) -> int:
    """Of the process group among an operator's arguments."""
    for found in args:
        if isinstance(found, torch.ScriptObject) and "ProcessGroup" in str(found._type()):
            return dist.ProcessGroup.unbox(found).size()
    raise AssertionError(f"no process group among {args}")


def _sent(kind: str, sizes: list[int], ranks: int) -> int:
    if kind in ("allreduce", "allreduce_coalesced"):
        return 2 * (ranks - 1) * sum(sizes) // ranks
    if kind == "send":
        return sum(sizes)
    if "allgather" in kind or "reduce_scatter" in kind:
        return (ranks - 1) * max(sizes) // ranks  # the largest tensor is the whole
    return 0  # broadcasts of shapes and metrics, and what is received


# --------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Held:
    """Bytes of one rank after an optimizer step."""

    stage: int
    weights: int
    main_gradients: int
    optimizer: int  # without step counters
    parameters: int
    first_replica: bool
    first_tensor_rank: bool


def resident_bytes(device: torch.device, config: RunConfig, vocab_size: int) -> Held:
    """What weights, main gradients and the optimizer take on this rank."""
    with layout(config.parallel, device, 0) as topology:
        policy = _policy(config, vocab_size, topology)
        parameters = [shard.parameter for shard in policy.shards]
        before = storage_bytes(parameters)
        with LiveBytes() as live:
            stepper = Optimizer(policy, config.optimizer, 10)
            stepper.step()
            gc.collect()
        scalars = sum(size for size in live.sizes if size == 4) // 4
        held = _optimizer_tensors(stepper, parameters)
        # Whatever else was made is a step counter or a flag: no more than a number each.
        assert 0 <= live.now - held <= 4 * scalars, (live.now, held, scalars)
        assert storage_bytes(parameters) == before
        return Held(
            stage=topology.pipeline.rank,
            weights=before,
            main_gradients=storage_bytes(p.main_grad for p in parameters),  # type: ignore[attr-defined]
            optimizer=held,
            parameters=sum(p.numel() for p in parameters),
            first_replica=topology.data.rank == 0,
            first_tensor_rank=topology.tensor.rank == 0,
        )


def _optimizer_tensors(stepper: Optimizer, parameters: list[torch.nn.Parameter]) -> int:
    """Bytes of Adam's moments and of the weights that the optimizer keeps beside the model's."""
    models = {p.untyped_storage()._cdata for p in parameters}
    groups = stepper.optimizer.param_groups
    updated = [p for group in groups for p in group["params"]]
    masters = [p for p in updated if p.untyped_storage()._cdata not in models]
    states = [dict(state) for _, state in stepper.optimizer.state.items()]
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    return storage_bytes([*masters, *moments])


def training_peak(
    device: torch.device, config: RunConfig, vocab_size: int, microbatches: int
) -> tuple[int, int]:
    """This rank's stage, and the peak of one optimizer step's microbatches, all of full size."""
    live = LiveBytes()
    return _train_under(live, device, config, vocab_size, microbatches), live.peak


def sent_in_training(
    device: torch.device, config: RunConfig, vocab_size: int, microbatches: int
) -> tuple[int, dict[str, int]]:
    """This rank's stage, and what it sends while gradients are computed, by collective."""
    sent = SentBytes()
    return _train_under(sent, device, config, vocab_size, microbatches), sent.sent


def _train_under(
    mode: LiveBytes | SentBytes,
    device: torch.device,
    config: RunConfig,
    vocab_size: int,
    microbatches: int,
) -> int:
    """Gradients of full microbatches, watched by ``mode``; this rank's stage."""
    with layout(config.parallel, device, 0) as topology:
        policy = _policy(config, vocab_size, topology)
        accumulator = _accumulator(config, policy)
        options = UNIT if accumulator else REINFORCE
        batches = full_microbatches(config, vocab_size, microbatches, topology)
        with mode:
            forward_backward(policy, batches, options, accumulator=accumulator)
        return topology.pipeline.rank


@dataclass(frozen=True)
class Decoded:
    stage: int
    cache: int  # bytes of the key-value cache
    dropping: int  # bytes that dropping a quarter of the rows takes at its peak
    peak: int  # bytes of the whole generation at its peak


def sent_in_rollout(
    device: torch.device, config: RunConfig, vocab_size: int, sequences: int
) -> tuple[int, dict[str, int]]:
    """This rank's stage, and what it sends while full-length completions are sampled."""
    rollout = config.rollout
    with layout(config.parallel, device, 0) as topology:
        policy = _policy(config, vocab_size, topology)
        prompts = [[1 + i] * rollout.max_prompt_tokens for i in range(sequences)]
        noise = torch.rand((sequences, rollout.max_new_tokens), dtype=torch.float64)
        with SentBytes() as sent:
            generate(policy, prompts, noise, (-1,), sampling(config))
        return topology.pipeline.rank, sent.sent


def sampling(config: RunConfig) -> SamplingOptions:
    rollout = config.rollout
    return SamplingOptions(
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        max_new_tokens=rollout.max_new_tokens,
        batch_size=rollout.batch_size,
    )


def rollout_peak(device: torch.device, config: RunConfig, vocab_size: int) -> Decoded:
    """A decoding batch in which every prompt and completion has its full length."""
    rollout = config.rollout
    caches: list[KeyValueCache] = []

    class Noted(KeyValueCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            caches.append(self)

    with layout(config.parallel, device, 0) as topology:
        policy = _policy(config, vocab_size, topology)
        # All different, the fullest case: samples of one prompt would share what it costs.
        prompts = [[1 + i] * rollout.max_prompt_tokens for i in range(rollout.batch_size)]
        noise = torch.rand((len(prompts), rollout.max_new_tokens), dtype=torch.float64)
        original, generator.KeyValueCache = generator.KeyValueCache, Noted
        try:
            with LiveBytes() as live:
                generate(policy, prompts, noise, (-1,), sampling(config))
        finally:
            generator.KeyValueCache = original
        (cache,) = caches
        size = storage_bytes(t for pair in cache.layers.values() for t in pair)
        with LiveBytes(net=True) as dropping:
            cache.keep(torch.arange(rollout.batch_size * 3 // 4))
        return Decoded(topology.pipeline.rank, size, dropping.peak, live.peak)


def full_microbatches(
    config: RunConfig, vocab_size: int, count: int, topology: Topology
) -> list[Microbatch]:
    """Microbatches of as many full-length sequences as the token budget holds."""
    length = config.max_sequence_length
    sequences = config.batching.tokens_per_microbatch // length
    generator_ = torch.Generator().manual_seed(0)

    def sequence() -> TrainingSequence:
        tokens = torch.randint(0, vocab_size, (length,), generator=generator_).tolist()
        advantage = float(torch.randn((), generator=generator_))
        return TrainingSequence(
            tuple(tokens), (0,) + (1,) * (length - 1), advantage, (0.0,) * length
        )

    multiple = topology.tensor.size if topology.sequence_parallel else 1
    found = [
        pack([sequence() for _ in range(sequences)], i, 1000.0, topology.device, multiple)
        for i in range(count)
    ]
    for microbatch in found:
        assert microbatch.sequences.count == sequences  # made here, not within what is measured
    return found


def _policy(config: RunConfig, vocab_size: int, topology: Topology) -> Policy:
    model: ModelConfig = config.model
    return build_policy(
        model,
        vocab_size,
        config.max_sequence_length,
        topology,
        seed=0,
        distributed_optimizer=config.optimizer.distributed,
    )


def _accumulator(config: RunConfig, policy: Policy) -> Accumulator | None:
    if not config.projects:
        return None
    return Accumulator.of(policy, config.projection)
