"""The report: right numbers out of metrics.jsonl, and figures that show every run."""

from __future__ import annotations

import csv
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from support.runs import Row, noisy_rows, rl_row, write_run

from proma_megatron.commands.report import draw_report, summarize
from proma_megatron.errors import ConfigError
from proma_megatron.figures import page
from proma_megatron.figures.files import write_figure
from proma_megatron.figures.page import write_page
from proma_megatron.figures.panels import ALL, PAPER
from proma_megatron.figures.runs import Group, Run, read_groups
from proma_megatron.figures.series import Spread, at_end, running_mean, series, shares
from proma_megatron.figures.svg import ticks
from proma_megatron.figures.table import write_table
from proma_megatron.figures.words import spread


def _run(name: str, seed: int, **values: dict[int, float]) -> Run:
    """A run from ``{metric: {step: value}}``; ``__`` in a metric's name is a slash."""
    steps = sorted({step for by_step in values.values() for step in by_step})
    rows = tuple(
        {"step": step, "phase": "rl"}
        | {
            key.replace("__", "/"): by_step[step]
            for key, by_step in values.items()
            if step in by_step
        }
        for step in steps
    )
    return Run(name, rows, {"seed": seed})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The matplotlib figures that are made."""
    made: list[Figure] = []
    build = Figure.__init__

    def remember(figure: Figure, *args: Any, **kwargs: Any) -> None:
        build(figure, *args, **kwargs)
        made.append(figure)

    monkeypatch.setattr(Figure, "__init__", remember)
    return made


# --------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 37])
def test_running_mean_is_the_mean_of_the_last_ten(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    expected = [sum(values[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(n)]
    np.testing.assert_allclose(running_mean(values), expected, rtol=1e-12)


def test_running_mean_at_the_edges() -> None:
    values = np.array([1.0, 3.0, 5.0, 7.0])
    np.testing.assert_array_equal(running_mean(values, window=2), [1.0, 2.0, 4.0, 6.0])
    np.testing.assert_array_equal(running_mean(values, window=1), values)


def test_line_and_band_by_hand() -> None:
    group = Group(
        "a",
        (
            _run("x", 1, m={0: 1.0, 2: 2.0}),
            _run("y", 2, m={0: 3.0, 1: 7.0, 2: 4.0}),
            _run("z", 3, m={2: 9.0}),
        ),
    )
    points = series(group, "m").points
    assert [(p.step, p.n, p.mean, p.low, p.high) for p in points] == [
        (0, 2, 2.0, 1.0, 3.0),
        (1, 1, 7.0, 7.0, 7.0),
        (2, 3, 5.0, 2.0, 9.0),
    ]
    assert points[0].std == pytest.approx(math.sqrt(2))
    assert points[1].std is None
    assert points[2].std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert points[1].values == (("2", 7.0),)
    assert series(group, "other").points == ()


def test_values_at_the_end_by_hand() -> None:
    long = _run("x", 1, m={step: float(step) for step in range(1, 16)})
    group = Group("a", (long, _run("y", 2, m={1: 4.0, 3: 6.0}), _run("z", 3, other={1: 1.0})))
    last, tail = at_end(group, "m"), at_end(group, "m", last=10)
    assert last is not None
    assert last.values == (("1", 15.0), ("2", 6.0))
    assert tail is not None
    assert tail.values == (("1", 10.5), ("2", 5.0))
    assert at_end(group, "nothing") is None


def test_shares_of_a_step() -> None:
    rows = {"seconds__step": {1: 2.0, 2: 2.0}, "seconds__train": {1: 1.0, 2: 0.5}}
    runs = (_run("x", 1, **rows), _run("y", 2, **rows, seconds__kl={2: 0.5}))
    assert shares(runs) == pytest.approx({"train": 3 / 8, "kl": 0.5 / 8, "other": 4.5 / 8})
    assert shares([_run("z", 1, m={1: 1.0})]) == {}


def test_spread_in_words() -> None:
    assert spread(Spread((("1", 0.5), ("2", 0.25)))) == "0.375 [0.25, 0.5]"
    assert spread(Spread((("1", 1e-5),))) == "1e-05"
    assert spread(None) == "-"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1.05, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 70, [0, 20, 40, 60]),
        (-0.03, 0.011, [-0.03, -0.02, -0.01, 0, 0.01]),
        (0, 3e-5, [0, 5e-6, 1e-5, 1.5e-5, 2e-5, 2.5e-5, 3e-5]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


def test_summary_is_of_rl_steps(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"step": 1, "phase": "warm_start", "reward/mean": 9.0, "seconds/step": 1.0},
        *(rl_row(step, step / 100) for step in range(1, 16)),
    ]
    rows[3]["validation/accuracy"] = 0.25
    rows[9]["validation/accuracy"] = 0.5
    summary = summarize(write_run(tmp_path, rows))
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
    rows = [rl_row(1, 0.0), rl_row(2, 0.0), rl_row(3, 1.0), rl_row(2, 0.5), rl_row(3, 0.4)]
    summary = summarize(write_run(tmp_path, rows))
    assert summary["reward/last_ten"] == pytest.approx(0.3)
    assert summary["seconds/total"] == 10.0


def test_summary_of_what_was_not_recorded_is_nan(tmp_path: Path) -> None:
    summary = summarize(write_run(tmp_path, [{"step": 1, "phase": "rl", "reward/mean": None}]))
    assert all(math.isnan(value) for value in summary.values()), summary


# --------------------------------------------------------------------------- which runs


@pytest.mark.parametrize("report", [summarize, lambda run: draw_report([run], run / "out.png")])
def test_run_without_rl_steps_is_refused(tmp_path: Path, report: Any) -> None:
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl"):
        report(tmp_path)
    write_run(tmp_path, [{"step": 1, "phase": "warm_start", "loss/supervised": 1.0}])
    with pytest.raises(ConfigError, match="has no RL steps"):
        report(tmp_path)
    assert not (tmp_path / "out.png").exists()


def test_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run"):
        draw_report([], tmp_path / "out.png")


def test_other_formats_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [rl_row(1, 0.5)])
    with pytest.raises(ConfigError, match=r"out\.pdf, expected a name that ends in \.png"):
        draw_report([run], tmp_path / "out.pdf")


def test_runs_that_differ_in_the_seed_are_one_group(tmp_path: Path) -> None:
    rows = [rl_row(1, 0.5)]
    paths = [
        write_run(tmp_path / "a", rows, seed=1, algorithm="proma", optimizer={"lr": 1e-4}),
        write_run(tmp_path / "b", rows, seed=1, algorithm="grpo", optimizer={"lr": 1e-4}),
        write_run(tmp_path / "c", rows, seed=2, algorithm="proma", optimizer={"lr": 1e-4}),
        write_run(tmp_path / "d", rows, seed=3, algorithm="proma", optimizer={"lr": 1e-5}),
        write_run(tmp_path / "e", rows),  # a run without config.yaml is like no other
        write_run(tmp_path / "f", rows),
    ]
    groups = read_groups([*paths, tmp_path / "a" / ".." / "a"])
    assert [(group.label, [run.name for run in group.runs]) for group in groups] == [
        ("proma", ["a", "c"]),
        ("b", ["b"]),
        ("d", ["d"]),
        ("e", ["e"]),
        ("f", ["f"]),
    ]
    assert groups[0].members == ("1", "2")
    assert groups[3].members == ("e",)


def test_groups_of_one_algorithm_are_told_apart(tmp_path: Path) -> None:
    rows = [rl_row(1, 0.5)]
    paths = [
        write_run(tmp_path / f"{name}{seed}", rows, seed=seed, algorithm="proma", lr=lr)
        for name, lr in (("ridge_seed", 1), ("exact-s", 2))
        for seed in (1, 2)
    ]
    paths += [write_run(tmp_path / n, rows, seed=1, algorithm="proma", lr=3) for n in ("x", "y")]
    groups = read_groups(paths)
    assert [group.label for group in groups] == ["ridge", "exact", "x, ..."]
    assert groups[2].members == ("x", "y")  # of the same seed


# --------------------------------------------------------------------------- the picture


def test_picture_of_single_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"r{seed}", noisy_rows(500, seed)) for seed in range(4)]
    out = tmp_path / "plots" / "report.png"
    files = draw_report(runs, out)
    assert files == (out, out.with_suffix(".csv"), out.with_suffix(".html"))
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(p.name for p in files)
    _check_picture(out, (2070, 1080), lines=4)
    assert files[2].stat().st_size < 1_000_000


def test_picture_of_groups(tmp_path: Path, drawn: list[Figure]) -> None:
    groups = [
        Group(name, tuple(Run(f"{name}{s}", tuple(noisy_rows(300, s)), {"seed": s}) for s in seeds))
        for name, seeds in (("a", (1, 2, 3)), ("b", (4, 5)), ("c", (6,)))
    ]
    png, _, html = write_figure(tmp_path / "f.png", "t", groups, PAPER, columns=2, smooth=True)
    _check_picture(png, (1380, 1080), lines=3)
    assert html.stat().st_size < 1_000_000
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "a (3 seeds)",
        "b (2 seeds)",
        "c (1 seed)",
    ]
    texts = [text.get_text() for text in drawn[0].texts]
    assert any("mean of the seeds" in text and "last 10 steps" in text for text in texts), texts


def _check_picture(png: Path, size: tuple[int, int], lines: int) -> None:
    assert png.stat().st_size < 350_000
    with Image.open(png) as image:
        assert image.format == "PNG"
        assert image.size == size
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colors = ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7))
    for color in colors[:lines]:
        near = np.abs(pixels.astype(int) - color).max(axis=1) <= 8
        assert near.sum() > 300, f"line color {color} is hardly drawn"


def test_curves_are_the_rows(tmp_path: Path, drawn: list[Figure]) -> None:
    rows: list[Row] = [
        {"step": 7, "phase": "warm_start", "reward/mean": 9.0, "policy/entropy": 9.0},
        *(rl_row(step, step / 20, **{"policy/entropy": 1 / step}) for step in range(1, 16)),
    ]
    rows[5]["reward/mean"] = None  # step 5
    rows[10]["validation/accuracy"] = 0.6  # step 10
    draw_report([write_run(tmp_path / "run", rows)], tmp_path / "out.png")

    accuracy, kl, reward, entropy, *_ = drawn[0].axes
    steps = [step for step in range(1, 16) if step != 5]
    raw, smooth = (np.asarray(line.get_xydata()) for line in reward.lines)
    np.testing.assert_allclose(raw, [(step, step / 20) for step in steps])
    np.testing.assert_allclose(smooth[:, 1], running_mean(raw[:, 1]))
    (measured,) = accuracy.lines
    np.testing.assert_allclose(np.asarray(measured.get_xydata()), [(10, 0.6)])
    assert measured.get_marker() == "o"  # a line through one point is invisible
    assert np.asarray(entropy.lines[0].get_xydata())[:, 1].max() == 1.0
    assert [text.get_text() for text in kl.texts] == ["not recorded"]


def test_several_seeds_are_a_band_and_never_smoothed(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [
        write_run(tmp_path / str(seed), noisy_rows(30, seed), seed=seed, algorithm="proma")
        for seed in (1, 2)
    ]
    draw_report(runs, tmp_path / "out.png")
    reward = drawn[0].axes[2]
    values = np.array([[row["reward/mean"] for row in noisy_rows(30, s)[1:]] for s in (1, 2)])
    (line,) = reward.lines
    np.testing.assert_allclose(np.asarray(line.get_ydata()), values.mean(axis=0))
    (band,) = reward.collections
    corners = np.asarray(band.get_paths()[0].vertices)
    assert corners[:, 1].max() == values.max()
    assert corners[:, 1].min() == values.min()


def test_overlaid_runs_have_distinct_names(tmp_path: Path, drawn: list[Figure]) -> None:
    paths = [tmp_path / "a" / "base", tmp_path / "b" / "base", tmp_path / "b" / "other"]
    runs = [write_run(path, noisy_rows(3, s, kl=s > 0)) for s, path in enumerate(paths)]
    draw_report(runs, tmp_path / "out.png")
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a/base", "b/base", "other"]
    colors = [handle.get_color() for handle in legend.get_lines()]
    assert len(set(colors)) == 3
    # A run without KL must not shift the colors of the others.
    assert [line.get_color() for line in drawn[0].axes[1].lines] == colors[1:]


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 13.0, "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        draw_report([write_run(tmp_path / "run", [rl_row(1, 0.5)])], tmp_path / "out.png")
        assert dict(matplotlib.rcParams) == before


# --------------------------------------------------------------------------- the table


def test_table_has_every_point(tmp_path: Path) -> None:
    groups = [
        Group("a, b", (_run("x", 1, policy__entropy={1: 0.1, 2: 0.5}),)),
        Group("c", tuple(_run(f"y{s}", s, policy__entropy={2: s / 3}) for s in (1, 2))),
    ]
    table = tmp_path / "f.csv"
    write_table(table, groups, PAPER)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["metric"], row["group"], row["step"], row["n"]) for row in rows] == [
        ("policy/entropy", "a, b", "1", "1"),
        ("policy/entropy", "a, b", "2", "1"),
        ("policy/entropy", "c", "2", "2"),
    ]
    assert rows[0]["std"] == ""
    both = rows[2]
    assert [float(both[key]) for key in ("mean", "std", "min", "max")] == pytest.approx(
        [0.5, math.sqrt(2) / 6, 1 / 3, 2 / 3]
    )
    each = dict(pair.split("=") for pair in both["seed_values"].split(";"))
    assert {seed: float(value) for seed, value in each.items()} == {"1": 1 / 3, "2": 2 / 3}


# --------------------------------------------------------------------------- the page


class _Page(HTMLParser):
    """What is in a page; fails on a tag that is closed in the wrong place."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.data = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            if dict(self.tags[-1][1]).get("type") == "application/json":
                self.data += data
        elif data.strip() and self._open[-1] != "style":
            self.text.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


