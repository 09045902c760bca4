"""`proma verify`: what it compares, and that it can fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.cases import MODELS
from support.command import forked_proma
from support.forked import forked_start_ranks
from support.reference import huggingface_model

from proma_megatron.commands.verify.command import verify as verify_here
from proma_megatron.commands.verify.comparison import KindError, compare, relative_error
from proma_megatron.commands.verify.subject import random_batch, read_subject
from proma_megatron.errors import ConfigError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


# What ranks run. The projection's own sums over tensor ranks go missing.
FAULT = """
import importlib, sys, torch.distributed as dist
original = dist.all_reduce
def faulty(*args, **kwargs):
    if sys._getframe(1).f_globals.get("__name__") != "proma_megatron.projection.updaters.sums":
        return original(*args, **kwargs)
def main(arguments):
    dist.all_reduce = faulty
    module, *others = arguments
    importlib.import_module(module).main(others)
"""


def start_with_fault(module: str, arguments: Sequence[str], **options: Any) -> None:
    forked_start_ranks("missing_sum", [module, *arguments], **options)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "qwen2"
    huggingface_model(MODELS["qwen2"], 3).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("in_pool")
@pytest.mark.parametrize(
    ("rule", "removed"),
    [
        ("exact", "of the accumulated energy was projected away"),
        ("subspace", "of the microbatches' own energy was projected away"),
        ("kernel", "of the plain gradient's energy was changed"),
    ],
)
def test_the_quickstart_passes_on_two_replicas(
    capsys: pytest.CaptureFixture[str], rule: str, removed: str
) -> None:
    overrides = ["parallel.tensor=1", "parallel.data=2", f"projection.rule={rule}"]
    if rule != "exact":
        overrides.append(f"algorithm={'isopo' if rule == 'kernel' else 'intra_proma'}")
    assert verify_here(QUICKSTART, overrides)
    shown = capsys.readouterr().out
    assert "FAIL" not in shown
    assert "self_attn.q_norm.weight" in shown
    last = shown.splitlines()[-1]
    assert last.endswith(removed)
    assert last.startswith("PASS: tensor 1 x pipeline 1 x data 2 (2 workers on cpu (Gloo))")
    assert "float32" in last
    largest = float(last.split("largest relative error ")[1].split(",")[0])
    assert largest < 1e-4


@pytest.mark.ranks
def test_a_sum_that_is_missing_between_shards_fails(qwen2: Path, tmp_path: Path) -> None:
    (tmp_path / "missing_sum.py").write_text(FAULT)
    arguments = ("verify", str(qwen2), "parallel.tensor=2")
    done = forked_proma(*arguments, cwd=tmp_path, start=start_with_fault)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1].startswith("FAIL: tensor 2 x pipeline 1 x data 1")
    verdicts = {
        line.split()[1]: line.split()[-2] for line in done.stdout.splitlines() if "weight" in line
    }
    assert verdicts["mlp.up_proj.weight"] == "FAIL"
    assert verdicts["norm.weight"] == "PASS"  # every rank has the whole of it


# --------------------------------------------------------------------------- what is verified


def test_a_model_directory_is_verified_in_float64_on_two_ranks(
    qwen2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = read_subject(qwen2, [])
    assert subject.config.model.dtype == subject.model.dtype == "float64"
    assert subject.config.parallel.tensor == 2
    assert subject.weights == qwen2
    assert "parallel.tensor=2" in capsys.readouterr().err


def test_a_layout_is_taken_as_it_is_asked_for(qwen2: Path) -> None:
    subject = read_subject(qwen2, ["parallel.pipeline=2", "model.dtype=bfloat16"])
    assert (subject.config.parallel.tensor, subject.config.parallel.pipeline) == (1, 2)
    assert subject.config.model.dtype == "bfloat16"


def test_one_process_that_was_asked_for_is_refused(qwen2: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing to compare .* parallel\.tensor=2"):
        read_subject(qwen2, ["parallel.tensor=1"])


def test_a_layout_that_does_not_fit_is_refused(qwen2: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.heads is 4"):
        read_subject(qwen2, ["parallel.tensor=3"])


def test_every_replica_and_stage_has_something_to_project() -> None:
    subject = read_subject(QUICKSTART, ["parallel.data=2", "parallel.pipeline=4"])
    batch = random_batch(subject)
    assert len(batch) == 8
    assert {len(microbatch) for microbatch in batch[::2]} == {3, 4}
    assert batch == random_batch(subject)


# --------------------------------------------------------------------------- comparing


def write(path: Path, **changes: torch.Tensor) -> Path:
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.ones(4, 4).double(),
        "model.layers.1.mlp.up_proj.weight": torch.ones(4, 4).double(),
        "model.norm.weight": torch.ones(4).double(),
    }
    save_file(tensors | changes, path)
    return path


def test_each_kind_shows_its_worst_tensor(tmp_path: Path) -> None:
    changed = torch.ones(4, 4).double()
    changed[2, 3] += 4e-3
    name = "model.layers.1.mlp.up_proj.weight"
    found = compare(write(tmp_path / "a", **{name: changed}), write(tmp_path / "b"))
    assert found == [
        KindError("mlp.up_proj.weight", 2, pytest.approx(1e-3), name),  # type: ignore[arg-type]
        KindError("norm.weight", 1, 0.0, "model.norm.weight"),
    ]
    assert [kind.within(1e-4) for kind in found] == [False, True]


@pytest.mark.parametrize("layer", [0, 1])
def test_nan_is_never_within_a_tolerance(tmp_path: Path, layer: int) -> None:
    broken = torch.ones(4, 4).double()
    broken[0, 0] = torch.nan
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    kind, _ = compare(write(tmp_path / "a", **{name: broken}), write(tmp_path / "b"))
    assert kind.where == name
    assert not kind.within(1e9)


def test_a_tensor_that_should_be_zero_must_be_zero() -> None:
    zero = torch.zeros(3).double()
    assert relative_error(zero, zero) == 0
    assert relative_error(zero + 1e-30, zero) == float("inf")


def test_files_with_different_tensors_are_no_comparison(tmp_path: Path) -> None:
    extra = write(tmp_path / "a", other=torch.ones(1))
    with pytest.raises(RuntimeError, match="different tensors"):
        compare(extra, write(tmp_path / "b"))
