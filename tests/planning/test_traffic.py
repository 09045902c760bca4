"""Bytes on the wire against the collectives of real passes, and the projection's against counts."""

from typing import Any

import pytest
from support.allocation import sent_in_rollout, sent_in_training
from support.gradients import TINY, VOCAB, collectives, random_batch
from support.pool import WorkerPool
from support.slow import all_but

from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.config.run import RunConfig
from proma_megatron.planning.counts import count
from proma_megatron.planning.plan import make_plan
from proma_megatron.planning.shapes import stages
from proma_megatron.planning.sizes import Sizes
from proma_megatron.planning.traffic import projection_numbers

MICROBATCHES = 2
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "TP2": ({}, {"tensor": 2}, {}, "reinforce"),
    "TP2 SP": ({}, {"tensor": 2, "sequence": True}, {}, "reinforce"),
    "TP2 SP recompute": ({"recompute": "full"}, {"tensor": 2, "sequence": True}, {}, "reinforce"),
    "TP4, 2 KV heads": ({}, {"tensor": 4}, {}, "reinforce"),
    "TP2 SP proma": ({}, {"tensor": 2, "sequence": True}, {}, "proma"),
    "TP2 SP isopo": ({}, {"tensor": 2, "sequence": True}, {}, "isopo"),
    "TP2 SP intra": ({}, {"tensor": 2, "sequence": True}, {}, "intra_proma"),
    "PP2 tied proma": ({}, {"pipeline": 2}, {}, "proma"),
    "PP2 virtual": ({"tie_embeddings": False}, {"pipeline": 2, "virtual_pipeline": 2}, {}, "proma"),
    "DP2": ({}, {"data": 2}, {}, "reinforce"),
    "DP2 sharded": ({}, {"data": 2}, {"distributed": True}, "reinforce"),
}


def run_config(name: str) -> RunConfig:
    model, parallel, optimizer, algorithm = CASES[name]
    return RunConfig.model_validate(
        {
            "name": "planned",
            "algorithm": algorithm,
            "model": TINY.model_dump() | {"dtype": "float32"} | model,
            "parallel": parallel,
            "optimizer": optimizer,
            "trainer": {"kl_every": 0},
            "rollout": {
                "prompts_per_step": MICROBATCHES * parallel.get("data", 1),
                "samples_per_prompt": 4,
                "max_prompt_tokens": 24,
                "max_new_tokens": 8,
            },
            "batching": {"tokens_per_microbatch": 4 * 32},
        }
    )


@pytest.mark.parametrize("name", all_but(CASES, ["TP2", "TP2 SP"]))
def test_training_sends_what_is_planned(workers: WorkerPool, name: str) -> None:
    config = run_config(name)
    plan = make_plan(config, VOCAB, gpu_memory=2**30)
    assert plan.counts.microbatches == MICROBATCHES
    found = workers.run(
        config.parallel.world_size,
        sent_in_training,
        config=config,
        vocab_size=VOCAB,
        microbatches=MICROBATCHES,
    )
    for stage, sent in found:
        traffic = plan.stages[stage].traffic
        planned = traffic.total - traffic.rollout
        if config.optimizer.distributed:  # weights are gathered in the optimizer's step
            planned -= plan.stages[stage].resident.weights // 2
        measured = sum(sent.values())
        # What is not planned is a few numbers a message: the shapes that stages tell each other.
        assert planned <= measured <= planned * 1.01 + 256, (planned, measured, sent, traffic)


@pytest.mark.parametrize(
    ("parallel", "draw"),
    [
        ({"tensor": 2}, {}),
        ({"tensor": 2}, {"top_p": 0.9}),
        ({"tensor": 4}, {"top_k": 3}),
        ({"tensor": 2, "pipeline": 2}, {}),
        ({"pipeline": 2}, {}),
    ],
    ids=str,
)
def test_a_rollout_sends_what_is_planned(
    workers: WorkerPool, parallel: dict[str, int], draw: dict[str, Any]
) -> None:
    lengths = {"max_prompt_tokens": 5, "max_new_tokens": 3, "prompts_per_step": 2}
    config = RunConfig.model_validate(
        {
            "name": "planned",
            "model": TINY.model_dump() | {"dtype": "float32"},
            "parallel": parallel,
            "rollout": lengths | {"samples_per_prompt": 4} | draw,
        }
    )
    plan = make_plan(config, VOCAB, gpu_memory=2**30)
    found = workers.run(
        config.parallel.world_size, sent_in_rollout, config=config, vocab_size=VOCAB, sequences=8
    )
    told = draw.get("top_p", 1) < 1 or "tensor" not in parallel
    for stage, sent in found:
        planned = plan.stages[stage].traffic.rollout
        if told and stage == len(plan.stages) - 1:
            planned -= 16 * 8 * 3  # a broadcast, which is not counted
        assert sum(sent.values()) == pytest.approx(planned, rel=0.01), (planned, sent)


