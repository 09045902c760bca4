"""Jobs for ranks with Transformer Engine's Python in them."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.live_bytes import LiveBytes
from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.config.run import RunConfig
from proma_megatron.distributed.topology import layout
from proma_megatron.learner.gradients import denominator, replica_share
from proma_megatron.learner.learner import Learner
from proma_megatron.learner.optimizer import Optimizer
from proma_megatron.learner.schedule import forward_backward
from proma_megatron.losses.options import UNIT
from proma_megatron.model.build import build_policy
from proma_megatron.model.capture import Operands, captured_layers
from proma_megatron.model.policy import Policy
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.types import Microbatch, TrainingSequence
from support.allocation import full_microbatches, storage_bytes
from support.gradients import Batch, _policy

# Every dimension is a multiple of 128, which FP8 in blocks asks for.
WIDE = ModelConfig(
    hidden_size=128,
    ffn_hidden_size=256,
    layers=3,
    heads=8,
    kv_heads=8,
    head_dim=32,
    init_std=0.05,
    dtype="bfloat16",
)


@dataclass
class Recorder:
    """A sink that keeps everything; it adds nothing to any gradient."""

    in_bfloat16: bool = True
    compares: bool = False
    compares_now: bool = True
    operands: dict[int, Operands] = field(default_factory=dict)  # by the weight's id
    biases: dict[int, torch.Tensor | None] = field(default_factory=dict)
    compared: dict[int, tuple[Operands, Operands]] = field(default_factory=dict)

    def linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, dy: torch.Tensor
    ) -> None:
        assert id(weight) not in self.operands, "handed over twice"
        self.operands[id(weight)] = Operands(x, dy)
        self.biases[id(weight)] = bias

    def compare(self, weight: torch.Tensor, high: Operands, low: Operands) -> None:
        assert id(weight) not in self.operands, "the comparison comes first"
        self.compared[id(weight)] = high, low

    def scale(self, *_: Any) -> None: ...

    def embedding(self, *_: Any) -> None: ...

    # of an accumulator
    def begin(self) -> None: ...

    def begin_backward(self, chunk: int, microbatch: Microbatch) -> None: ...

    def finish(self, microbatches: int) -> None: ...

    layers: list[Any] = field(default_factory=list)

    def enable(self, on: bool) -> None:
        for layer in self.layers:
            layer.sink = self if on else None


@contextlib.contextmanager
def _noted_inputs(policy: Policy) -> Iterator[dict[int, Operands]]:
    """What goes into each of TE's layers, and the gradients of what comes out, by the weight."""
    inputs: dict[int, torch.Tensor] = {}
    found: dict[int, Operands] = {}

    def forward(layer: Any, arguments: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        inputs[id(layer.weight)] = arguments[0].detach().clone()
        out = output[0]

        def backward(dy: torch.Tensor) -> None:
            found[id(layer.weight)] = Operands(inputs[id(layer.weight)], dy.clone())

        if out.requires_grad:
            out.register_hook(backward)

    handles = [
        layer.register_forward_hook(forward)
        for module in policy.modules
        for layer in captured_layers(module)
        if hasattr(layer, "wgrad_store")
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _gathered(policy: Policy, layer: Any, noted: Operands) -> Operands:
    """Whole over the tokens, which sequence parallelism cuts at one end of a layer."""
    tensor = policy.topology.tensor

    def whole(x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(tensor.size)]
        torch.distributed.all_gather(parts, x.contiguous(), group=tensor.group)
        return torch.cat(parts)

    x, dy = noted
    if policy.topology.sequence_parallel and layer.parallel_mode == "column":
        x = whole(x)
    elif policy.topology.sequence_parallel:
        dy = whole(dy)
    return Operands(x.flatten(0, -2), dy.flatten(0, -2))


@dataclass(frozen=True)
class Seen:
    """What a sink got of one layer, as relative errors against what went through the layer."""

    x: float
    dy: float
    high: float | None  # of a comparison: the operands that are said to be those before FP8
    low: float | None  # and those that FP8 has
    product: float  # dY^T X against the weight gradient that TE forms by itself
    fp8: bool  # whether the layer computed in it
    rows: int  # tokens that it saw


def seen(
    device: torch.device,
    model: ModelConfig,
    parallel: ParallelConfig,
    batch: Batch,
    in_bfloat16: bool,
    compares: bool = False,
    factory: str | None = None,
) -> dict[str, Seen]:
    """One microbatch through FP8 layers, by weight.

    Args:
        factory: of quantizers, by its import path, in place of the recipe's own.
    """

    def policies() -> Any:
        # Delayed scaling would go on to reduce its maxima over the groups of an earlier layout.
        _forget_scales()
        return _policy(device, model, parallel)

    def set_up(policy: Policy) -> list[Microbatch]:
        if factory is not None:
            policy.config.fp8_recipe = "custom"  # type: ignore[assignment]
            policy.config.fp8_quantizer_factory = factory
        return replica_share(batch, 0, 1, policy, denominator(batch))

    with policies() as policy:
        forward_backward(policy, set_up(policy), UNIT)
        alone = {
            shard.name: shard.parameter.main_grad.clone()  # type: ignore[attr-defined]
            for shard in policy.shards
        }
    with policies() as policy:
        layers = [layer for module in policy.modules for layer in captured_layers(module)]
        recorder = Recorder(in_bfloat16, compares, layers=layers)
        with _noted_inputs(policy) as noted:
            forward_backward(policy, set_up(policy), UNIT, accumulator=recorder)
        # The recorder adds nothing, and so nobody may have.
        handed = {*noted, *(id(bias) for bias in recorder.biases.values() if bias is not None)}
        assert (len(handed) > len(noted)) is model.qkv_bias
        for shard in policy.shards:
            if id(shard.parameter) in handed:
                assert not bool(shard.parameter.main_grad.any()), shard.name  # type: ignore[attr-defined]
        by_weight = {id(layer.weight): layer for layer in layers}
        found = {}
        for shard in policy.shards:
            key = id(shard.parameter)
            if key not in noted:
                continue
            original = _gathered(policy, by_weight[key], noted[key])
            x, dy = recorder.operands[key]
            high, low = recorder.compared.get(key, (None, None))
            found[shard.name] = Seen(
                x=_error(x, original.x),
                dy=_error(dy, original.dy),
                high=None if high is None else _worst(high, original),
                low=None if low is None else _worst(low, original),
                product=_error(dy.float().t() @ x.float(), alone[shard.name]),
                fp8=bool(by_weight[key].fp8),
                rows=len(x),
            )
        return found


def _forget_scales() -> None:
    from transformer_engine.pytorch.quantization import (  # type: ignore
        FP8GlobalStateManager,
    )

    FP8GlobalStateManager.reset()


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype in (expected.dtype, torch.float32)
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def _worst(found: Operands, expected: Operands) -> float:
    return max(_error(found.x, expected.x), _error(found.dy, expected.dy))


def hybrid_factory(role: Any) -> Any:
    """FP8 with a scale a tensor for the products forward and towards the input, else bfloat16."""
    from transformer_engine.pytorch.custom_recipes.quantizer_factories import (  # type: ignore
        current_scaling_factory,
    )
    from transformer_engine.pytorch.tensor.hybrid_tensor import HybridQuantizer  # type: ignore
    from transformer_engine.pytorch.tensor.identity_tensor import (  # type: ignore
        IdentityQuantizer,
    )

    quantizer = current_scaling_factory(role)
    if role is None or role.tensor_type not in ("input", "grad_output"):
        return quantizer
    return HybridQuantizer(rowwise_quantizer=quantizer, columnwise_quantizer=IdentityQuantizer())


def checkpoint_entries(
    device: torch.device, model: ModelConfig, parallel: ParallelConfig
) -> dict[str, tuple[Any, ...]]:
    """Name, shape and place of what this rank's checkpoint holds of the model."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from proma_megatron.checkpoints.sharded import Contents, shards

    with _policy(device, model, parallel) as policy:
        entries = list(nested_values(shards(Contents(policy), loading=False)["model0"]))
        return {
            entry.key: (type(entry).__name__, tuple(getattr(entry, "global_offset", ())))
            for entry in entries
        }


def parameters(
    device: torch.device, model: ModelConfig, parallel: ParallelConfig
) -> list[tuple[Any, ...]]:
    """This rank's parameters in order, and what Megatron's DDP and gradient norm read of them."""
    marks = ("tensor_model_parallel", "partition_dim", "sequence_parallel", "allreduce")
    with _policy(device, model, parallel) as policy:
        return [
            (
                name,
                tuple(parameter.shape),
                parameter.dtype,
                *(getattr(parameter, mark, None) or None for mark in marks),
            )
            for module in policy.modules
            for name, parameter in module.named_parameters()
        ]


def products(
    device: torch.device, model: ModelConfig, batch: Batch, in_bfloat16: bool
) -> list[str]:
    """What each GEMM of TE's reads in a pass whose weight gradients a sink takes over."""
    from support import te_kernels

    with _policy(device, model, ParallelConfig()) as policy:
        layers = [layer for module in policy.modules for layer in captured_layers(module)]
        microbatches = replica_share(batch, 0, 1, policy, denominator(batch))
        te_kernels.RECORDED.clear()
        recorder = Recorder(in_bfloat16, layers=layers)
        forward_backward(policy, microbatches, UNIT, accumulator=recorder)
        return list(te_kernels.RECORDED)


def unlike_passes(device: torch.device, model: ModelConfig, batch: Batch) -> int:
    """As many passes as this replica's number says, without a reduction at their end."""
    with _policy(device, model, ParallelConfig(data=2)) as policy:
        microbatches = replica_share(batch, 0, 1, policy, denominator(batch))
        passes = policy.topology.data.rank + 1
        for _ in range(passes):
            forward_backward(policy, microbatches, UNIT, reduce=False)
        torch.distributed.barrier()
    return passes


def rollout_precisions(device: torch.device, model: ModelConfig) -> tuple[set[str], set[str]]:
    """What the GEMMs of a rollout's forward and of a training forward read; of the stand-ins."""
    from support import te_kernels

    with _policy(device, model, ParallelConfig()) as policy:
        batch = [[_sequence(5)]]
        (microbatch,) = replica_share(batch, 0, 1, policy, 1.0)
        found = []
        for context in (policy.rollout_mode, contextlib.nullcontext):
            te_kernels.RECORDED.clear()
            with context(), torch.no_grad(), policy.topology.megatron_calls():
                policy.forward_packed(policy.chunks[0], microbatch)
            found.append(set(te_kernels.RECORDED))
        return found[0], found[1]


def _sequence(length: int) -> TrainingSequence:
    tokens = tuple(range(1, length + 1))
    return TrainingSequence(tokens, (0, *[1] * (length - 1)), 1.0, (0.0,) * length)


def capture_check(device: torch.device, fp8: str) -> tuple[str, str]:
    """What `Learner.check_capture` says of a policy, and when one layer keeps its gradient."""
    model = WIDE.model_copy(update={"fp8": fp8})
    operands = "fp8" if fp8 == "delayed" else "bfloat16"
    config = RunConfig.model_validate(
        {"name": "a", "model": model.model_dump(), "projection": {"fp8_operands": operands}}
    )
    said = []
    with _policy(device, model, ParallelConfig()) as policy:
        accumulator = Accumulator.of(policy, config.projection)
        learner = Learner(config, policy, accumulator)
        for broken in (False, True):
            lost = policy.modules[0].decoder.layers[1].mlp.linear_fc2
            if broken:
                lost.hand_over = lambda operands: None
            try:
                learner.check_capture()
            except RuntimeError as error:
                said.append(str(error))
            else:
                gradients = [shard.parameter.main_grad for shard in policy.shards]  # type: ignore[attr-defined]
                assert not any(bool(gradient.any()) for gradient in gradients)
                said.append("every weight arrives")
    return said[0], said[1]


@dataclass(frozen=True)
class HeldByLayers:
    """Bytes on this rank once a forward pass is over; storages, each once."""

    stage: int
    fp8_weights: int
    in_rollout: int  # of those, what is left then
    kept: int  # for backward, and by the pass itself


def held_after_forward(
    device: torch.device, config: RunConfig, vocab_size: int, compares: bool
) -> HeldByLayers:
    """What TE's Python leaves behind of one full microbatch; FP8 weights are there before it."""
    kept = 0
    with layout(config.parallel, device, 0) as topology:
        policy = build_policy(
            config.model, vocab_size, config.max_sequence_length, topology, seed=0
        )
        batches = full_microbatches(config, vocab_size, 2, topology)
        accumulator = Accumulator.of(policy, config.projection) if config.projects else None
        if accumulator is not None:
            accumulator.begin()
            accumulator.enable(True)
            if compares:
                assert accumulator.gate is not None
                accumulator.gate.arm(batches)
        (chunk,) = policy.chunks
        (module,) = policy.modules
        with topology.megatron_calls():
            for batch in batches:
                if not topology.is_first_stage:
                    width = batch.num_tokens // (
                        topology.tensor.size if topology.sequence_parallel else 1
                    )
                    hidden = torch.randn(width, 1, config.model.hidden_size, dtype=torch.bfloat16)
                    module.set_input_tensor(hidden.requires_grad_())
                with LiveBytes() as live:
                    output = policy.forward_packed(chunk, batch)
                    gc.collect()
                    kept = live.now - output.untyped_storage().nbytes()
                del output
        copies = _copies(module)
        with policy.rollout_mode():
            left = _copies(module)
        return HeldByLayers(topology.pipeline.rank, copies, left, kept)


def _copies(module: torch.nn.Module) -> int:
    """Bytes of the FP8 weights that TE keeps."""
    return storage_bytes(
        storage
        for layer in captured_layers(module)
        for workspace in getattr(layer, "_fp8_workspaces", {}).values()
        for storage in vars(workspace).values()
        if isinstance(storage, torch.Tensor)
    )


def skipped_update(device: torch.device, parallel: ParallelConfig) -> tuple[float, bool, bool]:
    """Of an update that is not finite, after one that is: whether it was skipped, whether delayed
    scaling remembers the first one, and whether it remembers anything of the second."""
    config = RunConfig.model_validate(
        {
            "name": "a",
            "algorithm": "reinforce",  # whose advantages go through backward
            "model": WIDE.model_dump() | {"fp8": "delayed"},
            "parallel": parallel.model_dump(),
            "batching": {"minibatches": 1},
        }
    )
    good = [[_sequence(5), _sequence(7)] * parallel.world_size]
    bad = [[replace(sequence, advantage=math.inf) for sequence in good[0]]]
    with _policy(device, config.model, parallel) as policy:
        learner, optimizer = Learner(config, policy), Optimizer(policy, config.optimizer, 10)
        fresh = [kept.clone() for kept in policy.delayed_scaling()]
        learner.update(good, optimizer, 0.0)
        before = [kept.clone() for kept in policy.delayed_scaling()]
        skipped = learner.update(bad, optimizer, 0.0)["optimizer/skipped"]
        after = policy.delayed_scaling()
        return (
            skipped,
            not all(map(torch.equal, fresh, before)),
            not all(map(torch.equal, before, after)),
        )
