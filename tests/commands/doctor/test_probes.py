"""Every part is tried apart, and what it does becomes the finding."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from proma_megatron.commands.doctor import probes
from proma_megatron.commands.doctor.findings import Finding, look
from proma_megatron.distributed import cpu, libraries

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a package in front of what is installed, for child processes."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    def make(package: str, code: str = "", *, version: str) -> None:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(code)
        told = tmp_path / f"{package}-{version}.dist-info"
        told.mkdir()
        (told / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )

    return make


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a shell script in front of the machine's programs."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def make(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return make


def found(name: str) -> Finding:
    (finding,) = look([name])
    return finding


@pytest.mark.ranks
def test_the_other_projects_apex_is_named(install: Install, tmp_path: Path) -> None:
    install("apex", "raise ImportError('pyramid')", version="0.9.10.dev0")
    finding = found("apex")
    assert finding.state == "broken"
    assert finding.version == "0.9.10.dev0"
    assert "not NVIDIA's Apex" in finding.detail
    assert str(tmp_path) in finding.detail
    assert finding.fix.startswith("pip uninstall apex")


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels would be called on the GPU")
@pytest.mark.ranks
def test_nvidias_apex_is_not_taken_for_the_other(install: Install, tmp_path: Path) -> None:
    install("apex", version="0.1")
    (tmp_path / "apex" / "multi_tensor_apply").mkdir()
    assert found("apex").state == "unused"


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("import os; os.abort()", "ended by signal 6"),
        ("raise ImportError('libfoo.so.3: cannot open')", "ImportError: libfoo.so.3: cannot open"),
        ("import sys; sys.exit(3)", "exit code 3"),
        # What follows a traceback while a process ends, and what torch puts before each line.
        (
            "import sys; sys.exit('[rank0]: RuntimeError: no kernel image\\n[W] not destroyed')",
            "RuntimeError: no kernel image",
        ),
    ],
)
@pytest.mark.ranks
def test_a_part_that_breaks_takes_no_other_with_it(
    install: Install, code: str, detail: str
) -> None:
    install("nemo_run", code, version="9.9")
    launching, machine = look(["nemo-run", "machine"])
    assert (launching.state, launching.detail) == ("broken", detail)
    assert machine.state == "works"


@pytest.mark.ranks
def test_a_part_that_hangs_is_ended_with_the_processes_that_it_started(install: Install) -> None:
    # They hold its output open: who only ended the part would wait for them.
    code = "import subprocess; subprocess.run(['sleep', '100'])"
    install("nemo_run", code, version="9.9")
    started = time.monotonic()
    (finding,) = look(["nemo-run"], timeout=2)
    assert time.monotonic() - started < 50
    assert (finding.state, finding.detail) == ("broken", "no answer within 2 s")


@pytest.mark.ranks
def test_what_libraries_print_is_no_result(install: Install) -> None:
    code = "print('hello'); Script = LocalExecutor = lambda **_: print('made')"
    install("nemo_run", code, version="9.9")
    assert found("nemo-run") == Finding(
        "nemo-run", "works", version="9.9", detail="a script and an executor"
    )


@pytest.mark.ranks
def test_a_part_does_not_take_itself_for_a_rank(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
    for name in names:
        monkeypatch.setenv(name, "7")
    code = "import os; Script = LocalExecutor = lambda **_: 0"
    code += f"\nassert not {set(names)} & {{*os.environ}}"
    install("nemo_run", code, version="9.9")
    assert found("nemo-run").state == "works"


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("echo 'Slurmctld(primary) at c1 is UP'", "works"),
        ("echo 'Slurmctld(primary) at c1 is DOWN'", "unused"),
        ("echo 'scontrol: error: no such host' >&2; exit 1", "unused"),
    ],
)
def test_slurms_programs_without_a_controller_are_nothing_broken(
    program: Callable[[str, str], None], answer: str, state: str
) -> None:
    program("sbatch", "echo slurm 25.05.1")
    program("scontrol", answer)
    result = probes.slurm()
    assert (result["state"], result["version"]) == (state, "25.05.1")
    assert "error:" not in result["detail"]


def test_a_controller_that_hangs_is_nothing_broken(program: Callable[[str, str], None]) -> None:
    program("scontrol", "exec sleep 100")
    assert probes._said("scontrol", "ping", seconds=0.2) == "scontrol gives no answer"
    assert probes._said("no-such-program") == "no-such-program gives no answer"


@pytest.mark.parametrize(("visible", "state"), [(None, "broken"), ("", "unused")])
def test_gpus_that_were_hidden_are_nothing_broken(
    visible: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert probes.gpus()["state"] == state


class _Linear(torch.nn.Linear):
    """Transformer Engine's, as far as it is called; its FP8 recipes are names."""

    faulty = False

    def __init__(self, *shape: int, bias: bool, params_dtype: torch.dtype, **_: bool) -> None:
        super().__init__(*shape, bias=bias, dtype=params_dtype)
        self.weight.register_post_accumulate_grad_hook(self._add)

    def _add(self, weight: Any) -> None:
        weight.main_grad += 0 if self.faulty else weight.grad.float()