NASTY = '</script><img src="http://x/y.png" onerror=alert(1)>&amp;'


@pytest.fixture(scope="module")
def nasty_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Group]]:
    rows = {s: tuple(noisy_rows(20, s)) for s in (1, 2, 3)}
    groups = [
        Group(NASTY, tuple(Run(f"r{s}", rows[s], {"seed": s}) for s in (1, 2))),
        Group("plain", (Run("plain", rows[3][:-1]),)),
    ]
    panels = [panel for panel in ALL if panel.key != "policy/kl_lagged"] + [
        ALL[0]._replace(key="nobody/recorded", title="Nothing")
    ]
    html = tmp_path_factory.mktemp("page") / "f.html"
    write_page(html, NASTY, groups, panels, columns=3, command=f"proma report {NASTY}")
    return html.read_text(), groups


def test_page_loads_nothing(nasty_page: tuple[str, list[Group]]) -> None:
    found = _Page(nasty_page[0])
    names = {tag for tag, _ in found.tags}
    assert not names & {"img", "link", "iframe", "object", "embed", "base", "image", "use"}, names
    for tag, attributes in found.tags:
        assert not {"src", "href", "xlink:href", "onerror", "onload"} & set(attributes), tag
    outside = page._STYLE.read_text() + page._SCRIPT.read_text()
    assert not any(word in outside for word in ("http", "@import", "url(", "fetch(", "innerHTML"))


