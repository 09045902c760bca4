"""The cost benchmark: its three ways agree, its rows are complete, and finished ones are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.pool import WorkerPool
from support.pooled import PooledStarter

from benchmarks import growth, projection
from benchmarks.cost import model, ranks
from benchmarks.cost.draw import draw
from benchmarks.cost.kernels import weights_of
from benchmarks.cost.measure import spread
from benchmarks.cost.results import Results, setting_of
from benchmarks.cost.settings import Effort, Setting, Shape, grid
from benchmarks.cost.table import table
from proma_megatron.errors import ConfigError
from proma_megatron.processes.elastic import starting_ranks

SHAPE = Shape(hidden=128, layers=1, vocabulary=40)
SETTINGS = grid([1], [False, True], [12], [3], microbatches=2, shape=SHAPE)
LINEAR_UNITS = 7  # of a layer: q, k, v, o, gate, up, down


@pytest.fixture(scope="module")
def measured(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cost") / "cost.json"
    Results(out).write()
    with starting_ranks(PooledStarter(workers)):
        ranks.run_settings(SETTINGS, Effort(seconds=0, least=3, most=3), out, "cpu")
    return out


def test_rows_are_complete(measured: Path) -> None:
    found = json.loads(measured.read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert [setting_of(row) for row in found["rows"]] == SETTINGS
    for row in found["rows"]:
        times = row["rounds_seconds"]
        assert {way: len(seconds) for way, seconds in times.items()} == dict.fromkeys(
            ("plain", "proma", "hooks", "hooks_by_layer"), 3
        )
        first = [a / b for a, b in zip(times["proma"], times["plain"], strict=True)]
        assert row["ratios"]["proma/plain"] == spread(first)
        peak = row["peak_bytes"]
        assert peak["plain"] < min(peak["proma"], peak["hooks"])
        # One process has nothing to reduce.
        assert {way: added["bytes"] for way, added in row["collectives"].items()} == {
            "proma": 0,
            "hooks": 0,
        }
        head = 0 if row["tied"] else 1
        assert row["collectives"]["hooks"]["units"] == LINEAR_UNITS + head
        assert row["collectives"]["proma"]["units"] == LINEAR_UNITS + 4 + 1 + 1 + head


def test_the_hooks_compute_what_the_accumulator_does(measured: Path) -> None:
    errors = [row["disagreement_float64"] for row in Results.read(measured).rows]
    assert len(errors) == 2
    assert max(errors) < 1e-11


def test_finished_rows_are_kept(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[Setting]] = []
    monkeypatch.setattr(projection, "run_settings", lambda found, *_: asked.append(found))
    monkeypatch.setattr(projection, "settings_of", lambda _: [*SETTINGS, other])
    other = SETTINGS[0].model_copy(update={"sequences": 4})
    before = Results.read(measured).rows
    projection.run(projection.options_of(["--json", str(measured), "--resume"]))
    assert asked == [[other]]
    assert Results.read(measured).rows == before


def test_a_row_replaces_an_earlier_one_of_its_setting(measured: Path, tmp_path: Path) -> None:
    rows = Results.read(measured).rows
    results = Results(tmp_path / "rows.json", rows)
    results.add({**rows[0], "rounds": 99})
    found = Results.read(results.path)
    assert [row["rounds"] for row in found.rows] == [3, 99]
    assert not found.missing(SETTINGS)


def test_the_ratios_are_drawn(measured: Path, tmp_path: Path) -> None:
    draw(Results.read(measured).rows, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draw"], "--draw without --png"),
        (["--draw", "--png", "x.png"], "which holds no results"),
        (["--microbatches", "1"], "--microbatches is 1, expected at least 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    options = projection.options_of(["--json", str(tmp_path / "none.json"), *arguments])
    with pytest.raises(ConfigError, match=message):
        projection.run(options)


def test_quick_settings_can_be_overridden() -> None:
    options = projection.options_of(["--json", "x", "--quick", "--sequences", "2"])
    assert {s.sequences for s in projection.settings_of(options)} == {2}
    assert {s.tensor for s in projection.settings_of(options)} == {1}


def test_long_rounds_may_be_few() -> None:
    effort = Effort(seconds=20, least=5, most=15, limit=120)
    assert not effort.enough(4, 100)
    assert effort.enough(5, 100)
    assert not effort.enough(14, 19)
    assert effort.enough(15, 1)
    assert not effort.enough(1, 500)
    assert effort.enough(2, 121)


def test_lines_and_powers_are_found() -> None:
    line = growth.fit([1, 2, 4, 8], [3, 5, 9, 17])
    assert line["constant"] == pytest.approx(1)
    assert line["slope"] == pytest.approx(2)
    assert line["r_squared"] == pytest.approx(1)
    assert growth.fit([1, 2, 4], [3, 12, 48])["exponent"] == pytest.approx(2)
    bent = growth.fit([1, 2, 3], [0, 1, 0])
    assert bent["r_squared"] == pytest.approx(0)
    assert bent["exponent"] is None


def test_growth_is_fitted_to_what_is_measured(tmp_path: Path) -> None:
    results = Results(tmp_path / "growth.json")
    for setting in growth.SERIES["microbatches"][:3]:
        plain, proma = [1.0 * setting.microbatches] * 2, [1.5 * setting.microbatches - 0.5] * 2
        results.rows.append(
            {
                **setting.model_dump(),
                "projected_parameters": 1,
                "seconds": {"plain": plain[0], "proma": proma[0]},
                "rounds_seconds": {"plain": plain, "proma": proma},
            }
        )
    found = growth.fits(results)
    assert list(found) == ["microbatches"]  # the other series share one of its settings
    extra = found["microbatches"]["extra"]
    assert (extra["slope"], extra["constant"]) == pytest.approx((0.5, -0.5))
    growth.draw(results, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_line_for_each_row(measured: Path) -> None:
    rows = Results.read(measured).rows
    head, rule, *lines = table(rows[::-1])
    assert {line.count("|") for line in (head, rule, *lines)} == {head.count("|")}
    for row, line in zip(rows, lines, strict=True):
        median = row["ratios"]["proma/plain"]["median"]
        assert line.startswith(f"| 1 | {'tied' if row['tied'] else 'untied'} | 12 x 3 | 3 | ")
        assert f"| {median:.2f} (" in line
    once = {**rows[0], "rounds": 1, "ratios": {"proma/plain": rows[0]["ratios"]["proma/plain"]}}
    assert table([once])[2].split("|")[6:8] == [
        f" {once['ratios']['proma/plain']['median']:.2f} ",
        " - ",
    ]


def test_the_models_terms_are_of_all_weights(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Results.read(measured).rows
    for row in rows:
        setting = setting_of(row)
        layer, (vocabulary, hidden) = weights_of(setting)
        norms = setting.shape.layers * 2 * (hidden + 64) + hidden
        tables = vocabulary * hidden * (1 if setting.tied else 2)
        weights = setting.shape.layers * sum(out * width for out, width in layer)
        assert weights + tables + norms == row["projected_parameters"]
    model.print_measured(measured)
    _, _, *lines = capsys.readouterr().out.splitlines()
    for line, name in zip(lines, sorted(setting_of(row).name for row in rows), strict=True):
        cells = line.strip("| ").split(" | ")
        assert cells[0] == name
        *_, plain, form, products, update, lookup, solves, extra, _measured = map(float, cells[1:])
        assert extra == pytest.approx(form + products + update + lookup + solves - plain, abs=0.4)
