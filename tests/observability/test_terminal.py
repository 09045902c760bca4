"""The display: one plain line per step in a log, a bar and a table on a terminal."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from proma_megatron.observability.terminal import MAX_LINE, Display

METRICS = {
    "reward/mean": 0.512,
    "reward/std": 0.31,
    "rollout/length": 23.1,
    "rollout/truncated": 0.02,
    "policy/entropy": 0.812,
    "policy/kl_initial": 0.013,
    "policy/logprob_mismatch": 1e-3,
    "optimizer/grad_norm": 0.83,
    "optimizer/lr": 1e-3,
    "projection/removed_energy": 0.12,
    "projection/clamp_rate": 0.5,
    "loss/policy": -0.02,
    "seconds/rollout": 1.2,
    "seconds/score": 0.1,
    "seconds/train": 3.4,
    "seconds/optimizer": 0.2,
    "seconds/step": 4.9,
    "tokens/second": 12345.0,
}
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class _File(io.StringIO):
    """Counts what was written and flushed."""

    flushed = 0

    def flush(self) -> None:
        self.flushed = len(self.getvalue())
        super().flush()


def _log_console(width: int = 80) -> tuple[Console, _File]:
    file = _File()
    return Console(file=file, force_terminal=False, width=width), file


def _terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    environment = {"TERM": "xterm"}
    return Console(file=file, force_terminal=True, width=100, _environ=environment), file


def _last_frame(file: io.StringIO) -> str:
    """What the last redraw left on screen."""
    return ESCAPE.sub("", file.getvalue().split("\x1b[1A\x1b[2K")[-1])


@pytest.mark.parametrize("width", [20, 80, 300])
def test_log_has_exactly_one_flushed_line_per_step(width: int) -> None:
    console, file = _log_console(width)
    with Display("demo", 200, console) as display:
        display.start("rl")
        begin = len(file.getvalue())
        for step in (1, 2, 3):
            display.update(step, METRICS)
            assert file.flushed == len(file.getvalue())
            assert file.getvalue()[begin:].count("\n") == step
    lines = file.getvalue()[begin:].splitlines()
    assert [line.split(" reward")[0] for line in lines] == ["RL 1/200", "RL 2/200", "RL 3/200"]
    assert "\x1b" not in file.getvalue()


def test_log_line_has_the_numbers() -> None:
    console, file = _log_console()
    with Display("demo", 200, console) as display:
        display.start("rl")
        display.update(12, {**METRICS, "validation/accuracy": 0.43})
    assert file.getvalue().splitlines()[-1] == (
        "RL 12/200 reward 0.512 val 0.430 len 23.1 ent 0.812 kl 0.013 grad 0.83 removed 12% "
        "4.9s (1.2/0.1/3.4) 12.3k tok/s"
    )


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        ({}, "warm start 1/20"),
        ({"loss/supervised": 2.5}, "warm start 1/20 loss 2.5000"),
        ({"seconds/step": 0.25}, "warm start 1/20 0.2s"),
        ({"seconds/step": 2.0, "seconds/train": 1.5}, "warm start 1/20 2.0s (-/-/1.5)"),
        ({"reward/mean": math.nan}, "warm start 1/20 reward nan"),
        ({"unknown": 1.0}, "warm start 1/20"),
    ],
)
def test_every_metric_is_optional(metrics: dict[str, float], line: str) -> None:
    console, file = _log_console()
    with Display("demo", 200, console) as display:
        display.start("warm_start", 20)
        display.update(1, metrics)
    assert file.getvalue().splitlines()[-1] == line


@pytest.mark.parametrize("value", [-1.23456e-12, 1e300, 123456789.0, -math.inf, math.nan])
def test_log_line_is_narrow_and_ends_at_a_word_whatever_the_numbers(value: float) -> None:
    console, _ = _log_console()
    display = Display("demo", 1_000_000, console)
    keys = [*METRICS, "validation/accuracy", "loss/supervised"]
    line = display.line(999_999, dict.fromkeys(keys, value))
    assert len(line) <= MAX_LINE < 120
    full = display.line(1, dict.fromkeys(keys, 0.5))
    # Every label that stayed still has a value behind it.
    words = line.split()
    labels = [word for word in full.split() if word.isalpha() and word in words]
    assert labels
    for label in labels:
        assert words.index(label) + 1 < len(words)


def test_message_is_printed_as_it_is() -> None:
    console, file = _log_console(width=20)
    text = "saved [bold]checkpoints/[/bold] to a path that is longer than the console"
    with Display("demo", 2, console) as display:
        display.message(text)
    assert file.getvalue() == text + "\n"


def test_without_console_it_prints_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("demo", 2) as display:
        display.start("rl")
        display.update(1, {"reward/mean": 0.25})
    assert capsys.readouterr().out.splitlines()[-1] == "RL 1/2 reward 0.250"


def test_terminal_shows_bar_and_table() -> None:
    console, file = _terminal()
    with Display("demo", 200, console) as display:
        display.start("rl")
        display.update(12, METRICS)
    frame = _last_frame(file)
    text = " ".join(ESCAPE.sub("", file.getvalue()).split())
    assert "demo RL" in text
    assert "12/200" in text
    for cell in (
        "reward 0.512 ± 0.31",
        "length 23.1",
        "entropy 0.812",
        "KL to initial 0.013",
        "gradient norm 0.83",
        "removed energy 12%",
        "tokens/s 12.3k",
        "rollout 1.20 · score 0.10 · train 3.40 · optimizer 0.20 · step 4.90",
    ):
        assert cell in text, cell
    assert frame.endswith("\n")


def test_terminal_keeps_the_last_validation_of_the_phase() -> None:
    console, file = _terminal()
    with Display("demo", 200, console) as display:
        display.start("warm_start", 20)
        display.update(20, {"validation/accuracy": 0.11})
        display.start("rl")
        mark = len(file.getvalue())
        display.update(1, METRICS)
        assert "validation" not in file.getvalue()[mark:]
        display.update(2, {**METRICS, "validation/accuracy": 0.43})
        mark = len(file.getvalue())
        display.update(3, METRICS)
        assert "0.430 (step 2)" in ESCAPE.sub("", file.getvalue()[mark:])


def test_terminal_is_restored_when_the_run_fails() -> None:
    console, file = _terminal()

    def fail() -> None:
        with Display("demo", 200, console) as display:
            display.start("rl")
            assert "\x1b[?25l" in file.getvalue()  # cursor hidden
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


def test_time_left_is_of_this_phase_and_of_slow_steps() -> None:
    """Steps slower than rich's window, and the steps before a resume, must not spoil it."""
    console, _ = _terminal()
    now = 0.0
    display = Display("demo", 200, console)
    progress = display._progress
    progress.get_time = lambda: now
    display.start("rl", total=200, completed=100)
    assert progress.tasks[0].completed == 100
    for step in (101, 102, 103):
        now += 60.0
        display.update(step, {})
    display.stop()
    assert progress.tasks[0].time_remaining == pytest.approx(97 * 60)


@pytest.mark.parametrize("kind", [_terminal, _log_console])
def test_stopping_twice_or_too_early_writes_nothing(
    kind: Callable[[], tuple[Console, io.StringIO]],
) -> None:
    console, file = kind()
    display = Display("demo", 2, console)
    display.stop()
    assert file.getvalue() == ""
    display.start("rl")
    display.stop()
    stopped = file.getvalue()
    display.stop()
    assert file.getvalue() == stopped
    hidden, shown = stopped.count("\x1b[?25l"), stopped.count("\x1b[?25h")
    assert hidden == shown == int(console.is_terminal)  # the cursor
