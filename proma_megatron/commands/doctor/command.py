"""`proma doctor`: try every part, say what a run would use and what is wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proma_megatron.commands.doctor.findings import Finding, look
from proma_megatron.commands.doctor.probes import PROBES
from proma_megatron.config.loading import load_config
from proma_megatron.config.run import RunConfig, check_data_files, check_model_files
from proma_megatron.distributed import libraries
from proma_megatron.errors import ConfigError

logger = logging.getLogger(__name__)

# Without these no run starts, whatever its configuration.
NEEDED = ("machine", "torch", "megatron-core", "sentencepiece")
STYLES = {"works": "green", "absent": "dim", "unused": "dim", "broken": "bold red"}
TE = "transformer-engine"

# What is looked at where no file is given: as the shipped configurations of real models are.
ANY_RUN = {"name": "any", "model": {"dtype": "bfloat16"}}


@dataclass(frozen=True)
class Diagnosis:
    """Of a machine, and of a run on it."""

    parts: tuple[Finding, ...]
    uses: dict[str, str]  # what a run takes here; empty where none could start
    wrong: tuple[str, ...]  # each with its fix
    could_be_better: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def doctor(
    path: Path | None, overrides: Sequence[str], gpus_per_node: int | None, *, as_json: bool
) -> bool:
    """Try the machine's parts and print what was found, as a table or as a line of JSON.

    Args:
        path: YAML file of a run; None: any run in bfloat16.
        gpus_per_node: as of `diagnose`.

    Returns:
        Whether nothing is wrong.

    Raises:
        ConfigError: the file doesn't configure a run.
    """
    config = None if path is None else load_config(path, overrides)
    shown = Console(stderr=True, quiet=not logger.isEnabledFor(logging.INFO))
    with shown.status("trying every part, each in a process of its own"):
        found = diagnose(config, gpus_per_node)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        show(found, Console(), config.name if config else "")
    return not found.wrong


def diagnose(config: RunConfig | None, gpus_per_node: int | None = None) -> Diagnosis:
    """Try the machine's parts, for a run or for any in bfloat16.

    Args:
        gpus_per_node: ranks of the run on this node; None: all of them.
    """
    return conclude(look(list(PROBES)), config, gpus_per_node)


def conclude(
    parts: Sequence[Finding], config: RunConfig | None, gpus_per_node: int | None = None
) -> Diagnosis:
    """Conclude what the findings mean for a run; the arguments are as of `diagnose`."""
    found = {part.name: part for part in parts}
    wanted = config or RunConfig.model_validate(ANY_RUN)
    wrong = [
        _sentence(part)
        for part in parts
        if part.state == "broken" or (part.state == "absent" and part.name in NEEDED)
    ]
    wrong += _missing_files(wanted)
    uses: dict[str, str] = {}
    # Placing the run asks torch for GPUs, in this process: not where that has just failed.
    if not any(name in found and found[name].state == "broken" for name in ("torch", "gpus")):
        try:
            uses = _uses(found, wanted, gpus_per_node)
        except ConfigError as error:
            wrong.append(str(error))
    return Diagnosis(tuple(parts), uses, tuple(wrong), tuple(_advice(parts, wanted, wrong)))


def _sentence(part: Finding) -> str:
    return "; ".join(filter(None, (f"{part.name}: {part.detail}", part.fix)))


def _missing_files(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the files that a run reads."""
    checks: tuple[Callable[[RunConfig], None], ...] = (check_data_files, check_model_files)
    for check in checks:
        try:
            check(config)
        except ConfigError as error:
            yield str(error)


def _advice(parts: Sequence[Finding], config: RunConfig, wrong: Sequence[str]) -> Iterator[str]:
    """Yield advice on parts that are not broken.

    Transformer Engine is spoken of only to who would have it, and once.
    """
    for part in parts:
        told = part.name == TE and any(part.fix in text for text in wrong)
        unwanted = part.name == TE and config.model.backend == "torch"
        if part.state != "broken" and part.fix and not (told or unwanted):
            yield f"{part.name}: {part.fix}"


