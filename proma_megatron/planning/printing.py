"""A plan as tables of at most 100 columns."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from proma_megatron.planning.plan import FP8, Plan, StagePlan
from proma_megatron.planning.training import Moment

SPACIOUS = 0.5  # of a GPU's memory: a plan below this needs no advice
KINDS = {  # of Traffic, in the order of the table
    "tensor": "tensor parallel: activations and their gradients",
    "pipeline": "pipeline: activations and their gradients",
    "data": "data parallel: gradients, and weights of a distributed optimizer",
    "tied": "tied table between first and last stage",
    "small_gradients": "tensor parallel: gradients of norms",
    "projection": "projection: K, c and short vectors",
    "tied_projection": "projection: per-token gradients of a tied embedding",
    "looks": "forward passes for KL and references",
    "rollout": "rollout: hidden states and logits",
}


def print_plan(plan: Plan, console: Console) -> None:
    """Print memory by kind, counts, traffic, and whether it fits with what would help."""
    _print_memory(plan, console)
    if len(plan.stages) > 1:
        _print_stages(plan, console)
    _print_counts(plan, console)
    _print_traffic(plan, console)
    _print_verdict(plan, console)


def size(count: int) -> str:
    """Write bytes with three or four digits: "12.3 GiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.0f} GiB" if value >= 1000 else f"{value:.1f} GiB"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _print_memory(plan: Plan, console: Console) -> None:
    """Print the memory of the fullest rank, in each phase at its fullest moment."""
    stage = plan.fullest
    where = f" (pipeline stage {stage.stage})" if len(plan.stages) > 1 else ""
    table = _table(f"Memory of the fullest rank{where}")
    phases: dict[str, Moment] = {
        "training": stage.peak_training,
        "update": stage.update,
        "rollout": stage.peak_rollout,
    }
    table.add_column("kind")
    for name in phases:
        table.add_column(name, justify="right")
    columns = [stage.kinds(moment) for moment in phases.values()]
    for kind in columns[0]:
        if kind == FP8 and not _has_fp8(plan):
            continue
        exact = kind in ("weights", "main gradients", "optimizer", "KV cache")
        label = kind if exact else f"{kind} (estimated)"
        table.add_row(label, *(size(column[kind]) if column[kind] else "-" for column in columns))
    table.add_section()
    table.add_row("together", *(size(sum(column.values())) for column in columns), style="bold")
    table.add_row("fullest at", *(moment.name for moment in phases.values()), style="dim")
    console.print(table)
    console.print(
        f"Host memory: {size(plan.host_snapshot)} a rank for weights that KL compares with. "
        "On a GPU, estimates are unmeasured.\n",
        style="dim",
    )


def _has_fp8(plan: Plan) -> bool:
    return any(stage.update.fp8_weights for stage in plan.stages)


def _print_stages(plan: Plan, console: Console) -> None:
    scale, unit = (2**30, "GiB") if plan.needed >= 2**30 else (2**20, "MiB")
    table = _table(f"Memory of each pipeline stage at its fullest moment, in {unit}")
    held = ("weights", "FP8", "grads", "optim", "activ", "logits", "KV", "work")
    held = tuple(name for name in held if name != "FP8" or _has_fp8(plan))
    for name in ("stage", "layers", "in flight", *held, "together"):
        table.add_column(name, justify="right")
    for stages in _alike(plan.stages):
        stage = stages[0]
        kinds = stage.kinds(stage.peak)
        if not _has_fp8(plan):
            del kinds[FP8]
        label = str(stage.stage) if len(stages) == 1 else f"{stage.stage}-{stages[-1].stage}"
        table.add_row(
            label,
            str(stage.layers),
            str(stage.in_flight),
            *(f"{value / scale:.1f}" if value else "-" for value in kinds.values()),
            f"{stage.total / scale:.1f}",
            style="bold" if plan.fullest in stages else None,
        )
    console.print(table)


def _alike(stages: tuple[StagePlan, ...]) -> list[list[StagePlan]]:
    """Put neighbours with the same figures together."""
    groups: list[list[StagePlan]] = []
    for stage in stages:
        last = groups[-1][-1] if groups else None
        same = last is not None and (last.kinds(last.peak), last.in_flight) == (
            stage.kinds(stage.peak),
            stage.in_flight,
        )
        if same:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def _print_counts(plan: Plan, console: Console) -> None:
    counts = plan.counts
    table = _table("Counts, with every sequence at its full length")
    table.add_column("what")
    table.add_column("number", justify="right")
    rows = {
        "parameters": plan.parameters,
        "parameters on a rank, at most": max(stage.parameters for stage in plan.stages),
        "GPUs": plan.gpus,
        "nodes": plan.nodes,
        "sequences in an RL step": counts.sequences,
        "tokens in an RL step": counts.tokens,
        "optimizer steps in an RL step": counts.minibatches,
        "sequences in a minibatch": counts.sequences_per_minibatch,
        "microbatches in a minibatch, per replica": counts.microbatches,
        "tokens in a microbatch, at most": counts.tokens_per_microbatch,
        "sequences decoded together, per replica": counts.decoded_together,
    }
    for name, value in rows.items():
        table.add_row(name, f"{value:,}")
    console.print(table)


def _print_traffic(plan: Plan, console: Console) -> None:
    stage = max(plan.stages, key=lambda stage: stage.traffic.total)
    total = stage.traffic.total
    if not total:
        console.print("Nothing crosses ranks.\n")
        return
    table = _table("Sent by the busiest rank in an RL step")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    for key, label in KINDS.items():
        value = getattr(stage.traffic, key)
        if value:
            share = value / total
            table.add_row(label, size(value), f"{share:.1%}" if share >= 0.001 else "< 0.1%")
    table.add_section()
    table.add_row("together", size(total), "", style="bold")
    console.print(table)


def _print_verdict(plan: Plan, console: Console) -> None:
    needed, memory = size(plan.needed), size(plan.gpu_memory)
    share = plan.needed / plan.gpu_memory
    if not plan.fits:
        over = size(plan.needed - plan.gpu_memory)
        console.print(
            f"Does not fit: the fullest rank needs {needed} of {memory}, {over} too much "
            f"(at: {plan.fullest.peak.name}).",
            style="bold red",
        )
    elif plan.tight:
        console.print(
            f"Fits with little room: {needed} of {memory} ({share:.0%}); the CUDA context, NCCL "
            "and the allocator take some, too.",
            style="bold yellow",
        )
    else:
        console.print(f"Fits: {needed} of {memory} ({share:.0%}).", style="bold green")
    if plan.projection_removes is False:
        console.print(
            "Nothing will be projected: a replica's minibatch fits into one microbatch; lower "
            "batching.tokens_per_microbatch.",
            style="yellow",
        )
    _print_knobs(plan, console)


def _print_knobs(plan: Plan, console: Console) -> None:
    if plan.needed < SPACIOUS * plan.gpu_memory:
        return
    if not plan.knobs:
        if not plan.fits:
            console.print("No single change helps; use a smaller model or larger GPUs.")
        return
    table = _table("What would save memory, each by itself")
    table.add_column("change")
    table.add_column("saves", justify="right")
    table.add_column("then")
    for knob in plan.knobs:
        outcome = "fits" if knob.fits else "still does not fit"
        more = ", on more GPUs" if knob.more_gpus else ""
        table.add_row(knob.change, size(knob.saves), outcome + more)
    console.print(table)