@contextlib.contextmanager
def _autocast(enabled: bool, recipe: str | None) -> Iterator[None]:
    assert enabled == (recipe is not None)
    if recipe == "mxfp8":
        raise RuntimeError("Device compute capability 10.0 or higher required.\nmore")
    yield


_Adam = partial(torch.optim.AdamW, weight_decay=0.0)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for Transformer Engine and Apex, and the CPU for the GPU: calls are as on one."""
    recipes = {
        "Float8CurrentScaling": lambda: "current",
        "DelayedScaling": lambda: "delayed",
        "Float8BlockScaling": lambda: "blockwise",
        "MXFP8BlockScaling": lambda: "mxfp8",
    }

    def add_fp32(x: torch.Tensor, dy: torch.Tensor, grad: torch.Tensor) -> None:
        grad += dy.float().T @ x.float()

    modules: dict[str, dict[str, Any]] = {
        "transformer_engine": {},
        "transformer_engine.common": {"recipe": SimpleNamespace(**recipes)},
        "transformer_engine.pytorch": {"Linear": _Linear, "autocast": _autocast},
        "transformer_engine.pytorch.optimizers": {"FusedAdam": _Adam},
        "apex": {},
        "apex.optimizers": {"FusedAdam": _Adam},
        "fused_weight_gradient_mlp_cuda": {"wgrad_gemm_accum_fp32": add_fp32},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(probes, "_has_gpu", lambda: True)
    monkeypatch.setattr(libraries, "transformer_engine_version", lambda: "2.20.2")
    monkeypatch.setattr(libraries, "_has_torch_binding", lambda: True)
    monkeypatch.setattr(libraries, "apex_problem", lambda: None)
    for name in ("has_nvidia_apex", "has_fused_weight_gradient"):
        monkeypatch.setattr(libraries, name, lambda: True)
    with cpu._CpuForCuda():
        yield


def test_transformer_engine_is_tried_in_every_recipe(fake_gpu: None) -> None:
    assert probes.transformer_engine() == {
        "state": "works",
        "version": "2.20.2",
        "detail": "a linear layer in bfloat16, FP8 current, FP8 delayed, FP8 blockwise, fused "
        "Adam; not mxfp8: Device compute capability 10.0 or higher required.",
        "fix": "",
        "recipes": ["current", "delayed", "blockwise"],
    }


def test_an_untested_transformer_engine_works_with_a_word_about_it(
    fake_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "transformer_engine_version", lambda: "2.21.0")
    told = probes.transformer_engine()
    assert told["state"] == "works"
    assert told["fix"] == libraries.transformer_engine_problem()


def test_an_untested_transformer_engine_that_fails_is_not_taken_and_not_wrong(
    fake_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "transformer_engine_version", lambda: "2.4.0")
    monkeypatch.delattr(sys.modules["transformer_engine.pytorch"], "autocast")
    told = probes.transformer_engine()
    assert (told["state"], told["version"]) == ("unused", "2.4.0")
    assert "has no attribute 'autocast'" in told["detail"]
    assert told["fix"] == libraries.transformer_engine_problem()


def test_a_wrong_weight_gradient_of_transformer_engine_is_found(
    fake_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Linear, "faulty", True)
    with pytest.raises(ArithmeticError, match="weight gradient is off by 128 from 129"):
        probes.transformer_engine()


def test_apex_is_tried_with_and_without_its_gemm(
    fake_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert probes.apex()["detail"] == "fused Adam and a fused weight gradient"
    monkeypatch.setattr(libraries, "has_fused_weight_gradient", lambda: False)
    told = probes.apex()
    assert told["state"] == "works"
    assert "--wgrad_gemm_accum_fusion" in told["fix"]
