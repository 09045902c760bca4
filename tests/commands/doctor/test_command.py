"""What findings mean for a run, and how it is said."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.command import proma, proma_here

from proma_megatron.commands.doctor import command, probes
from proma_megatron.commands.doctor.command import conclude, show
from proma_megatron.commands.doctor.findings import Finding, State
from proma_megatron.config.run import RunConfig
from proma_megatron.distributed import devices, libraries

UNTESTED = "Transformer Engine is 2.19.0, tested is >=2.20,<2.21; pip install 'te[pytorch]'"


def everything(**changed: Finding | State) -> list[Finding]:
    """All parts at work, but these."""
    findings = []
    for name in probes.PROBES:
        part = changed.get(name.replace("-", "_"), "works")
        if not isinstance(part, Finding):
            part = Finding(name, part, detail=f"{name} was tried")
        findings.append(part)
    return findings


def engine(fix: str = "", recipes: tuple[str, ...] = ()) -> Finding:
    return Finding("transformer-engine", "works", detail="layers", fix=fix, recipes=recipes)


def run(**changes: object) -> RunConfig:
    return RunConfig.model_validate({"name": "a", **changes})


@pytest.fixture
def gpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are placed on a GPU with a tested Transformer Engine, whatever machine this is."""
    monkeypatch.setattr(devices, "choose_device", lambda requested, ranks: "cuda")
    monkeypatch.setattr(devices, "transformer_engine_problem", lambda: None)
    monkeypatch.setattr(devices, "check_precision", lambda config, device: None)


def test_nothing_is_wrong_where_only_what_is_optional_is_absent() -> None:
    parts = everything(gpus="absent", nccl="absent", apex="absent", slurm="unused")
    diagnosis = conclude(parts, run(device="cpu"))
    assert diagnosis.wrong == diagnosis.could_be_better == ()
    assert diagnosis.uses["device"] == "cpu, 1 rank on this node"
    assert diagnosis.uses["weight gradients"].startswith("torch, in the accumulation dtype")


@pytest.mark.parametrize("name", ["torch", "megatron-core", "sentencepiece"])
@pytest.mark.parametrize("state", ["absent", "broken"])
def test_no_run_starts_without_what_it_needs(name: str, state: State) -> None:
    part = Finding(name, state, detail="x", fix="y")
    diagnosis = conclude(everything(**{name.replace("-", "_"): part}), run(device="cpu"))
    assert diagnosis.wrong == (f"{name}: x; y",)


