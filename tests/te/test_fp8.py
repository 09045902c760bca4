"""FP8 layers: which operands reach the projection, and what of a run stays out of FP8.

TE's Python is the real thing (2.20.2), its kernels are torch's: see `support/te_kernels.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import assert_equal
from support.gradients import gradients, random_batch
from support.pool import WorkerPool
from support.te_jobs import (
    WIDE,
    Seen,
    checkpoint_entries,
    parameters,
    products,
    rollout_precisions,
    seen,
    unlike_passes,
)
from support.te_pool import TransformerEnginePool

from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.config.objective import ProjectionConfig

pytestmark = pytest.mark.te

RECIPES = ("current", "delayed", "blockwise", "mxfp8")
SP2 = ParallelConfig(tensor=2, sequence=True)
ONE = ParallelConfig()
# A weight gradient of TE's own has been rounded to bfloat16.
ROUNDED = 4e-3
# What FP8 does to operands: E4M3 has 3 bits after the point and E5M2 2.
COARSE = (5e-3, 0.2)
BATCH = random_batch(11, [5])


def look(pool: WorkerPool, parallel: ParallelConfig = ONE, **options: Any) -> list[Seen]:
    """Of every layer on every rank."""
    model = WIDE.model_copy(update={k: v for k, v in options.items() if k in WIDE.model_fields})
    rest = {k: v for k, v in options.items() if k not in WIDE.model_fields}
    found = pool.run(parallel.world_size, seen, model=model, parallel=parallel, batch=BATCH, **rest)
    layers = [layer for rank in found for layer in rank.values()]
    assert len(layers) == parallel.world_size * 4 * model.layers
    return layers


@pytest.mark.parametrize("parallel", [ONE, SP2], ids=["one", "sp2"])
@pytest.mark.parametrize("fp8", RECIPES)
def test_operands_are_those_before_fp8_to_the_last_bit(
    te_workers: TransformerEnginePool, fp8: str, parallel: ParallelConfig
) -> None:
    for layer in look(te_workers, parallel, fp8=fp8, in_bfloat16=True):
        assert layer.fp8
        assert (layer.x, layer.dy) == (0.0, 0.0)


@pytest.mark.parametrize("parallel", [ONE, SP2], ids=["one", "sp2"])
@pytest.mark.parametrize("fp8", RECIPES)
def test_fp8_operands_are_those_of_the_layers_own_weight_gradient(
    te_workers: TransformerEnginePool, fp8: str, parallel: ParallelConfig
) -> None:
    for layer in look(te_workers, parallel, fp8=fp8, in_bfloat16=False):
        assert COARSE[0] < layer.x < COARSE[1]
        assert COARSE[0] < layer.dy < COARSE[1]
        assert layer.product < ROUNDED


@pytest.mark.parametrize("in_bfloat16", [True, False])
@pytest.mark.parametrize("fp8", RECIPES)
def test_a_comparison_has_both(
    te_workers: TransformerEnginePool, fp8: str, in_bfloat16: bool
) -> None:
    options = {"fp8": fp8, "in_bfloat16": in_bfloat16, "compares": True}
    for layer in look(te_workers, SP2, **options):
        assert layer.high == 0.0
        assert layer.low is not None
        assert COARSE[0] < layer.low < COARSE[1]
        assert (layer.x == 0.0) is in_bfloat16


@pytest.mark.parametrize("fp8", ["none", "current", "blockwise"])
@pytest.mark.parametrize("in_bfloat16", [True, False])
def test_gradients_of_biases_are_left_to_the_sink(
    te_workers: TransformerEnginePool, fp8: str, in_bfloat16: bool
) -> None:
    # `seen` looks into main_grad.
    layers = look(te_workers, fp8=fp8, qkv_bias=True, in_bfloat16=in_bfloat16)
    assert all(layer.fp8 is (fp8 != "none") for layer in layers)


@pytest.mark.parametrize("in_bfloat16", [True, False])
@pytest.mark.parametrize("fp8", ["none", "current"])
def test_no_product_of_a_weight_gradient_is_formed_by_the_layers(
    te_workers: TransformerEnginePool, fp8: str, in_bfloat16: bool
) -> None:
    model = WIDE.model_copy(update={"fp8": fp8})
    (found,) = te_workers.run(1, products, model=model, batch=BATCH, in_bfloat16=in_bfloat16)
    forward_and_towards_the_input = 2 * 4 * model.layers
    assert found == ["bfloat16" if fp8 == "none" else "fp8"] * forward_and_towards_the_input


@pytest.mark.parametrize("fp8", ["current", "delayed"])
def test_recompute_changes_nothing(te_workers: TransformerEnginePool, fp8: str) -> None:
    options: dict[str, Any] = {"fp8": fp8, "in_bfloat16": True, "compares": True}
    plain = look(te_workers, SP2, **options)
    assert look(te_workers, SP2, recompute="full", **options) == plain


@pytest.mark.parametrize("operands", ["bfloat16", "fp8"])
def test_microbatches_in_flight_are_told_apart(
    te_workers: TransformerEnginePool, operands: str
) -> None:
    """1F1B runs forwards of a layer ahead of its backwards."""
    projection = ProjectionConfig.model_validate({"bound": None, "fp8_operands": operands})
    model = WIDE.model_copy(update={"fp8": "current", "layers": 4, "tie_embeddings": False})

    def found(**layout: Any) -> dict[str, torch.Tensor]:
        parallel = ParallelConfig.model_validate({k: v for k, v in layout.items() if k != "r"})
        return te_workers.run(
            parallel.world_size,
            gradients,
            model=model.model_copy(update={"recompute": layout.get("r", "none")}),
            parallel=parallel,
            projection=projection,
            batch=random_batch(12, [2, 3, 2, 2]),
        )[0]

    expected = found()
    for layout in ({"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2, "r": "full"}):
        assert_equal(found(**layout), expected, 1e-6)


def test_replicas_may_make_unlike_numbers_of_passes(te_workers: TransformerEnginePool) -> None:
    """As they do when they look for what is not finite; delayed scaling must not wait for both."""
    model = WIDE.model_copy(update={"fp8": "delayed"})
    assert te_workers.run(2, unlike_passes, model=model, batch=BATCH) == [1, 2]


def test_first_and_last_layers_stay_in_bfloat16(te_workers: TransformerEnginePool) -> None:
    layers = look(te_workers, fp8="current", fp8_skip_first=1, fp8_skip_last=1, in_bfloat16=False)
    assert [layer.fp8 for layer in layers] == [False] * 4 + [True] * 4 + [False] * 4
    for layer in layers:
        assert (layer.x == layer.dy == 0.0) is not layer.fp8


@pytest.mark.parametrize(("parallel", "exact"), [(ONE, True), (SP2, False)], ids=["one", "sp2"])
def test_tes_hybrid_quantizer_rounds_inputs_under_sequence_parallelism(
    te_workers: TransformerEnginePool, parallel: ParallelConfig, exact: bool
) -> None:
    """Why operands in bfloat16 don't come through it; see `policy/te_layers.py`."""
    factory = "support.te_jobs.hybrid_factory"
    layers = look(te_workers, parallel, fp8="current", in_bfloat16=False, factory=factory)
    assert (max(layer.x for layer in layers) == 0.0) is exact
    assert all(layer.dy == 0.0 for layer in layers)


