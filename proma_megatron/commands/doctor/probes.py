"""Try one part of the machine by a tiny call; run in a process of its own.

    python -m proma_megatron.commands.doctor.probes NAME

prints one line of JSON, the fields of a `Finding`. An exception ends the process: its last line is
the finding then.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from importlib import util
from pathlib import Path
from typing import Any

from proma_megatron.commands.doctor.told import MARK, installed_version
from proma_megatron.distributed import libraries

Result = dict[str, Any]


def works(version: str, detail: str = "", fix: str = "") -> Result:
    return {"state": "works", "version": version, "detail": detail, "fix": fix}


def absent(detail: str) -> Result:
    return {"state": "absent", "detail": detail}


def unused(version: str, detail: str) -> Result:
    return {"state": "unused", "version": version, "detail": detail}


def broken(version: str, detail: str, fix: str) -> Result:
    return {"state": "broken", "version": version, "detail": detail, "fix": fix}


def _has_driver() -> bool:
    """Tell whether there is a driver, before torch is imported, which takes seconds."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def _has_gpu() -> bool:
    if not _has_driver():
        return False
    import torch

    return torch.cuda.is_available()


def machine() -> Result:
    """Report cores and memory that this process may use, and Python."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    detail = (
        f"{cores} CPU cores, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    )
    return works(f"Python {platform.python_version()}", detail)


def torch_itself() -> Result:
    """Try a product and a solve in float64."""
    import torch

    matrix = torch.randn(64, 64, dtype=torch.float64) + 64 * torch.eye(64, dtype=torch.float64)
    error = (torch.linalg.solve(matrix, matrix) - torch.eye(64, dtype=torch.float64)).abs().max()
    if not error < 1e-12:
        raise ArithmeticError(f"a linear system of 64 equations is off by {float(error):.1e}")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    return works(torch.__version__, f"{built}; {torch.get_num_threads()} threads")


def gpus() -> Result:
    """Try a product in bfloat16 on every GPU."""
    if not _has_driver():
        return absent("no NVIDIA driver")
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        if visible is not None:
            return unused("", f"CUDA_VISIBLE_DEVICES={visible} leaves none to torch")
        return broken(
            "",
            f"there is a driver, but torch {torch.__version__} can't use it",
            "run nvidia-smi; where that works, install a torch for its CUDA version",
        )
    told = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        x = torch.randn(256, 256, device=device, dtype=torch.bfloat16)
        exact = x.double() @ x.double()
        error = float(((x @ x).double() - exact).norm() / exact.norm())
        if not error < 1e-2:
            raise ArithmeticError(f"cuda:{index}: a bfloat16 product is off by {error:.1e}")
        found = torch.cuda.get_device_properties(device)
        told.append(
            f"{found.name}, {found.total_memory / 2**30:.0f} GiB, "
            f"compute capability {found.major}.{found.minor}"
        )
    return works(f"{len(told)} x", "; ".join(sorted(set(told))))


def _add_up(rank: int, backend: str, ranks: int, port: int) -> None:
    """Take one rank's part in an all-reduce of all ranks' numbers."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=1),
        device_id=device if device.type == "cuda" else None,
    )
    values = torch.full((4096,), rank + 1.0, device=device)
    dist.all_reduce(values)
    expected = ranks * (ranks + 1) / 2
    if not bool((values == expected).all()):
        raise ArithmeticError(f"an all-reduce gave {float(values[0]):g}, expected {expected:g}")
    dist.destroy_process_group()


def gloo() -> Result:
    from torch.multiprocessing.spawn import start_processes

    # Forked: nothing has touched a GPU here, and the ranks need not import torch again.
    start_processes(_add_up, ("gloo", 2, _free_port()), nprocs=2, start_method="fork")
    return works("", "an all-reduce of 2 processes")


def nccl() -> Result:
    """Try an all-reduce between all GPUs: links that are set up wrongly show there only."""
    if not _has_gpu():
        return absent("needs a GPU")
    import torch
    from torch.cuda.nccl import version
    from torch.multiprocessing.spawn import start_processes

    ranks = torch.cuda.device_count()
    start_processes(_add_up, ("nccl", ranks, _free_port()), nprocs=ranks, start_method="spawn")
    return works(
        ".".join(map(str, version())),
        f"an all-reduce of {ranks} GPUs" if ranks > 1 else "an all-reduce of the one GPU",
    )


