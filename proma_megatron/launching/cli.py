"""``proma launch``: a training on a cluster, or on this machine, as a NeMo-Run experiment."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proma_megatron.errors import ConfigError

if TYPE_CHECKING:
    from proma_megatron.config.run import RunConfig
    from proma_megatron.launching.cluster import Cluster
    from proma_megatron.launching.connection import Connection
    from proma_megatron.launching.experiments import Script
    from proma_megatron.launching.stages import Stage
    from proma_megatron.launching.submitted import Submitted, SubmittedJob
    from proma_megatron.planning.plan import Plan

logger = logging.getLogger(__name__)

app = typer.Typer(
    help="Train on a Slurm cluster through NeMo-Run, and look after what was submitted.",
    no_args_is_help=True,
)

_Config = Annotated[Path, typer.Argument(help="YAML file of the run.")]
_Overrides = Annotated[list[str] | None, typer.Argument(help="Changes such as trainer.steps=10.")]
_Sweep = Annotated[
    list[str] | None,
    typer.Option(help="key=value,value: a training for each; several: for each combination."),
]
_Eval = Annotated[
    str | None, typer.Option("--eval", help="File of problems to measure the trained policy on.")
]
_Samples = Annotated[int | None, typer.Option(min=1, help="Completions of a problem.")]
_Export = Annotated[
    bool, typer.Option("--export", help="Then write it as a Hugging Face directory, RUN/export.")
]
_Id = Annotated[
    str | None,
    typer.Argument(metavar="[ID]", help="Of the experiment, or its name; default: the newest."),
]
_Job = Annotated[str | None, typer.Option(help="Only this job, such as train.")]


@app.command()
def slurm(
    config: _Config,
    cluster: Annotated[Path, typer.Option(help="YAML file of the cluster.")],
    overrides: _Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be submitted; needs no cluster.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Come back at once instead of following the jobs.")
    ] = False,
    sweep: _Sweep = None,
    evaluate: _Eval = None,
    samples: _Samples = None,
    export: _Export = False,
) -> None:
    """Submit a training to Slurm and follow it to its end.

    Exit codes: 0 every job COMPLETED; 1 not so; 2 configuration or cluster file don't fit, and
    nothing was submitted. Ctrl-C leaves the jobs alone.
    """
    _check_nemo_run()
    from proma_megatron.launching.cluster import load_cluster
    from proma_megatron.launching.shipping import file_for, for_cluster, left_behind

    site = load_cluster(cluster)
    if evaluate is not None:
        evaluate = str(file_for("--eval", Path(evaluate), site))
    title, made = _configs(config, overrides or [], sweep or [])
    configs = [for_cluster(config, site) for config in made]
    stages = _stages(configs, evaluate, samples, export)
    notes = [left_behind(site), *_notes(stages, site)]
    for note in dict.fromkeys(note for note in notes if note):
        logger.warning("warning: %s", note)
    from proma_megatron.launching.experiments import dry_run as show
    from proma_megatron.launching.experiments import submit  # which imports NeMo-Run: seconds

    if dry_run:
        _show_dry_run(show(title, stages, site), site)
        return
    for name, plan in _plans(stages, site).items():
        if not plan.fits:
            logger.warning(
                f"warning: {name} needs {plan.needed / 2**30:.1f} GiB of a GPU by `proma plan`, "
                f"which may use {site.gpu_memory:g}; --dry-run says what would save some"
            )
    _say(_asked_for(stages, site))
    id = submit(title, stages, site)  # noqa: A001
    _say(f"submitted {id}; `proma launch status|logs|cancel {id}` look after it")
    if not detach:
        _follow(id)


@app.command()
def local(
    config: _Config,
    overrides: _Overrides = None,
    sweep: _Sweep = None,
    evaluate: _Eval = None,
    samples: _Samples = None,
    export: _Export = False,
) -> None:
    """Run the same stages on this machine, one after another, with torchrun.

    A run that was stopped goes on when this is started again. Exit codes: 0 every stage succeeded;
    1 not so; 2 the configuration doesn't fit.
    """
    _check_nemo_run()
    title, configs = _configs(config, overrides or [], sweep or [])
    stages = _stages(configs, evaluate, samples, export)
    from proma_megatron.launching.local import run_here  # which imports NeMo-Run: seconds

    states = run_here(title, stages)
    for name, state in states.items():
        _say(f"{name}: {state}")
    if set(states.values()) != {"SUCCEEDED"}:
        sys.exit(1)


@app.command()
def status(id: _Id = None) -> None:  # noqa: A002
    """Show how the jobs of an experiment are doing. Exits with 1 if one of them has failed."""
    from rich.console import Console
    from rich.table import Table

    from proma_megatron.launching.states import ask

    found, jobs = _find(id, None)
    with _connected(jobs) as connection:
        states = ask(connection, jobs)
    table = Table("job", "id", "state", title=found.id)
    for job, state in zip(jobs, states, strict=True):
        table.add_row(job.name, job.id, str(state))
    Console().print(table)
    if any(state.over and not state.succeeded for state in states):
        sys.exit(1)


@app.command()
def logs(
    id: _Id = None,  # noqa: A002
    job: _Job = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the jobs are over.")
    ] = False,
    batch: Annotated[
        bool, typer.Option("--batch", help="Also what the batch script printed itself.")
    ] = False,
) -> None:
    """Print what the jobs of an experiment have printed, in every attempt."""
    from proma_megatron.launching.logs import show

    found, jobs = _find(id, job)
    if follow:
        _follow(found.id, job)
        return
    with _connected(jobs) as connection:
        for line in show(connection, jobs, batch=batch):
            print(line)


@app.command()
def cancel(id: Annotated[str, typer.Argument(metavar="ID")], job: _Job = None) -> None:  # noqa: A002
    """Cancel the jobs of an experiment; ranks have Slurm's KillWait seconds to save."""
    from proma_megatron.launching.states import ask

    _, jobs = _find(id, job)
    with _connected(jobs) as connection:
        numbers = [one.id for one in jobs if one.id and one.tunnel is not None]
        if not numbers:
            raise ConfigError(
                "no job of this experiment is Slurm's; Ctrl-C ends one that runs here"
            )
        refused = connection.run(f"scancel {' '.join(numbers)} 2>&1").strip()
        for one, state in zip(jobs, ask(connection, jobs), strict=True):
            _say(f"{one.name}, job {one.id}: {state}")
    if refused:
        logger.error("%s", refused)
        sys.exit(1)


