"""NeMo-Run experiments: the jobs of some stages, on a cluster or on this machine.

`build` makes one, for people who use NeMo-Run themselves; `dry_run` shows what would be submitted,
`submit` submits it.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import nemo_run as run
from nemo_run.config import RUNDIR_NAME, get_nemorun_home

from proma_megatron.config.constants import STOPPED_FILE
from proma_megatron.errors import ConfigError, LaunchError, UnreachableError
from proma_megatron.launching.cluster import Cluster
from proma_megatron.launching.connection import Connection, connect
from proma_megatron.launching.executors import local_executor, slurm_executor
from proma_megatron.launching.nodes import Nodes, nodes_for
from proma_megatron.launching.scripts import local_script, node_script
from proma_megatron.launching.shipping import (
    CODE,
    arguments_of,
    checkout,
    take_working_tree_anew,
    write_config,
)
from proma_megatron.launching.stages import Stage
from proma_megatron.launching.submitted import number_of


@dataclass(frozen=True)
class Script:
    """What a dry run shows of a stage."""

    stage: Stage
    command: str  # that submits it
    batch: str  # the batch script
    node: str  # what each node runs


@contextlib.contextmanager
def build(
    title: str,
    stages: Sequence[Stage],
    cluster: Cluster | None,
    *,
    id: str | None = None,  # noqa: A002 - NeMo-Run's name
    base_dir: Path | None = None,
) -> Iterator[Any]:
    """Build a `nemo_run.Experiment` with a job for each stage, in its context.

    Args:
        title: of the experiment.
        cluster: where jobs run; None: on this machine, one after another.
        id: what `status`, `logs` and `cancel` call it; None: the title and the time.
        base_dir: of NeMo-Run's records; None: ``$NEMORUN_HOME``.

    Raises:
        ConfigError: a layout doesn't fit the nodes, or there is no code to ship.
    """
    if id is not None and not id.startswith(f"{title}_"):
        raise ConfigError(f"id is {id}, expected '{title}_' and more, by which NeMo-Run finds it")
    take_working_tree_anew()
    if cluster is not None:
        _check_places(cluster)
    chosen = [nodes_of(stage, cluster) for stage in stages]
    with (
        tempfile.TemporaryDirectory(prefix="proma-launch-") as folder,
        contextlib.ExitStack() as on,
    ):
        if cluster is not None and cluster.code != "image":
            on.enter_context(contextlib.chdir(checkout()))  # of which NeMo-Run asks git
        experiment = run.Experiment(
            title,
            id=id or _new_id(title),
            base_dir=None if base_dir is None else str(base_dir),
            log_level="WARNING",
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,
            serialize_metadata_for_scripts=False,
        )
        on.enter_context(experiment)
        before: list[str] = []
        for stage, nodes in zip(stages, chosen, strict=True):
            config = write_config(stage, Path(folder))
            if cluster is None:
                script, executor = _local_job(stage, nodes, config)
                after = before[-1:]  # whatever it needs: one at a time
            else:
                script, executor = _slurm_job(stage, nodes, cluster, config)
                after = [stage.after] if stage.after else []
            experiment.add(
                run.Script(inline=script),
                executor=executor,
                name=stage.name,
                dependencies=after,
            )
            before.append(stage.name)
        yield experiment


def nodes_of(stage: Stage, cluster: Cluster | None) -> Nodes:
    """Return the nodes that a stage takes; this machine is one."""
    if cluster is not None:
        return nodes_for(stage.parallel, cluster)
    return Nodes(1, stage.parallel.world_size, 0)


def dry_run(
    title: str,
    stages: Sequence[Stage],
    cluster: Cluster,
    *,
    id: str | None = None,  # noqa: A002
) -> list[Script]:
    """Return what `submit` would hand to Slurm. Needs no cluster, and leaves nothing behind.

    Raises:
        ConfigError: see `build`.
    """
    with (
        tempfile.TemporaryDirectory(prefix="proma-dry-run-") as records,
        build(title, stages, cluster, id=id, base_dir=Path(records)) as experiment,
    ):
        experiment.dryrun(log=False, delete_exp_dir=False)
        made = []
        for stage, job in zip(stages, experiment.jobs, strict=True):
            folder = Path(job.executor.experiment_dir)
            name = f"{job.executor.job_name}_sbatch.sh"
            command = ["sbatch", "--requeue", "--parsable"]
            if stage.after:
                command.append(f"--dependency=afterok:<id of {stage.after}>")
            made.append(
                Script(
                    stage=stage,
                    command=" ".join([*command, f"{job.executor.tunnel.job_dir}/{name}"]),
                    batch=(folder / name).read_text(),
                    node=(Path(job.executor.job_dir) / "scripts" / f"{job.id}.sh").read_text(),
                )
            )
    return made


def submit(
    title: str,
    stages: Sequence[Stage],
    cluster: Cluster,
    *,
    id: str | None = None,  # noqa: A002
) -> str:
    """Submit a job for each stage, or none.

    Returns:
        The experiment's id.

    Raises:
        ConfigError: see `build`; or the cluster lacks what the file says.
        UnreachableError: it can't be reached.
        LaunchError: it refused a job.
    """
    with build(title, stages, cluster, id=id) as experiment:
        # Before anything is written: most mistakes show here.
        with connect(experiment.jobs[0].executor.tunnel) as connection:
            check_site(connection, cluster)
        try:
            with _quiet():
                experiment.run(detach=True)
            wrong = [job.handle for job in experiment.jobs if not number_of(job.handle).isdigit()]
            if wrong:
                raise LaunchError(f"sbatch answered {wrong}, expected numbers of jobs")
        except BaseException as error:
            left = _take_back(experiment)
            if left:
                experiment._save_jobs()  # for `proma launch cancel`
            elif not isinstance(error, Exception):  # Ctrl-C
                raise
            what = (
                f"jobs {', '.join(left)} of {experiment._id} are still there"
                if left
                else "nothing was submitted"
            )
            raise LaunchError(f"{what}, for {_place(cluster)} says: {_reason(error)}") from error
        return experiment._id


def _check_places(cluster: Cluster) -> None:
    """Check that NeMo-Run can work with these folders, whose names it doesn't quote.

    Without a container it replaces "/nemo_run", where containers find what is shipped.
    """
    places = {"NEMORUN_HOME": get_nemorun_home(), "the temporary folder": tempfile.gettempdir()}
    if cluster.code != "image":
        places["the checkout"] = str(checkout())
    for name, place in places.items():
        if not re.fullmatch(r"[A-Za-z0-9_./@+=-]*", place):
            raise ConfigError(
                f"{name} is {place}, expected a path of letters, digits and _ . / @ + = -, for "
                "NeMo-Run does not quote it; move it"
            )
    if cluster.container is not None:
        return
    texts = {"NEMORUN_HOME": get_nemorun_home(), "runs": cluster.runs or ""}
    if cluster.ssh is not None:
        texts = {"ssh.job_dir": cluster.ssh.job_dir, "runs": cluster.runs or ""}
    texts["setup"] = " ".join(cluster.setup)
    texts["environment"] = " ".join(cluster.environment.values())
    for name, text in texts.items():
        if f"/{RUNDIR_NAME}" in text:
            raise ConfigError(
                f"{name} contains /{RUNDIR_NAME}, which NeMo-Run replaces by the folder of a job; "
                "use another name"
            )


def check_site(connection: Connection, cluster: Cluster) -> None:
    """Check that jobs can be submitted there, with their secrets.

    Raises:
        ConfigError: not so.
        UnreachableError, LaunchError: it does not answer.
    """
    tests = ["command -v sbatch >/dev/null || echo lacks:sbatch"]
    tests += [f'[ -n "${{{name}:-}}" ] || echo lacks:{name}' for name in cluster.secrets]
    # Some sites set these; nobody expects them in a shell that has another job in mind.
    outrank = "env | sed -n 's/^\\(SBATCH_[A-Z_]*\\)=.*/outranks:\\1/p'"
    answer = connection.run("; ".join([*tests, outrank, "echo asked"])).split()
    if "asked" not in answer:
        raise LaunchError(f"{_place(cluster)} does not answer in bash; nothing was submitted")
    # A login shell may print words of its own.
    missing = [word.partition(":")[2] for word in answer if word.startswith("lacks:")]
    set_there = [word.partition(":")[2] for word in answer if word.startswith("outranks:")]
    if set_there:
        raise ConfigError(
            f"{_place(cluster)} has {', '.join(set_there)} in its environment, which sbatch "
            "prefers to what the cluster file says; unset it there"
        )
    if "sbatch" in missing:
        fix = "" if cluster.ssh else ", or add an ssh section to the cluster file"
        raise ConfigError(
            f"there is no sbatch on {_place(cluster)}; run this on a login node of the cluster{fix}"
        )
    if missing:
        where = (
            f"in what ~/.bashrc exports on {cluster.ssh.host}" if cluster.ssh else "in this shell"
        )
        raise ConfigError(
            f"secrets lists {', '.join(missing)}, which {_place(cluster)} does not have in its "
            f"environment; set it {where}, or take it off the list"
        )


def _slurm_job(
    stage: Stage, nodes: Nodes, cluster: Cluster, config: Path | None
) -> tuple[str, Any]:
    executor = slurm_executor(cluster, nodes, resumes=stage.trains, config=config)
    executor.job_name_prefix = f"{stage.config.name}."
    arguments = arguments_of(stage, None if config is None else CODE / config.name)
    script = node_script(arguments, nodes, stopped=_stopped(stage))
    return script, executor


def _local_job(stage: Stage, nodes: Nodes, config: Path | None) -> tuple[str, Any]:
    script = local_script(
        arguments_of(stage, config),
        nodes,
        stopped=_stopped(stage),
        after=stage.after,
    )
    return script, local_executor()


def _stopped(stage: Stage) -> PurePosixPath | None:
    """Return the file that a training leaves that was stopped, and can go on."""
    return stage.run_dir / "logs" / STOPPED_FILE if stage.trains else None


def _new_id(title: str) -> str:
    """Return the title and the time in seconds, or a later one if there is such an experiment."""
    taken = Path(get_nemorun_home()) / "experiments" / title
    moment = time.time()
    while True:
        id = f"{title}_{time.strftime('%Y%m%d-%H%M%S', time.localtime(moment))}"  # noqa: A001
        if not (taken / id).exists():
            return id
        moment += 1


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the lines that NeMo-Run logs of its own doing; errors come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _take_back(experiment: Any) -> list[str]:
    """Cancel what was submitted before a job was refused; return the numbers of jobs that are left.

    Without any, the record of the experiment is removed. NeMo-Run itself cancels nothing that the
    accounting database does not know yet.
    """
    numbers = [number_of(job.handle) for job in experiment.jobs if job.handle]
    if numbers:
        try:
            with connect(experiment.jobs[0].executor.tunnel) as connection:
                refused = connection.run(f"scancel {' '.join(numbers)} 2>&1 || echo refused")
        except UnreachableError:
            return numbers
        if refused.strip():
            return numbers
    shutil.rmtree(experiment._exp_dir, ignore_errors=True)
    return []


def _place(cluster: Cluster) -> str:
    return cluster.ssh.host if cluster.ssh else "this machine"


def _reason(error: BaseException) -> str:
    """Return what Slurm said, of what NeMo-Run makes of it."""
    result = getattr(error, "result", None)
    said = (getattr(result, "stderr", "") or str(error)).strip()
    lines = [line for line in said.splitlines() if line.strip()]
    return "; ".join(lines) or type(error).__name__