def _uses(
    found: Mapping[str, Finding], config: RunConfig, gpus_per_node: int | None
) -> dict[str, str]:
    """Return what a run takes on this machine.

    Raises:
        ConfigError: it could not start.
    """
    from proma_megatron.distributed import devices  # imports torch, which may be what is broken

    ranks = config.parallel.world_size
    local = min(ranks, gpus_per_node or ranks)
    device = devices.choose_device(config.device, local)
    backend = devices.choose_backend(config.model, device)
    devices.check_precision(config, device)
    _check_recipe(found.get(TE), config, backend)

    def works(name: str) -> bool:
        return name in found and found[name].state == "works"

    te = backend == "transformer_engine"
    return {
        "device": f"{device}, {local} rank{'s' if local > 1 else ''} on this node",
        "communication": "NCCL" if device == "cuda" else "Gloo",
        "layers": (
            f"{'Transformer Engine' if te else 'Megatron-Core'}'s"
            f"{'' if te else ' own, with torch kernels'}, in {config.model.dtype}"
        ),
        "FP8": _fp8(config) if te else "none",
        "attention": (
            "Transformer Engine's in training, torch's in rollouts"
            if te
            else "torch's scaled_dot_product_attention"
        ),
        "weight gradients": _weight_gradients(config, device, te=te),
        "optimizer": _adam(device, works),
        "launching": "NeMo-Run" if works("nemo-run") else "by hand: `proma launch` needs NeMo-Run",
    }


def _check_recipe(engine: Finding | None, config: RunConfig, backend: str) -> None:
    """Check that the FP8 recipe worked when it was tried; ConfigError if not."""
    fp8 = config.model.fp8
    if backend == "torch" or fp8 == "none" or engine is None or engine.state != "works":
        return
    if fp8 not in engine.recipes:
        others = " or ".join(f"model.fp8={name}" for name in (*engine.recipes, "none"))
        raise ConfigError(
            f"model.fp8 is '{fp8}', which does not work here ({engine.detail}); use {others}"
        )


def _fp8(config: RunConfig) -> str:
    model = config.model
    if model.fp8 == "none":
        return "none"
    said = [model.fp8]
    if model.fp8_skip_first or model.fp8_skip_last:
        said.append(
            f"but bfloat16 in the first {model.fp8_skip_first} and the last "
            f"{model.fp8_skip_last} of {model.layers} layers"
        )
    if config.projects:
        said.append(f"sequence gradients from {config.projection.fp8_operands} operands")
    return ", ".join(said)


def _weight_gradients(config: RunConfig, device: str, *, te: bool) -> str:
    """Say whose GEMM adds them up; as `gemm.choose_gemm` has it for what is projected."""
    if not config.projects:
        return "the layers' own, added to main_grad by Megatron's DDP"
    kept = "float32" if config.model.dtype == "bfloat16" else config.model.dtype
    half = device == "cuda" and config.model.dtype == "bfloat16"
    if te:
        return "Transformer Engine's GEMMs, of bfloat16 operands, into float32 main_grad"
    if half and libraries.has_fused_weight_gradient():
        return "Apex's fused_weight_gradient_mlp_cuda, into float32 main_grad"
    return f"torch, in the accumulation dtype ({kept})"


def _adam(device: str, works: Callable[[str], bool]) -> str:
    """Say whose Adam it is: Megatron takes the first that it can import."""
    if device == "cuda" and works(TE):
        return "Transformer Engine's FusedAdam"
    return "Apex's FusedAdam" if device == "cuda" and works("apex") else "torch's AdamW"


def show(diagnosis: Diagnosis, console: Console, run: str = "") -> None:
    """Print tables as wide as the console; texts may hold brackets, and are no markup.

    Args:
        run: name of the one that was looked at.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("part", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("version", overflow="fold", max_width=16)
    table.add_column("what was tried", overflow="fold")
    for part in diagnosis.parts:
        state = Text(part.state, STYLES[part.state])
        table.add_row(part.name, state, Text(part.version), Text(part.detail))
    console.print(table)
    if diagnosis.uses:
        console.print(f"{run or 'A run in bfloat16'} would use here", highlight=False)
        _print_pairs([(f"  {name}", value) for name, value in diagnosis.uses.items()], console)
        console.print()
    _print_pairs(
        [("could be better", text) for text in diagnosis.could_be_better], console, "yellow"
    )
    _print_pairs([("wrong", text) for text in diagnosis.wrong], console, "bold red")
    if not diagnosis.wrong:
        console.print("nothing is wrong", style="green")


def _print_pairs(pairs: Sequence[tuple[str, str]], console: Console, style: str = "") -> None:
    """Print label and text, whose further lines stand below its first."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style=style)
    grid.add_column(overflow="fold")
    for label, text in pairs:
        grid.add_row(Text(label), Text(text))
    if pairs:
        console.print(grid)