def test_page_shows_names_as_they_are(nasty_page: tuple[str, list[Group]]) -> None:
    found = _Page(nasty_page[0])
    assert found.text.count(NASTY) >= 3  # title, heading, first column of a table
    assert f"{NASTY} (2 seeds)" in found.text  # legend
    assert f"proma report {NASTY}" in found.text
    assert "not recorded" in found.text


def test_page_says_what_each_drawing_shows(nasty_page: tuple[str, list[Group]]) -> None:
    found = _Page(nasty_page[0])
    drawings = [attributes for attributes in found.all("svg") if attributes.get("role") == "img"]
    assert len(drawings) == 6
    labels = [attributes["aria-label"] or "" for attributes in drawings]
    assert labels[0].startswith("Validation accuracy, share of problems, over RL steps: ")
    assert "plain 0.1 at step 0" in labels[0]
    assert labels[-1] == "Nothing, share of problems, over RL steps: not recorded"
    buttons = found.all("button")
    assert [button["aria-pressed"] for button in buttons] == ["true", "true"]
    assert len(found.all("table")) == 2


def test_page_holds_the_series(nasty_page: tuple[str, list[Group]]) -> None:
    text, groups = nasty_page
    embedded = json.loads(_Page(text).data)
    assert [panel["key"] for panel in embedded["panels"]][:3] == [panel.key for panel in ALL[:3]]
    for panel in embedded["panels"]:
        for group, shown in zip(groups, panel["groups"], strict=True):
            points = series(group, panel["key"]).points
            assert shown["label"] == group.label
            assert shown["step"] == [point.step for point in points]
            assert shown["n"] == [point.n for point in points]
            np.testing.assert_allclose(shown["mean"], [p.mean for p in points], rtol=1e-5)
            if len(group.runs) > 1 and points:
                np.testing.assert_allclose(shown["low"], [p.low for p in points], rtol=1e-5)
                np.testing.assert_allclose(shown["high"], [p.high for p in points], rtol=1e-5)
            else:
                assert shown["low"] is None