# --------------------------------------------------------------------------- what is to run


def _check_nemo_run() -> None:
    if find_spec("nemo_run") is None:
        raise ConfigError(
            "nemo-run is not installed, which proma launch works through; install "
            "proma-megatron[launch], or in a checkout run `uv sync --extra launch`"
        )


def _configs(
    path: Path, overrides: Sequence[str], axes: Sequence[str]
) -> tuple[str, list[RunConfig]]:
    """Return a title, and a configuration with its own name for each combination of a sweep."""
    from proma_megatron.config.loading import load_config
    from proma_megatron.launching.stages import sweep

    base = load_config(path, overrides)
    if not axes:
        return base.name, [base]
    return base.name, [
        load_config(path, [*overrides, *chosen, f"name={base.name}-{suffix}"])
        for suffix, chosen in sweep(axes)
    ]


def _stages(
    configs: Sequence[RunConfig], evaluate: str | None, samples: int | None, export: bool
) -> list[Stage]:
    from proma_megatron.launching.stages import stages_of

    if samples is not None and evaluate is None:
        raise ConfigError(f"--samples is {samples}, but there is no --eval; add a file of problems")
    return stages_of(
        configs, evaluate=evaluate, samples=samples, export="export" if export else None
    )


def _notes(stages: Sequence[Stage], site: Cluster) -> list[str | None]:
    from proma_megatron.launching.nodes import nodes_for, note_on_tensor_parallel

    notes = [
        note_on_tensor_parallel(stage.parallel, nodes_for(stage.parallel, site)) for stage in stages
    ]
    if any(stage.trains and not stage.config.trainer.save_every for stage in stages):
        notes.append(
            "trainer.save_every is 0, so an attempt that is killed loses all its steps; a number "
            "of steps saves that often"
        )
    return notes


