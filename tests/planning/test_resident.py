"""Weights, main gradients and optimizer state, to the byte, against a built policy."""

from typing import Any

import pytest
from support.allocation import Held, resident_bytes
from support.pool import WorkerPool
from support.slow import all_but

from proma_megatron.config.model import ModelConfig
from proma_megatron.config.run import RunConfig
from proma_megatron.planning.plan import make_plan
from proma_megatron.planning.resident import by_replica
from proma_megatron.planning.shapes import Precision, stages

VOCAB = 251  # prime: padded over any tensor size
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
}
CASES = {
    "one rank": ({}, {}, {}),
    "one rank bfloat16": ({"dtype": "bfloat16"}, {}, {}),
    "one rank float64": ({"dtype": "float64"}, {}, {}),
    "biases": ({"qkv_bias": True, "qk_norm": False, "tie_embeddings": False}, {}, {}),
    "TP2": ({"dtype": "bfloat16"}, {"tensor": 2}, {}),
    "TP4, 2 KV heads, biases": ({"qkv_bias": True}, {"tensor": 4}, {}),
    "TP2 PP2 untied": ({"tie_embeddings": False}, {"tensor": 2, "pipeline": 2}, {}),
    "TP2 PP2 tied": ({"dtype": "bfloat16"}, {"tensor": 2, "pipeline": 2}, {}),
    "PP2 virtual": ({}, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "DP2 sharded": ({}, {"data": 2}, {"distributed": True}),
    "DP2 sharded bfloat16": ({"dtype": "bfloat16"}, {"data": 2}, {"distributed": True}),
    "DP3 sharded": ({"dtype": "bfloat16"}, {"data": 3}, {"distributed": True}),
    "DP2 PP2 tied sharded": (
        {"dtype": "bfloat16"},
        {"data": 2, "pipeline": 2},
        {"distributed": True},
    ),
    "DP2 TP2 SP sharded": (
        {"tie_embeddings": False},
        {"data": 2, "tensor": 2, "sequence": True},
        {"distributed": True},
    ),
}


def run_config(
    model: dict[str, Any], parallel: dict[str, Any], optimizer: dict[str, Any]
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "planned",
            "model": SHAPE | model,
            "parallel": parallel,
            "optimizer": optimizer,
            "rollout": {"prompts_per_step": 12},
        }
    )


REPEATED = ["biases", "one rank bfloat16", "TP2", "TP2 PP2 tied", "DP2 sharded"]


@pytest.mark.parametrize("case", all_but(CASES, REPEATED))
def test_the_bytes_are_those_of_a_built_policy_after_a_step(workers: WorkerPool, case: str) -> None:
    config = run_config(*CASES[case])
    found: list[Held] = workers.run(
        config.parallel.world_size, resident_bytes, config=config, vocab_size=VOCAB
    )
    precision, replicas = Precision.of(config.model.dtype), config.parallel.data or 1
    for stage in stages(config, VOCAB):
        planned = by_replica(stage, precision, replicas, distributed=config.optimizer.distributed)
        ranks = [held for held in found if held.stage == stage.index]
        assert {held.parameters for held in ranks} == {sum(p.count for p in stage.parameters)}
        assert {held.weights for held in ranks} == {planned[0].weights}
        assert {held.main_gradients for held in ranks} == {planned[0].main_gradients}
        # Ranks count tensor parallel first, then replicas, then stages.
        by_rank = [planned[i // config.parallel.tensor].optimizer for i in range(len(ranks))]
        assert [held.optimizer for held in ranks] == by_rank


def test_a_plan_reports_the_replica_with_the_most_state() -> None:
    config = run_config({"dtype": "bfloat16"}, {"data": 3}, {"distributed": True})
    (stage,) = stages(config, VOCAB)
    parts = by_replica(stage, Precision.of("bfloat16"), 3, distributed=True)
    assert len({part.optimizer for part in parts}) > 1, "the case must tell replicas apart"
    plan = make_plan(config, VOCAB, gpu_memory=2**30)
    assert plan.stages[0].resident.optimizer == max(part.optimizer for part in parts)
    # Every parameter is updated by exactly one replica, in 12 bytes of state.
    assert sum(part.optimizer for part in parts) == 12 * plan.parameters


QWEN = {  # public figures: hidden, ffn, layers, heads, KV heads, tied, biases, vocabulary, total
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, True, False, 151936, 596_049_920),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, True, False, 151936, 1_720_574_976),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, True, False, 151936, 4_022_468_096),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, False, False, 151936, 8_190_735_360),
    "Qwen3-14B": (5120, 17408, 40, 40, 8, False, False, 151936, 14_768_307_200),
    "Qwen3-32B": (5120, 25600, 64, 64, 8, False, False, 151936, 32_762_123_264),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, False, True, 152064, 7_615_616_512),
    "Qwen2.5-72B": (8192, 29568, 80, 64, 8, False, True, 152064, 72_706_203_648),
}


def qwen(name: str) -> tuple[ModelConfig, int, int]:
    hidden, ffn, layers, heads, kv_heads, tied, biases, vocab, total = QWEN[name]
    model = ModelConfig(
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        qk_norm=not biases,
        qkv_bias=biases,
        tie_embeddings=tied,
        dtype="bfloat16",
    )
    return model, vocab, total


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("pipeline", [1, 4])
def test_the_parameters_of_all_ranks_are_the_published_total(name: str, pipeline: int) -> None:
    model, vocab, total = qwen(name)
    tensor = 4
    config = RunConfig.model_validate(
        {
            "name": "planned",
            "model": model.model_dump(),
            "parallel": {"tensor": tensor, "pipeline": pipeline},
        }
    )
    assert make_plan(config, vocab, gpu_memory=2**37).parameters == total
    entries = 0
    for stage in stages(config, vocab):
        for parameter in stage.parameters:
            if parameter.shared and parameter.name == "output_layer.weight":
                continue  # the last stage's copy of a tied table
            whole = parameter.row.share.value == "entries"
            entries += parameter.count * (tensor if whole else 1)
    assert entries == total