@pytest.mark.parametrize(
    ("fp8", "multiple"), [("current", 16), ("delayed", 16), ("blockwise", 128), ("mxfp8", 32)]
)
def test_tokens_are_padded_to_what_the_recipe_asks_for(
    te_workers: TransformerEnginePool, fp8: str, multiple: int
) -> None:
    tokens = sum(len(sequence.tokens) for sequence in BATCH[0])
    for parallel, ranks in ((ONE, 1), (SP2, 2)):
        for layer in look(te_workers, parallel, fp8=fp8, in_bfloat16=True):
            assert layer.rows == -(-tokens // (multiple * ranks)) * multiple * ranks


def test_rollouts_stay_in_bfloat16(te_workers: TransformerEnginePool) -> None:
    model = WIDE.model_copy(update={"fp8": "current"})
    (found,) = te_workers.run(1, rollout_precisions, model=model)
    assert found == ({"bfloat16"}, {"fp8"})


@pytest.mark.parametrize("parallel", [ONE, SP2], ids=["one", "sp2"])
@pytest.mark.parametrize("job", [parameters, checkpoint_entries], ids=lambda job: job.__name__)
def test_both_backends_have_the_same(
    te_workers: TransformerEnginePool, parallel: ParallelConfig, job: Any
) -> None:
    def found(**changes: str) -> list[Any]:
        model: ModelConfig = WIDE.model_copy(update={"qkv_bias": True, **changes})
        return te_workers.run(parallel.world_size, job, model=model, parallel=parallel)

    expected = found(backend="torch")
    assert found(backend="transformer_engine") == expected
    assert found(backend="transformer_engine", fp8="delayed") == expected