def _asked_for(stages: Sequence[Stage], site: Cluster) -> str:
    """Say what the jobs take of the cluster, in a line for each."""
    from proma_megatron.launching.nodes import nodes_for

    where = f", partition {site.partition}" if site.partition else ""
    lines = []
    for stage in stages:
        nodes = nodes_for(stage.parallel, site)
        hours = nodes.count * nodes.gpus * site.minutes / 60
        cost = f", up to {hours:,.0f} GPU hours an attempt" if hours else ""
        after = f", after {stage.after}" if stage.after else ""
        lines.append(
            f"{stage.name}: {nodes} for {site.time}{cost}; account {site.account}{where}{after}"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------- what is shown


def _say(text: str) -> None:
    logger.info("%s", text)


def _show_dry_run(scripts: Sequence[Script], site: Cluster) -> None:
    """Print each batch script with what its nodes run, then plans and what is asked for."""
    for script in scripts:
        print(f"==> {script.stage.name}: {script.command}\n{script.batch}")
        print(
            f"==> {script.stage.name}, on each node: scripts/{script.stage.name}.sh\n{script.node}"
        )
    stages = [script.stage for script in scripts]
    _show_plans(stages, site)
    print(_asked_for(stages, site))
    print("Nothing was submitted.")


def _show_plans(stages: Sequence[Stage], site: Cluster) -> None:
    """Print what the trainings need; of those of a sweep that need the same, the first."""
    from rich.console import Console

    from proma_megatron.planning.printing import print_plan

    shown = []
    for name, plan in _plans(stages, site).items():
        if plan.as_dict() not in shown:
            shown.append(plan.as_dict())
            print(f"==> {name}: proma plan")
            print_plan(plan, Console())


def _plans(stages: Sequence[Stage], site: Cluster) -> dict[str, Plan]:
    """Plan the trainings, by the name of the run, for clusters with GPUs."""
    if not site.gpus_per_node:
        return {}
    from proma_megatron.data.loading import vocabulary
    from proma_megatron.planning.plan import make_plan

    configs = [stage.config for stage in stages if stage.trains]
    memory = int(site.gpu_memory * 2**30)
    return {
        config.name: make_plan(
            config, vocabulary(config), gpu_memory=memory, gpus_per_node=site.gpus_per_node
        )
        for config in configs
    }


# --------------------------------------------------------------------------- what was submitted


def _find(id: str | None, job: str | None) -> tuple[Submitted, list[SubmittedJob]]:  # noqa: A002
    _check_nemo_run()
    from proma_megatron.launching.submitted import find

    found = find(id)
    jobs = [one for one in found.jobs if job in (None, one.name)]
    if not jobs:
        names = ", ".join(one.name for one in found.jobs)
        raise ConfigError(f"--job is {job}, expected one of {names}")
    return found, jobs


def _connected(jobs: Sequence[SubmittedJob]) -> AbstractContextManager[Connection]:
    from proma_megatron.launching.connection import connect

    return connect(jobs[0].tunnel)


def _follow(id: str, job: str | None = None) -> None:  # noqa: A002
    """Follow to the end of the jobs, or to Ctrl-C; exit with 1 unless all succeeded."""
    from proma_megatron.launching.connection import Here
    from proma_megatron.launching.logs import follow

    found, jobs = _find(id, job)
    try:
        with _connected(jobs) as connection:
            seconds = 1.0 if isinstance(connection, Here) else 10.0
            states = follow(connection, jobs, seconds=seconds, say=_say)
    except KeyboardInterrupt:
        _say(f"the jobs go on; `proma launch logs --follow {found.id}` comes back to them")
        sys.exit(130)
    if not all(state.succeeded for state in states):
        sys.exit(1)
