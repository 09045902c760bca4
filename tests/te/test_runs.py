"""Whole runs with FP8 layers, and the proof at their start that every weight arrives.

TE's Python is the real thing (2.20.2), its kernels are torch's: see `support/te_kernels.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.pooled import TINY_RUN, rl_rows, run_in_pool
from support.te_jobs import capture_check, skipped_update
from support.te_pool import TransformerEnginePool

from proma_megatron.config.loading import load_config
from proma_megatron.config.model import ParallelConfig
from proma_megatron.runs.checkpoint_folder import read_marker

pytestmark = pytest.mark.te

SHAPE = {"hidden_size": 64, "ffn_hidden_size": 64, "layers": 2, "head_dim": 16}
MODEL = f"model={{{', '.join(f'{key}: {value}' for key, value in SHAPE.items())}}}"


def rows(
    pool: TransformerEnginePool,
    path: Path,
    *overrides: str,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Of the RL steps of a tiny run."""
    source = path / "run.yaml"
    source.write_text(yaml.safe_dump({"name": "run", "root": str(path)}))
    arguments = [*TINY_RUN, MODEL, "model.dtype=bfloat16", "model.fp8=current", *overrides]
    return rl_rows(run_in_pool(pool, load_config(source, arguments), resume=resume))


@pytest.mark.parametrize("operands", ["bfloat16", "fp8"])
def test_a_run_says_what_fp8_operands_change(
    te_workers: TransformerEnginePool,
    tmp_path: Path,
    operands: str,
) -> None:
    found = rows(
        te_workers,
        tmp_path,
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


LAYOUTS = ("{}", "{tensor: 2, sequence: true}", "{pipeline: 2}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_delayed_scaling_goes_on_where_it_was_saved(
    te_workers: TransformerEnginePool,
    tmp_path: Path,
    layout: str,
) -> None:
    def run(steps: int, name: str, *, resume: bool = False) -> list[dict[str, Any]]:
        (tmp_path / name).mkdir(exist_ok=True)
        return rows(
            te_workers,
            tmp_path / name,
            "model.fp8=delayed",
            "projection={fp8_operands: fp8, fp8_gate_every: 1}",
            f"parallel={layout}",
            f"trainer={{steps: {steps}, eval_every: 0, save_every: 1}}",
            resume=resume,
        )

    run(2, "stopped")
    resumed = run(4, "stopped", resume=True)
    whole = run(4, "whole")
    assert [row["step"] for row in resumed] == [0, 1, 2, 3, 4]
    for found, expected in zip(resumed, whole, strict=True):
        at_the_end = {key for key in found if key.startswith("validation/")}
        assert {key: found[key] for key in found.keys() - at_the_end} == {
            key: expected[key] for key in expected.keys() - at_the_end
        }


def test_a_run_goes_on_where_there_is_no_memory_of_delayed_scaling(
    te_workers: TransformerEnginePool, tmp_path: Path
) -> None:
    """A checkpoint of another recipe has none; one of another layout, none that fits."""

    def run(steps: int, *overrides: str, resume: bool = True) -> None:
        length = f"trainer={{steps: {steps}, eval_every: 0, save_every: 1}}"
        found = rows(te_workers, tmp_path, length, *overrides, resume=resume)
        assert [row["step"] for row in found] == list(range(steps + 1))
        marker = read_marker(tmp_path / "run" / "checkpoints" / f"step_{steps:06d}")
        assert ("scaling" in marker.holds) == ("model.fp8=delayed" in overrides)

    run(1, "model.fp8=current", resume=False)
    run(2, "model.fp8=delayed")
    run(3, "model.fp8=delayed", "parallel.tensor=2")
    run(4, "model.fp8=current", "parallel.tensor=2")


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "sequence": True}, {"data": 2}])
def test_delayed_scaling_forgets_what_was_skipped(
    te_workers: TransformerEnginePool, layout: dict[str, Any]
) -> None:
    parallel = ParallelConfig(**layout)
    for skipped, remembers, changed in te_workers.run(
        parallel.world_size, skipped_update, parallel=parallel
    ):
        assert skipped == 1
        assert remembers
        assert not changed