@pytest.mark.parametrize("name", ["torch", "gpus"])
def test_what_has_failed_in_a_child_is_not_tried_again_here(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(devices, "choose_device")
    part = Finding(name, "broken", detail=f"{name} was tried")
    diagnosis = conclude(everything(**{name: part}), run())
    assert diagnosis.wrong == (f"{name}: {name} was tried",)
    assert diagnosis.uses == {}


@pytest.mark.skipif(torch.cuda.device_count() >= 4, reason="four GPUs are enough for this run")
def test_a_run_that_does_not_fit_the_machine_is_wrong() -> None:
    config = run(device="cuda", parallel={"tensor": 4, "pipeline": 2})
    (problem,) = conclude(everything(), config, gpus_per_node=4).wrong
    assert "device is 'cuda'" in problem
    assert "of the 4 GPUs" in problem


def test_files_that_a_run_reads_and_are_not_there_are_wrong(tmp_path: Path) -> None:
    there = tmp_path / "there.jsonl"
    there.touch()
    files = {"train_file": str(tmp_path / "gone.jsonl"), "validation_file": str(there)}
    diagnosis = conclude(everything(), run(device="cpu", data=files))
    (problem,) = diagnosis.wrong
    assert "gone.jsonl" in problem
    assert diagnosis.uses


@pytest.mark.usefixtures("gpu_run")
def test_a_run_with_transformer_engine_says_what_it_takes_of_it() -> None:
    model = {"dtype": "bfloat16", "fp8": "current", "fp8_skip_last": 1}
    uses = conclude(everything(transformer_engine=engine("", ("current",))), run(model=model)).uses
    assert uses["layers"] == "Transformer Engine's, in bfloat16"
    assert uses["FP8"] == (
        "current, but bfloat16 in the first 0 and the last 1 of 4 layers, sequence gradients from "
        "bfloat16 operands"
    )
    assert uses["weight gradients"].startswith("Transformer Engine's GEMMs")
    assert uses["optimizer"] == "Transformer Engine's FusedAdam"
    assert uses["attention"].startswith("Transformer Engine's in training")


@pytest.mark.usefixtures("gpu_run")
@pytest.mark.parametrize("fused", [True, False])
def test_what_is_projected_is_added_up_by_apex_where_its_gemm_is_there(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "has_fused_weight_gradient", lambda: fused)
    config = run(model={"dtype": "bfloat16", "backend": "torch"})
    uses = conclude(everything(transformer_engine="absent"), config).uses
    gemm = "Apex's fused_weight_gradient_mlp_cuda, into float32 main_grad"
    assert uses["weight gradients"] == (
        gemm if fused else "torch, in the accumulation dtype (float32)"
    )
    plain = config.model_copy(update={"algorithm": "grpo"})
    own = conclude(everything(transformer_engine="absent"), plain).uses["weight gradients"]
    assert own.startswith("the layers' own")
    assert uses["optimizer"] == "Apex's FusedAdam"
    assert uses["layers"] == "Megatron-Core's own, with torch kernels, in bfloat16"


@pytest.mark.usefixtures("gpu_run")
def test_a_recipe_that_did_not_work_here_is_wrong() -> None:
    config = run(model={"dtype": "bfloat16", "fp8": "blockwise"})
    parts = everything(transformer_engine=engine("", ("current",)))
    (problem,) = conclude(parts, config).wrong
    assert "model.fp8 is 'blockwise'" in problem
    assert "use model.fp8=current or model.fp8=none" in problem


@pytest.mark.usefixtures("gpu_run")
@pytest.mark.parametrize(
    ("model", "wrong", "advised"),
    [
        ({}, False, True),  # a run that would take it, and takes torch's layers instead
        ({"backend": "torch"}, False, False),
        ({"backend": "transformer_engine"}, True, False),
        ({"fp8": "current"}, True, False),
    ],
)
def test_an_untested_transformer_engine_is_wrong_where_a_run_asks_for_it(
    model: dict[str, Any], wrong: bool, advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "transformer_engine_problem", lambda: UNTESTED)
    parts = everything(transformer_engine=engine(UNTESTED, ("current",)))
    diagnosis = conclude(parts, run(model={"dtype": "bfloat16", **model}))
    assert [UNTESTED in text for text in diagnosis.wrong] == [True] * wrong
    assert diagnosis.could_be_better == (f"transformer-engine: {UNTESTED}",) * advised
    assert bool(diagnosis.uses) != wrong


@pytest.mark.parametrize("width", [60, 80, 120])
def test_everything_is_shown_whatever_the_width(width: int) -> None:
    parts = everything(
        nccl=Finding("nccl", "broken", detail="NCCL [rank 0] " + 30 * "failed ", fix="mend it"),
        torch=Finding("torch", "works", version="2.11.0a0+" + 20 * "b", detail="a product"),
        transformer_engine=engine(UNTESTED),
    )
    config = run(device="cpu", model={"dtype": "bfloat16"})
    out = io.StringIO()
    show(conclude(parts, config), Console(file=out, width=width), config.name)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out.getvalue()
    assert "\x1b" not in out.getvalue()  # colours are a terminal's
    bare = "".join(out.getvalue().split())
    for text in (
        *probes.PROBES,
        "[rank0]",
        "'te[pytorch]'",
        "couldbebetter",
        "wrongnccl",
        "mendit",
    ):
        assert text in bare
    assert "nothing is wrong" not in out.getvalue()


@pytest.fixture
def all_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried."""
    monkeypatch.setattr(command, "look", lambda names: everything())


@pytest.mark.usefixtures("all_works")
def test_fp8_without_a_gpu_is_wrong_and_ends_with_1(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("name: eight\nmodel: {dtype: bfloat16}\ndevice: cpu\n")
    done = proma_here("doctor", config)
    assert (done.returncode, "nothing is wrong" in done.stdout) == (0, True), done.stdout
    assert "eight would use here" in done.stdout
    done = proma_here("doctor", config, "model.fp8=current", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 1
    (problem,) = told["wrong"]
    assert "'current'" in problem
    assert "model.fp8=none" in problem
    assert told["uses"] == {}


@pytest.mark.slow  # half a minute of two cores; .ci/run runs the command itself
def test_this_machine_can_run_the_project() -> None:
    done = proma("doctor", "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["wrong"]) == (0, []), told
    states = {part["name"]: part["state"] for part in told["parts"]}
    assert list(states) == list(probes.PROBES)
    on_gpus = ("gpus", "nccl") if torch.cuda.is_available() else ()
    for name in ("machine", "torch", "gloo", "megatron-core", "sentencepiece", *on_gpus):
        assert states[name] == "works", told
    assert told["uses"]["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")
