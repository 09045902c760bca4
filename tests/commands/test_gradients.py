"""`proma grads` as a user runs it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.cases import MODELS, assert_equal
from support.command import proma
from support.forked import start_ranks
from support.gradients import Batch, random_batch
from support.reference import huggingface_model, reference_gradients

from proma_megatron.batching.batch_file import write_batch
from proma_megatron.cli import main
from proma_megatron.commands.gradients.command import grads as grads_here
from proma_megatron.config.loading import gradients_config
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.files import atomic_write

SEED = 11
BATCH: Batch = random_batch(8, [2, 3, 1, 3, 2])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Qwen directories by name, in float64, and ``batch.jsonl``."""
    folder = tmp_path_factory.mktemp("grads")
    for name in ("qwen3", "qwen2-untied"):
        huggingface_model(MODELS[name], SEED).save_pretrained(folder / name)
    write_batch(folder / "batch.jsonl", BATCH)
    return folder


def command(folders: Path, model: str, out: Path, *overrides: str) -> list[str]:
    files = ["--hf", str(folders / model), "--batch", str(folders / "batch.jsonl")]
    return ["grads", *files, "--out", str(out), *overrides]


def run_main(arguments: Sequence[str]) -> None:
    sys.argv = ["proma", *arguments]
    main()