def megatron_core() -> Result:
    """Try projected gradients of a tiny policy and an update: Megatron's model, DDP, Adam."""
    from proma_megatron.processes.entry import defer_compilation

    defer_compilation()
    import torch

    from proma_megatron.config.model import ModelConfig, ParallelConfig
    from proma_megatron.config.objective import ProjectionConfig
    from proma_megatron.config.trainer import OptimizerConfig
    from proma_megatron.distributed import topology
    from proma_megatron.learner.gradients import projected_gradients
    from proma_megatron.learner.optimizer import Optimizer
    from proma_megatron.model.build import build_policy
    from proma_megatron.types import TrainingSequence

    sequence = TrainingSequence(tuple(range(6)), (0, 0, 1, 1, 1, 1), 1.0, (0.0,) * 6)
    batch = [[sequence, sequence], [sequence]]
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if kind == "cuda" else "float32"  # so that auto takes Transformer Engine
    model = ModelConfig(
        dtype=dtype, hidden_size=128, ffn_hidden_size=256, layers=1, heads=2, head_dim=64
    )
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    with (
        topology.process_group(kind, 1.0) as device,
        topology.layout(ParallelConfig(), device, 0) as layout,
    ):
        policy = build_policy(model, 11, 16, layout, seed=0)
        found, _ = projected_gradients(policy, batch, ProjectionConfig())
        norm = Optimizer(policy, OptimizerConfig(), 1).step()["optimizer/grad_norm"]
    bad = [name for name, value in found.items() if not bool(value.isfinite().all())]
    if bad or not found:
        raise ArithmeticError(f"the gradient of {bad[0] if bad else 'no parameter'} is not finite")
    if not norm > 0:
        raise ArithmeticError(f"the gradient's norm is {norm}")
    return works(
        installed_version("megatron-core"),
        f"projected gradients and an update of a tiny policy, in {dtype} on {kind}",
    )


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def transformer_engine() -> Result:
    version = libraries.transformer_engine_version()
    if version is None:
        return absent("for FP8 and its own layers on GPUs: the extra `te`")
    if not _has_gpu():
        return unused(version, "its layers need a GPU")
    # Whether an untested version keeps a run from starting, the run's keys say: nothing is broken.
    untested = libraries.transformer_engine_problem() or ""
    try:
        good, bad = _try_te()
    except Exception as error:
        if not untested:
            raise
        told = unused(version, f"untested, and fails: {type(error).__name__}: {error}")
        return {**told, "fix": untested}
    layers = f"a linear layer in bfloat16{''.join(f', FP8 {name}' for name in good)}, fused Adam"
    return {**works(version, "; ".join([layers, *bad]), untested), "recipes": good}


def _try_te() -> tuple[list[str], list[str]]:
    """Return the values of model.fp8 that work, and why the others don't."""
    from transformer_engine.common import recipe  # type: ignore[import-not-found]

    _try_te_layer(None)
    _try_fused_adam("transformer_engine.pytorch.optimizers")
    good, bad = [], []
    for name, scaling in {
        "current": recipe.Float8CurrentScaling,
        "delayed": recipe.DelayedScaling,
        "blockwise": recipe.Float8BlockScaling,
        "mxfp8": recipe.MXFP8BlockScaling,
    }.items():
        try:
            _try_te_layer(scaling())
        except Exception as error:  # TE's own sentence: it needs another GPU, or another CUDA
            bad.append(f"not {name}: {str(error).partition(chr(10))[0]}")
        else:
            good.append(name)
    return good, bad


