"""Cases of projected gradients: what is run, in which layout, and what it is compared with."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch

from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.learner.gradients import denominator
from proma_megatron.projection import sizes
from proma_megatron.types import TrainingSequence
from support.gradients import TINY, Batch, gradients, random_batch, streaming
from support.pool import WorkerPool

SEED = 7
TOLERANCES = {"float64": 1e-10, "float32": 1e-4}
TOLERANCE = TOLERANCES["float64"]

MODELS: dict[str, ModelConfig] = {
    "qwen3": TINY,
    "untied": TINY.model_copy(update={"tie_embeddings": False}),
    "qwen2": TINY.model_copy(update={"qk_norm": False, "qkv_bias": True}),
    "qwen2-untied": TINY.model_copy(
        update={"qk_norm": False, "qkv_bias": True, "tie_embeddings": False}
    ),
    "kv1": TINY.model_copy(update={"kv_heads": 1}),
    "kv1-bias": TINY.model_copy(update={"kv_heads": 1, "qk_norm": False, "qkv_bias": True}),
    "kv4": TINY.model_copy(update={"kv_heads": 4}),
    "deep": TINY.model_copy(update={"layers": 8}),
}

EXACT = ProjectionConfig(bound=None)
PROJECTIONS: dict[str, ProjectionConfig] = {
    "exact": EXACT,
    "exact-bound": ProjectionConfig(bound=0.5),
    "exact-half": ProjectionConfig(bound=None, shrinkage=0.5),
    "exact-linear": ProjectionConfig(bound=None, parameters="linear"),
    "exact-fused": ProjectionConfig(bound=None, unit="megatron"),
    "iterative": ProjectionConfig(rule="iterative", bound=None),
    "iterative-bound": ProjectionConfig(rule="iterative", bound=0.5, shrinkage=0.5),
    "iterative-fused": ProjectionConfig(rule="iterative", bound=None, unit="megatron"),
    "ridge": ProjectionConfig(rule="ridge", bound=None),
    "ridge-bound": ProjectionConfig(rule="ridge", bound=0.5),
    "ridge-linear-fused": ProjectionConfig(
        rule="ridge", bound=None, parameters="linear", unit="megatron"
    ),
}
# Rules that act on a microbatch by itself. Rank 2 is less than any microbatch's number of tokens:
# where everything is removed, an error relative to what is left says nothing.
OTHER_RULES: dict[str, ProjectionConfig] = {
    "kernel": ProjectionConfig(rule="kernel"),
    "kernel-weak": ProjectionConfig(rule="kernel", regularization=30.0, parameters="linear"),
    "kernel-fused": ProjectionConfig(rule="kernel", regularization=0.1, unit="megatron"),
    "norm": ProjectionConfig(rule="norm"),
    "norm-fused": ProjectionConfig(rule="norm", regularization=0.1, unit="megatron"),
    "subspace": ProjectionConfig(rule="subspace", rank=2, bound=None),
    "subspace-bound": ProjectionConfig(rule="subspace", rank=8, bound=0.5, shrinkage=0.5),
    "subspace-input": ProjectionConfig(rule="subspace", rank=2, bound=0.7, sides="input"),
    "subspace-output": ProjectionConfig(rule="subspace", rank=2, bound=None, sides="output"),
    "subspace-fused": ProjectionConfig(rule="subspace", rank=2, bound=None, unit="megatron"),
}
PLAIN = ProjectionConfig(rule="none")
# Every combination of what a projection's configuration can say.
EVERY_PROJECTION: dict[str, ProjectionConfig] = {
    f"{rule} bound={bound} shrinkage={shrinkage} {parameters} {unit}": ProjectionConfig(
        rule=rule, bound=bound, shrinkage=shrinkage, parameters=parameters, unit=unit
    )
    for rule in ("exact", "iterative", "ridge")
    for bound in (None, 0.5)
    for shrinkage in (1.0, 0.5)
    for parameters in ("all", "linear")
    for unit in ("huggingface", "megatron")
}


def _with_loss_tokens(sequence: TrainingSequence, count: int) -> TrainingSequence:
    length = len(sequence.tokens)
    mask = (0,) * (length - count) + (1,) * count
    return dataclasses.replace(sequence, loss_mask=mask)


def _edited(batch: Batch, **changes: Any) -> Batch:
    """Every microbatch with its first sequence changed."""
    return [[dataclasses.replace(first, **changes), *rest] for first, *rest in batch]


def _batches() -> dict[str, Batch]:
    plain = random_batch(1, [2, 3, 1, 3])
    return {
        "plain": plain,
        "single": random_batch(2, [3]),
        "two": random_batch(3, [4, 2]),
        "many": random_batch(4, [1, 5, 8, 2, 3, 4, 7, 6]),
        "eights": random_batch(5, [8, 8, 8, 8]),
        "five": random_batch(6, [2, 1, 3, 2, 2]),
        "advantage-0": _edited(plain, advantage=0.0),
        "all-advantages-0": [
            plain[0],
            [dataclasses.replace(s, advantage=0.0) for s in plain[1]],
            *plain[2:],
        ],
        "one-loss-token": [[_with_loss_tokens(s, 1) for s in m] for m in plain],
        "no-loss-token": [[_with_loss_tokens(m[0], 0), *m[1:]] for m in plain],
        "twice": [[m[0], *m] for m in plain],
        "all-equal": [[plain[0][0]] * 3 for _ in range(4)],
        # P is 0 on every microbatch but the first, and with it whatever a bound allows.
        "cancelling": [
            plain[1],
            *(
                [dataclasses.replace(plain[0][0], advantage=a) for a in (0.3, -0.7, 0.6, -0.2)]
                for _ in range(3)
            ),
        ],
        "empty": [plain[0], [], plain[1], plain[3]],
    }


BATCHES = _batches()


@dataclass(frozen=True)
class Case:
    """One run of the real thing, compared with one process that shards and recomputes nothing."""

    projection: str = "exact"
    model: str = "qwen3"
    batch: str = "plain"
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual: int | None = None
    data: int = 1
    recompute: bool = False
    block_bytes: int | None = None  # None: materialized
    dtype: Literal["float64", "float32", "bfloat16"] = "float64"

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor=self.tensor,
            sequence=self.sequence,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual,
        )

    def __str__(self) -> str:
        layout = [
            f"tp{self.tensor}" if self.tensor > 1 else "",
            "sp" if self.sequence else "",
            f"pp{self.pipeline}" if self.pipeline > 1 else "",
            f"vpp{self.virtual}" if self.virtual else "",
            f"dp{self.data}" if self.data > 1 else "",
            "recompute" if self.recompute else "",
            f"stream{self.block_bytes}" if self.block_bytes is not None else "",
            self.dtype if self.dtype != "float64" else "",
        ]
        return " ".join([*filter(None, layout), self.model, self.projection, self.batch])


def run(workers: WorkerPool, case: Case) -> dict[str, torch.Tensor]:
    model = MODELS[case.model].model_copy(update={"dtype": case.dtype})
    projection = projection_named(case.projection)
    if case.recompute:
        model = model.model_copy(update={"recompute": "full"})
    if case.block_bytes is not None:
        projection = streaming(projection, case.block_bytes)
    return workers.run(
        case.world_size,
        gradients,
        model=model,
        parallel=case.parallel,
        projection=projection,
        batch=BATCHES[case.batch],
        seed=SEED,
    )[0]


def iterating(device: torch.device, **arguments: Any) -> dict[str, torch.Tensor]:
    """A job: `gradients`, with subspaces by iteration as where microbatches are long."""
    before, sizes.DIRECT_TOKENS = sizes.DIRECT_TOKENS, 0
    try:
        return gradients(device, **arguments)
    finally:
        sizes.DIRECT_TOKENS = before


def projection_named(name: str) -> ProjectionConfig:
    return (PROJECTIONS | OTHER_RULES | EVERY_PROJECTION)[name]


@functools.lru_cache(maxsize=512)
def unsharded(
    workers: WorkerPool,
    model: str,
    projection: str,
    batch: str,
    dtype: str,
    replica: int,
    replicas: int,
) -> dict[str, torch.Tensor]:
    """One process, over the chain of one replica."""
    return workers.run(
        1,
        gradients,
        model=MODELS[model].model_copy(update={"dtype": dtype}),
        parallel=ParallelConfig(),
        projection=projection_named(projection),
        batch=BATCHES[batch][replica::replicas],
        seed=SEED,
        total=denominator(BATCHES[batch]),
    )[0]


# The largest error of each comparison that is named, for the summary at the end of a session.
LARGEST: dict[str, tuple[float, str]] = {}


def assert_equal(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    tolerance: float,
    *,
    comparison: str | None = None,
    case: object = "",
) -> None:
    """Every tensor within ``tolerance`` of its norm; all that are not are listed."""
    assert found.keys() == expected.keys()
    errors = {}
    for name, value in expected.items():
        difference = float((found[name] - value).norm())
        errors[name] = difference / max(float(value.norm()), 1e-300)
    if comparison is not None:
        worst = max(errors, key=errors.__getitem__)
        record = (errors[worst], f"{worst}, {case}")
        LARGEST[comparison] = max(LARGEST.get(comparison, record), record)
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong


SP2: dict[str, Any] = {"tensor": 2, "sequence": True}
SP4: dict[str, Any] = {"tensor": 4, "sequence": True}
PP2: dict[str, Any] = {"pipeline": 2}
VPP: dict[str, Any] = {"pipeline": 2, "virtual": 2}
GRID: dict[str, Any] = {"tensor": 2, "pipeline": 2}


def check_layout(workers: WorkerPool, case: Case) -> None:
    """The case against one process, which runs the chain of each replica by itself."""
    chains = [
        unsharded(workers, case.model, case.projection, case.batch, case.dtype, replica, case.data)
        for replica in range(case.data)
    ]
    expected: Any = {name: sum(chain[name] for chain in chains) for name in chains[0]}
    assert_equal(
        run(workers, case),
        expected,
        TOLERANCES[case.dtype],
        comparison=f"layouts against one process, {case.dtype}",
        case=case,
    )
