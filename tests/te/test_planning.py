"""What a plan says of FP8 layers, against what Transformer Engine's Python keeps of a pass."""

from __future__ import annotations

from typing import Any

import pytest
from support.te_jobs import WIDE, HeldByLayers, held_after_forward
from support.te_pool import TransformerEnginePool

from proma_megatron.config.run import RunConfig
from proma_megatron.planning.activations import kept_by_layer
from proma_megatron.planning.plan import make_plan
from proma_megatron.planning.quantized import in_fp8
from proma_megatron.planning.sizes import Sizes

pytestmark = pytest.mark.te

VOCAB = 64
SMALL = 0.01  # of the weights: rows of scales are padded
SCALARS = 1024  # bytes: scales of whole tensors, and what a quantizer remembers
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP2 SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
}


def run_config(layout: str, operands: str | None, **model: Any) -> RunConfig:
    """Two microbatches of a sequence of 128 tokens; operands None: without projection."""
    return RunConfig.model_validate(
        {
            "name": "planned",
            "algorithm": "reinforce" if operands is None else "proma",
            "model": WIDE.model_dump() | {"layers": 4, "backend": "transformer_engine"} | model,
            "parallel": LAYOUTS[layout],
            "projection": {"fp8_operands": operands or "bfloat16"},
            "rollout": {
                "prompts_per_step": 1,
                "samples_per_prompt": 4,
                "max_prompt_tokens": 120,
                "max_new_tokens": 136,
            },
            "batching": {"tokens_per_microbatch": 256},
        }
    )


@pytest.mark.parametrize("operands", [None, "bfloat16", "fp8"])
@pytest.mark.parametrize("recipe", ["current", "delayed", "blockwise", "mxfp8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_inputs_take_what_the_plan_says(
    te_workers: TransformerEnginePool, layout: str, recipe: str, operands: str | None
) -> None:
    def measured(config: RunConfig) -> list[HeldByLayers]:
        compares = operands == "fp8" and config.model.fp8 != "none"
        ranks = config.parallel.world_size
        return te_workers.run(
            ranks, held_after_forward, config=config, vocab_size=VOCAB, compares=compares
        )

    plain = run_config(layout, operands and "bfloat16")
    config = run_config(layout, operands, fp8=recipe, fp8_skip_first=int(recipe != "delayed"))
    plan, before = (
        make_plan(config, VOCAB, gpu_memory=2**40),
        make_plan(plain, VOCAB, gpu_memory=2**40),
    )
    assert plan.counts.tokens_per_microbatch == 256
    more_a_layer = (
        kept_by_layer(Sizes.of(config, VOCAB, plan.counts)).total
        - kept_by_layer(Sizes.of(plain, VOCAB, plan.counts)).total
    )
    for found, reference in zip(measured(config), measured(plain), strict=True):
        stage = plan.stages[found.stage]
        planned = stage.peak_training.fp8_weights
        assert planned > 0 == before.stages[found.stage].peak_training.fp8_weights
        assert abs(found.fp8_weights / planned - 1) < SMALL, (found.fp8_weights, planned)
        assert reference.fp8_weights == found.in_rollout == 0
        assert stage.peak_rollout.fp8_weights == 0
        layers = range(
            4 // len(plan.stages) * found.stage, 4 // len(plan.stages) * (found.stage + 1)
        )
        expected = more_a_layer * sum(in_fp8(config, layer) for layer in layers)
        more = found.kept - reference.kept
        assert abs(more - expected) <= SCALARS, (more, expected)