@pytest.mark.parametrize(
    ("parallel", "unit", "changes"),
    [
        ({"tensor": 2}, "huggingface", {}),
        ({"tensor": 2, "sequence": True}, "huggingface", {"tie_embeddings": False}),
        ({"tensor": 2}, "megatron", {}),
        ({"tensor": 2, "sequence": True}, "linear only", {}),
        ({"tensor": 4}, "huggingface", {"qkv_bias": True}),
    ],
)
def test_the_projection_sends_so_many_numbers(
    workers: WorkerPool, parallel: dict[str, Any], unit: str, changes: dict[str, Any]
) -> None:
    keys = {"parameters": "linear"} if unit == "linear only" else {"unit": unit}
    projection = ProjectionConfig.model_validate(keys)
    model = TINY.model_copy(update=changes)
    batch = random_batch(0, [3, 3])
    found = workers.run(
        parallel["tensor"],
        collectives,
        model=model,
        parallel=ParallelConfig.model_validate(parallel),
        projection=projection,
        batch=batch,
    )
    config = RunConfig.model_validate(
        {
            "name": "planned",
            "model": model.model_dump(),
            "parallel": parallel,
            "projection": projection.model_dump(),
            "rollout": {
                "samples_per_prompt": 3,
                "max_prompt_tokens": 24,
                "max_new_tokens": 8,
            },
            "batching": {"tokens_per_microbatch": 3 * 32},
        }
    )
    counts = count(config)
    assert counts.sequences_per_microbatch == 3
    (stage,) = stages(config, VOCAB)
    sizes = Sizes.of(config, VOCAB, counts)
    for rank in found:
        assert projection_numbers(config, stage, sizes) == sum(rank["sizes"].tolist())


def test_the_projection_is_a_small_part() -> None:
    """At a size that is trained: Qwen3-8B, groups of 16, 8192 tokens each."""
    config = RunConfig.model_validate(
        {
            "name": "planned",
            "model": {
                "hidden_size": 4096,
                "ffn_hidden_size": 12288,
                "layers": 36,
                "heads": 32,
                "kv_heads": 8,
                "head_dim": 128,
                "tie_embeddings": False,
                "dtype": "bfloat16",
            },
            "parallel": {"tensor": 4, "sequence": True, "data": 4},
            "rollout": {
                "prompts_per_step": 64,
                "samples_per_prompt": 16,
                "max_prompt_tokens": 1024,
                "max_new_tokens": 7168,
            },
            "batching": {"tokens_per_microbatch": 16 * 8192},
        }
    )
    (stage,) = make_plan(config, 151936, gpu_memory=2**37).stages
    assert 0 < stage.traffic.projection < 0.001 * stage.traffic.tensor


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"trainer": {"kl_every": 1}}, 1),
        ({"trainer": {"kl_every": 4, "kl_lagged_every": 2, "kl_step_every": 1}}, 1.75),
        ({"loss": {"kl": {"coefficient": 0.1}, "mismatch": "token"}}, 2),
        (
            {
                "loss": {"kl": {"coefficient": 1, "reference": "rollout", "target": 0.1}},
                "batching": {"minibatches": 2, "tokens_per_microbatch": 128},
            },
            1,
        ),
        ({"trainer": {"kl_every": 2}, "loss": {"kl": {"coefficient": 1, "target": 0.1}}}, 1),
    ],
)
def test_passes_that_only_look_are_counted(changes: dict[str, Any], passes: float) -> None:
    tree = run_config("TP2").model_dump() | {"algorithm": "grpo"}

    def looks(more: dict[str, Any]) -> int:
        config = RunConfig.model_validate({**tree, "trainer": {"kl_every": 0}, **more})
        return make_plan(config, VOCAB, gpu_memory=2**30).stages[0].traffic.looks

    one = looks({"trainer": {"kl_lagged_every": 1, "kl_every": 0}})
    assert one > 0
    assert looks({}) == 0
    assert looks({"trainer": {"kl_every": 0}, **changes}) == pytest.approx(passes * one, rel=1e-6)