def _try_te_layer(scaling: Any) -> None:
    """Run a linear layer of ones forward and backward, its weight gradient added to float32."""
    import torch
    import transformer_engine.pytorch as te  # type: ignore[import-not-found]

    size = 128  # a block of the blockwise recipe
    layer = te.Linear(
        size, size, bias=False, params_dtype=torch.bfloat16, fuse_wgrad_accumulation=True
    )
    torch.nn.init.ones_(layer.weight)
    layer.weight.main_grad = torch.ones(size, size, device="cuda")
    x = torch.ones(size, size, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    with te.autocast(enabled=scaling is not None, recipe=scaling):
        out = layer(x)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    _expect("a linear layer", out, size)
    _expect("its input gradient", x.grad, size)
    _expect("its fused weight gradient", layer.weight.main_grad, size + 1)


def _try_fused_adam(module: str) -> None:
    """Make Adam's first update, whose size is the learning rate."""
    import importlib

    import torch

    parameter = torch.nn.Parameter(torch.ones(64, device="cuda"))
    parameter.grad = torch.ones_like(parameter)
    importlib.import_module(module).FusedAdam([parameter], lr=0.5).step()
    _expect("fused Adam", parameter, 0.5)


def _expect(what: str, found: Any, value: float) -> None:
    wrong = (found.detach().float() - value).abs().max()
    if not wrong < 0.01 * value:  # NaN is not, either
        raise ArithmeticError(f"{what} is off by {float(wrong):g} from {value:g}")


def apex() -> Result:
    """Try NVIDIA's Apex; PyPI has another project of this name."""
    problem = libraries.apex_problem()
    if problem is not None:
        detail, _, fix = problem.partition("; ")
        return broken(installed_version("apex"), detail, fix)
    if not libraries.has_nvidia_apex():
        return absent(
            "for fused weight gradients and Adam: from NGC containers, not PyPI, or "
            + libraries.APEX_SOURCE
        )
    version = installed_version("apex")
    if not _has_gpu():
        return unused(version, "its kernels need a GPU")
    import torch

    _try_fused_adam("apex.optimizers")
    if not libraries.has_fused_weight_gradient():
        return works(
            version,
            "fused Adam; without fused_weight_gradient_mlp_cuda",
            "build it with --wgrad_gemm_accum_fusion for GEMMs that add to float32 gradients",
        )
    import fused_weight_gradient_mlp_cuda as fused  # type: ignore[import-not-found]

    x = torch.ones(16, 32, dtype=torch.bfloat16, device="cuda")
    dy = torch.ones(16, 8, dtype=torch.bfloat16, device="cuda")
    grad = torch.ones(8, 32, device="cuda")
    fused.wgrad_gemm_accum_fp32(x, dy, grad)
    _expect("a fused weight gradient", grad, 17)
    return works(version, "fused Adam and a fused weight gradient")


def nemo_run() -> Result:
    if util.find_spec("nemo_run") is None:
        return absent("for `proma launch`: the extra `launch`")
    import nemo_run  # type: ignore[import-not-found]

    nemo_run.Script(inline="true")
    nemo_run.LocalExecutor()
    return works(installed_version("nemo-run"), "a script and an executor")


def sentencepiece() -> Result:
    import sentencepiece as found

    found.SentencePieceProcessor()
    return works(installed_version("sentencepiece"))


def slurm() -> Result:
    """Look for Slurm; a machine with its programs that is no part of a cluster is not broken."""
    if shutil.which("sbatch") is None:
        return absent("no sbatch here; `proma launch slurm` can submit over SSH")
    name, _, version = _said("sbatch", "--version").partition(" ")
    version = version if name == "slurm" else ""  # else it says what is wrong
    answer = _said("scontrol", "ping")  # of each controller: "... is UP" or "... is DOWN"
    if " is UP" in answer:
        return works(version, "the controller answers")
    return unused(version, f"no controller answers: {answer.removeprefix('scontrol: error: ')}")


def _said(*command: str, seconds: float = 20.0) -> str:
    """Return the first line that a program printed, or why there is none."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
        return lines[0] if lines else f"{command[0]} says nothing"
    return f"{command[0]} gives no answer"


PROBES: dict[str, Callable[[], Result]] = {
    "machine": machine,
    "torch": torch_itself,
    "gpus": gpus,
    "gloo": gloo,
    "nccl": nccl,
    "megatron-core": megatron_core,
    "transformer-engine": transformer_engine,
    "apex": apex,
    "nemo-run": nemo_run,
    "sentencepiece": sentencepiece,
    "slurm": slurm,
}


def main() -> None:
    warnings.simplefilter("ignore")
    print(MARK + json.dumps(PROBES[sys.argv[1]]()), flush=True)


if __name__ == "__main__":
    main()
