"""The report: right numbers out of metrics.jsonl, and a picture that shows every run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from proma_megatron.config import ConfigError
from proma_megatron.report import draw_report, running_mean, summarize


def _write(run: Path, rows: list[dict[str, Any]]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def _rl(step: int, reward: float | None, **more: float) -> dict[str, Any]:
    return {"step": step, "phase": "rl", "reward/mean": reward, "seconds/step": 2.0, **more}


def _noisy_run(run: Path, steps: int, seed: int, kl: bool = True) -> Path:
    random = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row = _rl(step, float(random.uniform(0.2, 0.8)))
        row["policy/entropy"] = float(random.uniform(0.5, 1.0))
        row["projection/removed_energy"] = float(random.uniform(0, 0.4))
        if kl:
            row["policy/kl_initial"] = float(random.uniform(0, 0.1))
        if step % 20 == 0:
            row["validation/accuracy"] = float(random.uniform(0.2, 0.8))
        rows.append(row)
    return _write(run, rows)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that the report makes."""
    made: list[Figure] = []
    build = Figure.__init__

    def remember(figure: Figure, *args: Any, **kwargs: Any) -> None:
        build(figure, *args, **kwargs)
        made.append(figure)

    monkeypatch.setattr(Figure, "__init__", remember)
    return made


@pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 37])
def test_running_mean_is_the_mean_of_the_last_ten(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    expected = [sum(values[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(n)]
    np.testing.assert_allclose(running_mean(values), expected, rtol=1e-12)


def test_running_mean_at_the_edges() -> None:
    values = np.array([1.0, 3.0, 5.0, 7.0])
    np.testing.assert_array_equal(running_mean(values, window=2), [1.0, 2.0, 4.0, 6.0])
    np.testing.assert_array_equal(running_mean(values, window=1), values)


def test_summary_is_of_rl_steps(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "phase": "warm_start", "reward/mean": 9.0, "seconds/step": 1.0},
        *(_rl(step, step / 100) for step in range(1, 16)),
    ]
    rows[3]["validation/accuracy"] = 0.25
    rows[9]["validation/accuracy"] = 0.5
    summary = summarize(_write(tmp_path, rows))
    assert summary == pytest.approx(
        {
            "reward/first": 0.01,
            "reward/last_ten": sum(range(6, 16)) / 1000,
            "validation/first": 0.25,
            "validation/last": 0.5,
            "seconds/total": 31.0,
        }
    )


def test_summary_takes_the_repetition_of_a_resumed_step(tmp_path: Path) -> None:
    run = _write(tmp_path, [_rl(1, 0.0), _rl(2, 0.0), _rl(3, 1.0), _rl(2, 0.5), _rl(3, 0.4)])
    summary = summarize(run)
    assert summary["reward/last_ten"] == pytest.approx(0.3)
    assert summary["seconds/total"] == 10.0


def test_summary_of_what_was_not_recorded_is_nan(tmp_path: Path) -> None:
    summary = summarize(_write(tmp_path, [{"step": 1, "phase": "rl", "reward/mean": None}]))
    assert all(math.isnan(value) for value in summary.values()), summary


@pytest.mark.parametrize("report", [summarize, lambda run: draw_report([run], run / "out.png")])
def test_run_without_rl_steps_is_refused(tmp_path: Path, report: Any) -> None:
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl"):
        report(tmp_path)
    _write(tmp_path, [{"step": 1, "phase": "warm_start", "loss/supervised": 1.0}])
    with pytest.raises(ConfigError, match="has no RL steps"):
        report(tmp_path)
    assert not (tmp_path / "out.png").exists()


def test_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run"):
        draw_report([], tmp_path / "out.png")


@pytest.mark.parametrize("steps", [200, 1000])
def test_picture_has_the_size_and_stays_small(tmp_path: Path, steps: int) -> None:
    runs = [_noisy_run(tmp_path / f"run{seed}", steps, seed) for seed in range(4)]
    out = tmp_path / "plots" / "report.png"
    draw_report(runs, out)
    assert out.stat().st_size < 200_000
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.size == (1500, 900)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7)):
        near = np.abs(pixels.astype(int) - color).max(axis=1) <= 8
        assert near.sum() > 300, f"run color {color} is hardly drawn"


def test_curves_are_the_rows(tmp_path: Path, figures: list[Figure]) -> None:
    rows: list[dict[str, Any]] = [
        {"step": 7, "phase": "warm_start", "reward/mean": 9.0, "policy/entropy": 9.0},
        *(_rl(step, step / 20, **{"policy/entropy": 1 / step}) for step in range(1, 16)),
    ]
    rows[5]["reward/mean"] = None  # step 5
    rows[10]["validation/accuracy"] = 0.6  # step 10
    draw_report([_write(tmp_path / "run", rows)], tmp_path / "out.png")

    reward, entropy, kl, _ = figures[0].axes
    steps = [step for step in range(1, 16) if step != 5]
    raw, smooth, markers = (np.asarray(line.get_xydata()) for line in reward.lines)
    np.testing.assert_allclose(raw, [(step, step / 20) for step in steps])
    np.testing.assert_allclose(smooth[:, 1], running_mean(raw[:, 1]))
    np.testing.assert_allclose(markers, [(10, 0.6)])
    assert np.asarray(entropy.lines[0].get_xydata())[:, 1].max() == 1.0
    assert [text.get_text() for text in kl.texts] == ["not recorded"]


def test_overlaid_runs_have_distinct_names(tmp_path: Path, figures: list[Figure]) -> None:
    paths = [tmp_path / "a" / "base", tmp_path / "b" / "base", tmp_path / "b" / "other"]
    runs = [_noisy_run(path, 3, seed, kl=seed > 0) for seed, path in enumerate(paths)]
    draw_report(runs, tmp_path / "out.png")
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a/base", "b/base", "other"]
    colors = [handle.get_color() for handle in legend.get_lines()]
    assert len(set(colors)) == 3
    # A run without KL must not shift the colors of the others.
    assert [line.get_color() for line in figures[0].axes[2].lines[1::2]] == colors[1:]


def test_single_step_is_visible(tmp_path: Path, figures: list[Figure]) -> None:
    draw_report([_write(tmp_path / "run", [_rl(1, 0.5)])], tmp_path / "out.png")
    assert figures[0].axes[0].lines[1].get_marker() == "."


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 13.0, "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        draw_report([_write(tmp_path / "run", [_rl(1, 0.5)])], tmp_path / "out.png")
        assert dict(matplotlib.rcParams) == before
