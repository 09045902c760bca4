"""Whole runs with FP8 layers, and the proof at their start that every weight arrives.

TE's Python is the real thing (2.20.2), its kernels are torch's: see `support/te_kernels.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.pooled import TINY_RUN, rl_rows, run_in_pool
from support.te_jobs import capture_check
from support.te_pool import TransformerEnginePool

from proma_megatron.config_file import load_config

pytestmark = pytest.mark.te

SHAPE = {"hidden_size": 64, "ffn_hidden_size": 64, "layers": 2, "head_dim": 16}
MODEL = f"model={{{', '.join(f'{key}: {value}' for key, value in SHAPE.items())}}}"


def rows(
    pool: TransformerEnginePool, path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str
) -> list[dict[str, Any]]:
    """Of the RL steps of a tiny run."""
    # The machine has no GPU, which is what this would find.
    monkeypatch.setattr("proma_megatron.launcher.check_precision", lambda *_: None)
    source = path / "run.yaml"
    source.write_text(yaml.safe_dump({"name": "run", "root": str(path)}))
    arguments = [*TINY_RUN, MODEL, "model.dtype=bfloat16", "model.fp8=current", *overrides]
    return rl_rows(run_in_pool(pool, load_config(source, arguments)))


@pytest.mark.parametrize("operands", ["bfloat16", "fp8"])
def test_a_run_says_what_fp8_operands_change(
    te_workers: TransformerEnginePool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    operands: str,
) -> None:
    found = rows(
        te_workers,
        tmp_path,
        monkeypatch,
        f"projection={{fp8_operands: {operands}, fp8_gate_every: 3}}",
        "parallel={tensor: 2, sequence: true}",
        "trainer={steps: 3, eval_every: 0}",
    )
    looked = [row["step"] for row in found if "fp8/gradient_cosine" in row]
    assert looked == [1, 3]  # the first, and every third
    for row in found[1:]:  # the first is what validation says before
        if row["step"] in looked:
            assert 0.9 < row["fp8/gradient_cosine"] < 1.0
        assert row["optimizer/skipped"] == 0
        assert row["projection/removed_energy"] >= 0
    # Not where the microbatch before had equal rewards only, so that nothing is removed.
    errors = [row["fp8/beta_error"] for row in found if "fp8/beta_error" in row]
    assert errors
    assert all(0.0 < error < 1.0 for error in errors)


@pytest.mark.parametrize("fp8", ["none", "current", "delayed"])
def test_a_weight_that_does_not_arrive_is_named_before_the_first_step(
    te_workers: TransformerEnginePool, fp8: str
) -> None:
    arrived, lost = te_workers.run(1, capture_check, fp8=fp8)[0]
    assert arrived == "every weight arrives"
    assert "decoder.layers.1.mlp.linear_fc2.weight saw 0 of 1 microbatches" in lost
