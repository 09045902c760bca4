"""What commands tell beside their results: levels, streams, and the file of a run's rank."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cases import MODELS
from support.command import forked_proma
from support.gradients import random_batch
from support.pooled import TINY_RUN
from support.reference import huggingface_model

from proma_megatron.batching.batch_file import write_batch
from proma_megatron.errors import ConfigError
from proma_megatron.processes import logs

DEBUG_LINE = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ DEBUG (rank \d )?proma_megatron\.[\w.]+: .")
SECONDS = re.compile(r"\[ *[\d.]+ s\]")


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    """Have the level back that the session had; commands of these tests change it."""
    before = os.environ.pop(logs.LEVEL, None)
    logs.configure()
    yield
    os.environ.pop(logs.LEVEL, None)
    if before is not None:
        os.environ[logs.LEVEL] = before
    logs.configure()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of `proma grads`, but for ``--out``: a command with a result and with notes."""
    folder = tmp_path_factory.mktemp("logs")
    huggingface_model(MODELS["qwen3"], 3).save_pretrained(folder / "model")
    write_batch(folder / "batch.jsonl", random_batch(8, [2]))
    files = ["--hf", str(folder / "model"), "--batch", str(folder / "batch.jsonl")]
    return ["grads", *files, "parallel.tensor=2"]


def run(arguments: list[str], folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `proma grads`, after global options."""
    done = forked_proma(*options, *arguments, "--out", str(folder / "g.safetensors"))
    assert done.returncode == 0, done.stderr
    return done


def untimed(text: str) -> list[str]:
    return SECONDS.sub("[]", text).splitlines()


def test_quiet_leaves_the_result_and_verbose_adds(arguments: list[str], tmp_path: Path) -> None:
    normal, quiet, verbose = (
        run(arguments, tmp_path, *options) for options in ([], ["--quiet"], ["--verbose"])
    )
    assert untimed(normal.stderr) == [
        "nothing is projected: no replica has a second microbatch",
        "tensor 2 x pipeline 1 x data 1: 2 workers on cpu (Gloo)",
        "[] weights are in place",
        "[] accumulated 1 microbatches a replica",
        f"[] wrote {tmp_path / 'g.safetensors'}",
    ]
    assert quiet.stderr == ""
    assert normal.stdout == quiet.stdout == verbose.stdout != ""
    told = untimed(verbose.stderr)
    added = [line for line in told if DEBUG_LINE.match(line)]
    assert [line for line in told if line not in added] == untimed(normal.stderr)
    assert any("2 ranks of proma_megatron.processes.ranks" in line for line in added)
    assert any("DEBUG rank 0 proma_megatron.processes.ranks: tensor 2" in line for line in added)


def test_errors_are_told_to_the_quiet_too(arguments: list[str], tmp_path: Path) -> None:
    done = forked_proma("--quiet", *arguments, "model.dtype=int8", "--out", str(tmp_path / "g"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.dtype")


def test_quiet_and_verbose_exclude_each_other(tmp_path: Path) -> None:
    done = forked_proma("--quiet", "--verbose", "plan", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --quiet can't be combined with --verbose; choose one\n"


@pytest.mark.parametrize(("option", "kept"), [("--quiet", False), ("--verbose", True)])
def test_a_run_keeps_what_its_ranks_did_where_that_is_asked_for(
    tmp_path: Path, option: str, kept: bool
) -> None:
    (tmp_path / "config.yaml").write_text("name: tiny\n")
    overrides = [*TINY_RUN, "reward={function: gsm8k, workers: 1}", "trainer.steps=1"]
    overrides += ["parallel.tensor=2", "trainer.kl_every=0"]
    done = forked_proma(option, "train", "config.yaml", *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "runs" / "tiny" / "logs").glob("rank*.log"))
    assert [path.name for path in files] == (["rank0.log", "rank1.log"] if kept else [])
    if kept:
        assert all("DEBUG" in path.read_text() for path in files)
        assert "INFO rank 0 proma_megatron.observability.terminal: RL 1/1" in files[0].read_text()
        assert "RL 1/1 " in done.stdout
    else:
        assert (done.stdout, done.stderr) == ("", "")


def test_records_go_where_they_ask_to(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("proma_megatron.somewhere")
    logger.info("a note of 100%")
    logger.info("of a run", extra=logs.STDOUT)
    logger.debug("unseen")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("of a run\n", "a note of 100%\n")


def test_the_environment_gives_the_level(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("proma_megatron.somewhere")
    monkeypatch.setenv(logs.LEVEL, "error")
    logs.configure()
    logger.warning("unseen")
    logger.error("seen")
    assert capsys.readouterr().err == "seen\n"
    monkeypatch.setenv(logs.LEVEL, "loud")
    with pytest.raises(ConfigError, match=r"PROMA_LOG_LEVEL is 'loud', expected one of ERROR"):
        logs.configure()


class Full(io.StringIO):
    """A file on a disk that takes nothing more."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_stream_that_takes_nothing_fails_as_print_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(OSError, match="No space left"):
        logging.getLogger("proma_megatron.somewhere").info("x", extra=logs.STDOUT)
