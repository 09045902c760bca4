"""The benchmark of GPUs, on the CPU: what it counts, what it writes, and what doesn't fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpu_jobs import counted_operations, refused_memory
from support.pool import WorkerPool

from benchmarks import gpu_step
from benchmarks.gpu import figures, rank
from benchmarks.gpu.results import GpuResults
from benchmarks.gpu.settings import Setting, grid
from benchmarks.gpu.table import HEAD, table
from proma_megatron.errors import ConfigError

TINY = ["--shape", "tiny", "--device", "cpu", "--microbatches", "2"]
SETTING = Setting(shape="tiny", layers=2, tokens=24, sequences=3, microbatches=2)
H200 = "NVIDIA H200"


@pytest.mark.usefixtures("in_pool")
def test_the_command_measures_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    arguments = [*TINY, "--json", str(out), "--tokens", "16", "40", "--microbatch-tokens", "40"]
    gpu_step.run(gpu_step.options_of([*arguments, "--rounds", "2", "--markdown"]))
    rows = json.loads(out.read_text())["rows"]
    assert [(row["tokens"], row["sequences"]) for row in rows] == [(16, 2), (40, 1)]
    for row in rows:
        assert row["recomputed"] == "none"
        for way in row["ways"].values():
            assert len(way["rounds_seconds"]) == 2
            tokens = row["tokens"] * row["sequences"] * 2
            assert way["tokens_per_second"] == pytest.approx(tokens / way["seconds"])
            assert way["utilization"] is None
            assert way["peak_bytes"] is None
    printed = capsys.readouterr().out
    assert "MFU is left out" in printed
    assert "| tiny | 2 | bf16 | 16 x 2 x 2 | none |" in printed
    # What is there is kept.
    gpu_step.run(gpu_step.options_of([*arguments, "--rounds", "3", "--resume"]))
    assert json.loads(out.read_text())["rows"] == rows


def test_operations_are_those_that_torch_counts(workers: WorkerPool) -> None:
    """It counts attention whole, of which the causal mask leaves half, and no mask backward."""
    model = SETTING.model("none")
    counted = workers.run(1, counted_operations, setting=SETTING)[0]
    tokens = SETTING.tokens * SETTING.sequences
    assert counted["linear"] == figures.linear_operations(model, tokens)
    forward = figures.attention_operations(model, SETTING.tokens, SETTING.sequences) / 3
    assert counted["attention forward"] == 2 * forward
    assert figures.step_operations(model, 24, 3) == counted["linear"] + 3 * forward


def test_operations_of_a_published_shape() -> None:
    """Qwen3-8B: 8.19e9 entries, of which the embedding's 0.62e9 and the norms' don't multiply."""
    (setting,) = grid(["qwen3-8b"], ["none"], [4096], budget=16384)
    assert (setting.layers, setting.sequences) == (36, 4)
    entries = figures.linear_entries(setting.model("none"))
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    assert entries + norms + 151936 * 4096 == 8_190_735_360


def test_utilization_is_relative_to_the_peak_of_the_precision() -> None:
    assert figures.utilization(989_400 * 10**9, 2.0, H200, "none") == pytest.approx(0.5)
    assert figures.utilization(989_450 * 10**9, 1.0, H200, "current") == pytest.approx(0.5)
    assert figures.utilization(10**15, 1.0, "NVIDIA A100-SXM4-80GB", "current") is None
    assert figures.utilization(10**15, 1.0, "another", "none") is None


@pytest.mark.parametrize(
    ("refused", "asked", "recomputed", "fits"),
    [
        ({("proma", "none")}, "auto", "full", {"plain", "proma"}),
        ({("proma", "none")}, "none", "none", {"plain"}),
        ({("plain", "none"), ("plain", "full"), ("proma", "none")}, "auto", "full", {"proma"}),
        ({("build", "none"), ("build", "full")}, "auto", "full", set()),
    ],
)
def test_what_does_not_fit_into_memory_is_said(
    workers: WorkerPool,
    tmp_path: Path,
    refused: set[tuple[str, str]],
    asked: Any,
    recomputed: str,
    fits: set[str],
) -> None:
    setting = SETTING.model_copy(update={"recompute": asked})
    longer = setting.model_copy(update={"tokens": 30})
    first, second, tries = workers.run(
        1, refused_memory, settings=[setting, longer], refused=refused
    )[0]
    for row in (first, second):
        assert row["recomputed"] == recomputed
        assert {name for name, way in row["ways"].items() if way is not None} == fits
        assert (row["ratio"] is not None) is (len(fits) == 2)
    # What was too much once is not tried again with more tokens.
    assert tries == (["none", "full", "full"] if asked == "auto" else ["none", "none"])
    results = GpuResults(tmp_path / "rows.json", [first, second])
    *_, line, _ = table(results)
    assert line.count("out of memory") == 3 * (2 - len(fits))
    assert line.count("|") == len(HEAD) + 1


def test_only_what_memory_lacks_is_passed_over() -> None:
    for error in (torch.OutOfMemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when")):
        with rank.memory_errors():
            raise error
    with pytest.raises(RuntimeError, match="a defect"), rank.memory_errors():
        raise RuntimeError("a defect")


def test_the_table_names_the_gpu_and_its_peaks(tmp_path: Path) -> None:
    measured = rank.Measured(
        {"plain": 3 * 2**30, "proma": 4 * 2**30}, {"plain": [0.5, 0.5], "proma": [1.0, 0.75]}
    )
    row = rank.row_of(SETTING, "none", measured, H200)
    results = GpuResults(tmp_path / "rows.json", [row], {"machine": {"device": H200, "torch": "2"}})
    head, peak, _, *lines = table(results)
    assert head == "NVIDIA H200: torch 2."
    assert "989.4 TFLOP/s for bf16 and 1,978.9 TFLOP/s for FP8" in peak
    cells = lines[2].strip("| ").split(" | ")
    assert cells[5:8] == ["288", "165", "1.750"]
    assert cells[8:] == ["0.0%", "0.0%", "3.0", "4.0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "qwen3-8b"], "--shape is qwen3-8b, which takes a GPU"),
        (["--fp8", "current"], "the run is on the CPU"),
        (["--microbatches", "1"], "--microbatches is 1, expected at least 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "none.json"
    options = gpu_step.options_of([*TINY, "--json", str(out), *arguments])
    with pytest.raises(ConfigError, match=message):
        gpu_step.run(options)
    assert not out.exists()