def test_drawn_lines_are_the_series(tmp_path: Path) -> None:
    run = _run("x", 1, policy__entropy={0: 0.0, 5: 1.0, 10: 2.0})
    html = tmp_path / "f.html"
    write_page(html, "t", [Group("x", (run,))], PAPER[2:3], columns=1, command=None)
    found = _Page(html.read_text())
    (line,) = [attributes for attributes in found.all("path") if attributes["class"] == "mean"]
    path = line["d"] or ""
    places = [tuple(map(float, place.split())) for place in path.removeprefix("M").split("L")]
    frame = json.loads(found.data)["panels"][0]["frame"]
    assert (frame["x0"], frame["x1"], frame["y0"]) == (0, 10, 0)
    assert [x for x, _ in places] == [62, 285, 508]  # margins of 62 and 12 in 520
    assert places[0][1] == 270
    assert places[1][1] == pytest.approx((places[0][1] + places[2][1]) / 2, abs=0.1)


def test_long_runs_are_thinned_on_the_page_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MAX_POINTS", 40)
    run = _run("x", 1, policy__entropy={step: step / 100 for step in range(1, 101)})
    html, table = tmp_path / "f.html", tmp_path / "f.csv"
    write_page(html, "t", [Group("x", (run,))], PAPER[2:3], columns=1, command=None)
    write_table(table, [Group("x", (run,))], PAPER[2:3])
    found = _Page(html.read_text())
    steps = json.loads(found.data)["panels"][0]["groups"][0]["step"]
    assert steps == [*range(1, 101, 3)]
    assert any("one point in 3" in text for text in found.text)
    assert len(table.read_text().splitlines()) == 101