@pytest.mark.ranks
def test_a_sharded_run_writes_the_papers_gradients(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "g.safetensors"
    overrides = ["model.dtype=float64", "parallel.tensor=2", "parallel.sequence=true"]
    overrides += ["projection.bound=null", "projection.unit=megatron"]
    done = proma(*command(folders, "qwen3", out, *overrides))
    assert done.returncode == 0, done.stderr
    projection = ProjectionConfig(bound=None, unit="megatron")
    assert_equal(
        load_file(out), reference_gradients(MODELS["qwen3"], BATCH, projection, SEED), 1e-10
    )
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert (found["microbatches"], found["sequences"]) == (5, 11)
    assert found["loss_tokens"] == sum(sum(s.loss_mask[1:]) for m in BATCH for s in m)
    assert found["not_finite"] == []
    assert 0 < found["total"]["removed_energy"] < 1
    assert found["total"]["orthogonality_residual"] < 1e-12
    qkv = found["units"]["decoder.layers.3.self_attention.linear_qkv.weight"]
    assert set(qkv) >= {"removed_energy", "clamp_rate", "effective_rank", "cosine"}
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("in_pool")
def test_replicas_and_a_small_workspace(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "g.safetensors"
    overrides = ["model.dtype=float64", "parallel.data=2", "projection.rule=iterative"]
    overrides += ["projection.parameters=linear", "projection.workspace_mb=1"]
    config = gradients_config([*overrides, "model.recompute=full"])
    grads_here(folders / "qwen2-untied", folders / "batch.jsonl", out, config)
    projection = ProjectionConfig(rule="iterative", parameters="linear")
    expected = reference_gradients(MODELS["qwen2-untied"], BATCH, projection, SEED, replicas=2)
    assert_equal(load_file(out), expected, 1e-10)
    units = json.loads(capfd.readouterr().out)["units"]
    assert "lm_head.weight" in units
    assert not any("norm" in name or "bias" in name or "embed" in name for name in units)


@pytest.mark.usefixtures("in_pool")
@pytest.mark.parametrize("rule", ["exact", "none"])
def test_a_gradient_that_is_not_finite_is_written_and_said(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], rule: str
) -> None:
    """What a run dumped is to be looked at: NaN in the second microbatch, not in the first."""
    batch, out = tmp_path / "dump.jsonl", tmp_path / "g.safetensors"
    bad = [replace(s, advantage=math.nan) for s in BATCH[1]]
    write_batch(batch, [BATCH[0], bad, BATCH[2]])
    config = gradients_config(["parallel.tensor=2", f"projection.rule={rule}"])
    grads_here(folders / "qwen3", batch, out, config)
    found = json.loads(capfd.readouterr().out)
    gradients = load_file(out)
    assert sorted(found["not_finite"]) == sorted(gradients)
    assert all(bool(value.isnan().any()) for value in gradients.values())
    if rule == "exact":
        assert found["total"]["removed_energy"] is None


@pytest.mark.ranks
def test_under_torchrun_it_takes_the_processes_that_are_there(
    folders: Path, tmp_path: Path
) -> None:
    out = tmp_path / "g.safetensors"
    overrides = ("model.dtype=bfloat16", "parallel.tensor=2", "projection.rule=none")
    arguments = command(folders, "qwen3", out, *overrides)
    with start_ranks(2, run_main, arguments, logs=tmp_path / "logs") as ranks:
        assert ranks.wait(120) == [0, 0], ranks.stderr[0].read_text()
    first, second = (path.read_text() for path in ranks.stdout)
    assert json.loads(first)["units"] == {}
    assert second == ""
    found = load_file(out)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    expected = reference_gradients(MODELS["qwen3"], BATCH, ProjectionConfig(rule="none"), SEED)
    assert_equal({name: value.double() for name, value in found.items()}, expected, 0.1)
    with safe_open(out, framework="pt") as opened:
        assert json.loads(opened.metadata()["proma"])["parallel"]["tensor"] == 2


# --------------------------------------------------------------------------- refusals


def refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> str:
    """What `proma` says on its way out with code 2."""
    monkeypatch.setattr(sys, "argv", ["proma", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    return shown.err


def row(**changes: Any) -> str:
    fields = {"microbatch": 0, "tokens": [1, 2, 3], "loss_mask": [0, 1, 1], "advantage": 1.0}
    return json.dumps({key: v for key, v in (fields | changes).items() if v is not None})


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([row(), row(advantage=None)], ["line 2", "'advantage' is missing"]),
        ([row(loss_mask=[0, 1, 1, 1])], ["line 1", "loss_mask has 4 entries for 3 tokens"]),
        ([row(), row(tokens=[1, 251, 3])], ["line 2", "tokens[1] is 251", "0 to 250"]),
        ([row(), row(microbatch=2)], ["line 2", "no microbatch 1"]),
        ([row(advantage=float("nan"))], ["line 1", "advantage is nan"]),
    ],
    ids=["missing field", "long mask", "token", "gap", "nan"],
)
def test_a_bad_batch_is_refused_with_its_line(
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rows: list[str],
    parts: list[str],
) -> None:
    batch, out = tmp_path / "bad.jsonl", tmp_path / "g.safetensors"
    batch.write_text("\n".join(rows))
    arguments = ("--hf", str(folders / "qwen3"), "--batch", str(batch), "--out", str(out))
    message = refused(capsys, monkeypatch, "grads", *arguments)
    assert str(batch) in message
    for part in parts:
        assert part in message
    assert list(tmp_path.iterdir()) == [batch]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("parallel.tensor=3", ["model.heads is 4", "parallel.tensor=3"]),
        ("parallel.pipeline=3", ["model.layers is 4", "multiple of 3"]),
        ("parallel.sequence=true", ["parallel.sequence", "at least 2"]),
        ("device=cuda parallel.tensor=4", ["device is 'cuda'", "device=cpu"]),
        ("model.layers=3", ["'model.layers'", "dtype, recompute"]),
        ("model.dtype=float16", ["'float16'", "'float64', 'float32' or 'bfloat16'"]),
        ("projection.rule=exakt", ["projection.rule", "'exakt'", "'exact'"]),
        ("projection.data_parallel=sequential", ["data_parallel", "'replica'"]),
        ("optimizer.lr=1", ["'optimizer'", "known keys are device"]),
        ("nonsense", ["'nonsense'", "key=value"]),
    ],
)
def test_a_bad_override_is_refused(
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    parts: list[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    model, batch = str(folders / "qwen3"), str(folders / "batch.jsonl")
    arguments = ("--hf", model, "--batch", batch, "--out", str(tmp_path / "g.safetensors"))
    message = refused(capsys, monkeypatch, "grads", *arguments, *override.split())
    for part in parts:
        assert part in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("--hf", "no-such-folder", "no directory"),
        ("--hf", ".", "no config.json"),
        ("--batch", "no-such-file.jsonl", "can't be read"),
        ("--out", "no-such-folder/g.safetensors", "no directory"),
        ("--out", ".", "is a directory"),
        ("--out", "/dev/null", "no ordinary file"),
        ("--out", "BATCH", "is also read"),
        ("--out", "WEIGHTS", "is also read"),
    ],
)
def test_a_bad_path_is_refused(
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    read = {
        "BATCH": str(folders / "batch.jsonl"),
        "WEIGHTS": str(folders / "qwen3" / "model.safetensors"),
    }
    options = {
        "--hf": str(folders / "qwen3"),
        "--batch": str(folders / "batch.jsonl"),
        "--out": "g.safetensors",
    } | {option: read.get(value, value)}
    message = refused(capsys, monkeypatch, "grads", *(x for pair in options.items() for x in pair))
    assert part in message
    assert list(Path.cwd().iterdir()) == []


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path: Path) -> None:
    target = tmp_path / "g.safetensors"
    target.write_text("earlier")

    def write_half() -> None:
        with atomic_write(target) as part:
            part.write_text("half of it")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert target.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [target]
