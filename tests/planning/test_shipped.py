"""Every shipped configuration is valid, planned, and fits where its comment says that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from proma_megatron.cli import app
from proma_megatron.config.loading import load_config
from proma_megatron.data.loading import vocabulary
from proma_megatron.planning.plan import make_plan

CONFIGS = sorted(Path("configs").glob("*.yaml"))
H100 = 76 * 2**30  # of 80 GB, what the CUDA context and NCCL leave
# Parameters as the models' cards on Hugging Face have them, and nodes of 8 GPUs.
MODELS = {
    "qwen3_0.6b_gsm8k": (596_049_920, 1),
    "qwen3_0.6b_gsm8k_grpo": (596_049_920, 1),
    "qwen3_0.6b_gsm8k_reinforce": (596_049_920, 1),
    "qwen3_1.7b_gsm8k": (1_720_574_976, 1),
    "qwen3_4b_gsm8k": (4_022_468_096, 1),
    "qwen3_8b_gsm8k": (8_190_735_360, 1),
    "qwen3_14b_gsm8k": (14_768_307_200, 1),
    "qwen3_32b_gsm8k": (32_762_123_264, 2),
    "qwen3_32b_gsm8k_4nodes": (32_762_123_264, 4),
    "qwen2.5_7b_gsm8k": (7_615_616_512, 1),
    "qwen2.5_72b_gsm8k": (72_706_203_648, 4),
    "qwen2.5_72b_gsm8k_8nodes": (72_706_203_648, 8),
}


def test_every_qwen_config_is_listed_here() -> None:
    assert {path.stem for path in CONFIGS} == {"quickstart", "compare", *MODELS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_fits(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    plan = make_plan(config, vocabulary(config), gpu_memory=H100)
    assert plan.fits
    assert not plan.tight, f"{plan.needed / 2**30:.1f} GiB"
    assert plan.projection_removes is not False
    if path.stem in MODELS:
        parameters, nodes = MODELS[path.stem]
        assert (plan.parameters, plan.nodes) == (parameters, nodes)
        assert plan.gpus in (1, 8 * nodes)  # no GPU of a node stays idle
        assert config.parallel.tensor <= 8


def test_the_command_prints_tables_or_json_and_says_whether_it_fits() -> None:
    run = CliRunner().invoke
    path = "configs/qwen3_8b_gsm8k.yaml"
    good = run(app, ["plan", path, "--json"])
    assert good.exit_code == 0
    found = json.loads(good.stdout)
    assert found["fits"]
    assert found["needed"] == max(stage["total"] for stage in found["stages"])
    small = run(app, ["plan", path, "--gpu-memory", "20"])
    assert small.exit_code == 1
    assert "Does not fit" in small.stdout
    assert "parallel.tensor=8" in small.stdout
    wider = json.loads(run(app, ["plan", path, "parallel.tensor=8", "--json"]).stdout)
    assert wider["needed"] < found["needed"]
