"""Activations, logits, workspace and KV cache against the peak of live tensors of real passes."""

from typing import Any

import pytest
from support.allocation import Decoded, rollout_peak, training_peak
from support.pool import WorkerPool
from support.slow import all_but

from proma_megatron.config.run import RunConfig
from proma_megatron.planning.plan import StagePlan, make_plan

# Largest relative differences. A fifth is promised, but a formula that forgets a tensor may be off
# by less. A rollout may still hold what only the garbage collector frees.
TRAINING, ROLLOUT = 0.06, 0.2
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "ffn_hidden_size": 192,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "dtype": "bfloat16",
}
FLOAT = {"dtype": "float32"}
RECOMPUTE = {"recompute": "full"}
UNTIED = {"tie_embeddings": False}
HEADS = {"heads": 8, "kv_heads": 8, "ffn_hidden_size": 64}
VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2}
# model, parallel, algorithm, vocabulary, sequences, length, microbatches, projection
Case = tuple[dict[str, Any], dict[str, Any], str, int, int, int, int, dict[str, Any]]
CASES: dict[str, Case] = {
    "reinforce": ({}, {}, "reinforce", 16, 8, 64, 2, {}),
    "reinforce float32": (FLOAT, {}, "reinforce", 16, 8, 64, 2, {}),
    "reinforce float64": ({"dtype": "float64"}, {}, "reinforce", 16, 8, 64, 2, {}),
    "wide MLP": ({"ffn_hidden_size": 512}, {}, "reinforce", 16, 2, 256, 2, {}),
    "narrow MLP": ({"ffn_hidden_size": 32}, {}, "reinforce", 16, 8, 64, 2, {}),
    "many heads": (HEADS, {}, "reinforce", 16, 8, 64, 2, {}),
    "vocabulary": ({}, {}, "reinforce", 2048, 8, 64, 2, {}),
    "vocabulary, loss in chunks": (UNTIED | {"layers": 1}, {}, "reinforce", 256, 68, 64, 1, {}),
    "recompute": (RECOMPUTE | {"layers": 4}, {}, "reinforce", 16, 8, 64, 2, {}),
    "proma": ({}, {}, "proma", 16, 8, 64, 3, {}),
    "proma float32": (FLOAT, {}, "proma", 16, 8, 64, 3, {}),
    "proma one microbatch": ({}, {}, "proma", 16, 8, 64, 1, {}),
    "proma vocabulary, tied": ({}, {}, "proma", 1024, 4, 64, 3, {}),
    "proma vocabulary, untied": (UNTIED, {}, "proma", 1024, 4, 64, 3, {}),
    "proma, linear only": ({}, {}, "proma", 1024, 4, 64, 3, {"parameters": "linear"}),
    "proma recompute": (RECOMPUTE, {}, "proma", 16, 8, 64, 3, {}),
    "proma biases": (UNTIED | {"qkv_bias": True, "qk_norm": False}, {}, "proma", 16, 8, 64, 2, {}),
    "proma wide, streamed": (
        {"hidden_size": 256, "ffn_hidden_size": 512}, {}, "proma", 16, 4, 16, 3, {"workspace_mb": 1}
    ),
    "proma wide, materialized": (
        {"hidden_size": 256, "ffn_hidden_size": 512}, {}, "proma", 16, 4, 16, 3, {}
    ),
    "isopo one microbatch": ({}, {}, "isopo", 16, 8, 64, 1, {}),
    "isopo vocabulary, untied": (UNTIED, {}, "isopo", 1024, 4, 64, 3, {}),
    "intra": ({}, {}, "intra_proma", 16, 4, 64, 2, {}),
    "intra long": (UNTIED, {}, "intra_proma", 16, 8, 64, 3, {"rank": 32}),
    "intra wide": (
        {"hidden_size": 256, "ffn_hidden_size": 512}, {}, "intra_proma", 16, 4, 16, 2, {}
    ),
    "intra SP": ({}, {"tensor": 2, "sequence": True}, "intra_proma", 16, 8, 64, 2, {}),
    "TP2": (FLOAT, {"tensor": 2}, "reinforce", 16, 8, 64, 2, {}),
    "TP2 SP": ({}, {"tensor": 2, "sequence": True}, "reinforce", 16, 8, 64, 2, {}),
    "TP2 SP proma": ({}, {"tensor": 2, "sequence": True}, "proma", 16, 8, 64, 2, {}),
    "TP2, one KV head, proma": ({"kv_heads": 1}, {"tensor": 2}, "proma", 16, 8, 64, 2, {}),
    "PP2": ({}, {"pipeline": 2}, "reinforce", 16, 4, 64, 4, {}),
    "PP2 proma, tied": (FLOAT, {"pipeline": 2}, "proma", 256, 4, 64, 4, {}),
    "PP2 proma, recompute": (RECOMPUTE | {"layers": 4}, {"pipeline": 2}, "proma", 16, 4, 64, 4, {}),
    "PP2 virtual": ({"layers": 4}, VIRTUAL, "reinforce", 16, 4, 64, 4, {}),
}  # fmt: skip


def run_config(case: Case) -> RunConfig:
    """So many microbatches of so many full-length sequences."""
    model, parallel, algorithm, _, sequences, length, microbatches, projection = case
    return RunConfig.model_validate(
        {
            "name": "planned",
            "algorithm": algorithm,
            "model": SHAPE | model,
            "parallel": parallel,
            "rollout": {
                "prompts_per_step": microbatches,
                "samples_per_prompt": sequences,
                "max_prompt_tokens": length - 8,
                "max_new_tokens": 8,
            },
            "batching": {"tokens_per_microbatch": sequences * length},
            "projection": projection,
        }
    )


# Their formulas are those of another case, with another size.
REPEATED = [
    *("reinforce float32", "reinforce float64", "narrow MLP", "many heads", "proma float32"),
    *("proma one microbatch", "isopo one microbatch", "proma biases", "intra long", "TP2"),
]


@pytest.mark.parametrize("name", all_but(CASES, REPEATED))
def test_the_training_peak_agrees(workers: WorkerPool, name: str) -> None:
    case = CASES[name]
    config, vocab, microbatches = run_config(case), case[3], case[6]
    plan = make_plan(config, vocab, gpu_memory=2**30)
    assert plan.counts.microbatches == microbatches
    found = workers.run(
        config.parallel.world_size,
        training_peak,
        config=config,
        vocab_size=vocab,
        microbatches=microbatches,
    )
    for stage, measured in found:
        ratio = plan.stages[stage].peak_training.total / measured
        print(f"{ratio:.3f} of the measured {measured:,} bytes on stage {stage}")
        assert abs(ratio - 1) <= TRAINING, f"{ratio:.3f} of {measured}: {plan.stages[stage]}"


def test_the_cases_reach_every_kind() -> None:
    """A formula of a kind that is never large would not be tested at all."""
    shares: dict[str, float] = {}
    for case in CASES.values():
        plan = make_plan(run_config(case), case[3], gpu_memory=2**30)
        for stage in plan.stages:
            moment = stage.peak_training
            for kind in ("activations", "logits", "workspace"):
                share = getattr(moment, kind) / moment.total
                shares[kind] = max(shares.get(kind, 0.0), share)
    assert min(shares.values()) > 0.4, shares


ROLLOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "one rank": ({}, {}, {}, 64),
    "long prompts float32": (FLOAT, {}, {"max_prompt_tokens": 120}, 64),
    "long prompts": ({}, {}, {"max_prompt_tokens": 120}, 64),
    "vocabulary": ({}, {}, {}, 8192),
    "vocabulary, top-p": ({}, {}, {"top_p": 0.9}, 4096),
    "TP2 PP2": ({}, {"tensor": 2, "pipeline": 2}, {}, 4096),
    "TP2, top-p": ({}, {"tensor": 2}, {"top_p": 0.9}, 4096),
    "TP2, top-k": ({}, {"tensor": 2}, {"top_k": 20}, 4096),
    "TP4, 2 KV heads": ({}, {"tensor": 4}, {}, 64),
}


@pytest.mark.parametrize("name", all_but(ROLLOUTS, ["long prompts", "TP2, top-p"]))
def test_the_rollout_peak_agrees_and_its_cache_is_exact(workers: WorkerPool, name: str) -> None:
    model, parallel, rollout, vocab = ROLLOUTS[name]
    lengths = {"max_prompt_tokens": 24, "max_new_tokens": 8, "batch_size": 16}
    config = RunConfig.model_validate(
        {
            "name": "planned",
            "model": SHAPE | model,
            "parallel": parallel,
            "rollout": lengths | rollout,
        }
    )
    plan = make_plan(config, vocab, gpu_memory=2**30)
    assert plan.counts.decoded_together == 16
    found: list[Decoded] = workers.run(
        config.parallel.world_size, rollout_peak, config=config, vocab_size=vocab
    )
    for measured in found:
        stage = plan.stages[measured.stage]
        moments = {moment.name: moment for moment in stage.rollout}
        assert {moment.kv_cache for moment in stage.rollout if moment.name != "dropping rows"} == {
            measured.cache
        }
        dropping = moments.pop("dropping rows")
        copied = dropping.kv_cache - measured.cache
        # The rows' indices and paddings come on top; earlier garbage may go meanwhile.
        assert abs(measured.dropping - copied) <= 16 * 16
        ratio = max(moment.total for moment in moments.values()) / measured.peak
        print(f"{ratio:.3f} of the measured {measured.peak:,} bytes on stage {measured.stage}")
        assert abs(ratio - 1) <= ROLLOUT, f"{ratio:.3f} of {measured.peak}: {stage.rollout}"


def test_kinds_add_up() -> None:
    for case in CASES.values():
        plan = make_plan(run_config(case), case[3], gpu_memory=2**30)
        for stage in plan.stages:
            check_sum(stage)
        assert plan.needed == max(stage.total for stage in plan.stages)


def check_sum(stage: StagePlan) -> None:
    for moment in (*stage.training, stage.update, *stage.rollout):
        kinds = stage.kinds(moment)
        assert all(value >= 0 for value in kinds.values()), (moment, kinds)
        assert sum(kinds.values()) == stage.resident.total + moment.total
        assert sum(kinds.values()) <= stage.total
