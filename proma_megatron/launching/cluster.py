"""A cluster file: what one cluster wants to hear from every job, whatever the run.

Partition and account, GPUs per node, container or modules, where to log in. `load_cluster` reads
one from YAML; every fault is a `ConfigError` of one sentence. Examples are in ``clusters/``.
"""

from __future__ import annotations

import posixpath
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from proma_megatron.config.fields import NonNegativeInt, PositiveFloat, PositiveInt, Section
from proma_megatron.config.loading import read_tree, validate_section
from proma_megatron.config.shipped import find_cluster
from proma_megatron.errors import ConfigError

_WORD = re.compile(r"[A-Za-z0-9_.,:=@%+/#-]+")
_PLACE = re.compile(r"/[A-Za-z0-9_./@+=-]*")  # no comma, colon or %, which srun takes apart
_NODES = re.compile(r"[A-Za-z0-9_.,:=@%+/#&|*()\[\]-]+")  # "h100&nvlink", "node[1-3,7]"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(.*_)?(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY|APIKEY)", re.IGNORECASE)
_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<dh>\d{1,2})(?::(?P<dm>\d{1,2}))?(?::(?P<ds>\d{1,2}))?"
    r"|(?P<h>\d+):(?P<m>\d{1,2}):(?P<s>\d{1,2})|(?P<minutes>\d+)(?::(?P<seconds>\d{1,2}))?)",
    re.ASCII,
)
# What follows from the layout, or what ends and requeues of jobs depend on.
_OURS = {
    "nodes",
    "ntasks",
    "ntasks_per_gpu",
    "ntasks_per_node",
    "gpus",
    "gpus_per_node",
    "gpus_per_task",
    "cpus_per_gpu",
    "cpus_per_task",
    "output",
    "error",
    "open_mode",
    "job_name",
    "dependency",
    "signal",
    "requeue",
    "no_requeue",
    "kill_on_invalid_dep",
    "array",
    "wrap",
    "parsable",
    "test_only",
    "chdir",
    "clusters",
    "distribution",
    "export",
    "export_file",
    "hold",
    "input",
    "no_kill",
    "time_min",
    "uid",
    "wait",
}
_OURS_OF_SRUN = (
    *("--output", "--error", "--export", "--kill-on-bad-exit", "--chdir", "--wait", "--label"),
    *("--nodes", "--nodelist", "--ntasks", "--gpus", "--relative", "--distribution"),
    "--container-",
)


def _word(value: str) -> str:
    if not _WORD.fullmatch(value):
        raise ValueError("it should have no spaces and no characters that a shell interprets")
    return value


def _nodes(value: str) -> str:
    if not _NODES.fullmatch(value):
        raise ValueError("it should be features or nodes as sbatch takes them, without spaces")
    return value


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("it should consist of letters, digits and . _ -")
    return value


def _path(value: str) -> str:
    if not _PLACE.fullmatch(value) or ".." in value.split("/"):
        raise ValueError(
            "it should be an absolute path on the cluster, of letters, digits and _ . / @ + = -, "
            "without .."
        )
    return str(PurePosixPath(value))


def _line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("it should be one line of printable characters")
    return value


def _text(value: Any) -> Any:
    """Return a value as a shell would have it: YAML reads true and 1 as what they look like."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, int | float | str):
        raise ValueError("it should be a text or a number")
    return str(value)


def _parameter(value: Any) -> Any:
    """Return a flag as it is, for it is there or not, and everything else as text."""
    return value if isinstance(value, bool) else _line(_text(value))


def _variable(value: str) -> str:
    if not _VARIABLE.fullmatch(value):
        raise ValueError("it should be the name of an environment variable, such as HF_TOKEN")
    return value


Word = Annotated[str, AfterValidator(_word)]
Feature = Annotated[str, AfterValidator(_nodes)]
Name = Annotated[str, AfterValidator(_name)]
RemotePath = Annotated[str, AfterValidator(_path)]
Line = Annotated[str, AfterValidator(_line)]
Variable = Annotated[str, AfterValidator(_variable)]
Parameter = Annotated[Any, AfterValidator(_parameter)]
Text = Annotated[str, BeforeValidator(_text), AfterValidator(_line)]


class SshConfig(Section):
    """Where jobs are submitted, if not on this machine."""

    host: Name
    user: Word
    port: PositiveInt | None = None  # null: 22, or what ~/.ssh/config says
    identity: Annotated[Path, AfterValidator(Path.expanduser)] | None = None  # private key
    job_dir: RemotePath  # code, scripts and logs of jobs; every node must see it
    before: Line | None = None  # a command before all others, such as "source /etc/profile"


class ContainerConfig(Section):
    """An image that Pyxis starts on every node; it holds what the code imports."""

    image: Word  # a registry's name#image:tag, or the path of a .sqsh file
    mounts: tuple[Word, ...] = ()  # "/on/the/node:/in/the/container[:flags]"

    @field_validator("mounts")
    @classmethod
    def _two_paths(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        for mount in mounts:
            if not re.fullmatch(r"/[^:,]*:/[^:,]*(:[^:,]+)?", mount):
                raise ValueError(
                    f"'{mount}' should be two absolute paths with a colon between them, such as "
                    "/lustre/data:/data"
                )
        return mounts

    def holds(self, path: PurePosixPath, *, to_write: bool = False) -> bool:
        """Tell whether a mount brings this path of the job in."""
        plain = PurePosixPath(posixpath.normpath(path))
        holding = []
        for mount in self.mounts:
            _, inside, *flags = mount.split(":")
            if plain.is_relative_to(inside):
                read_only = "ro" in (flags[0].split("+") if flags else [])
                holding.append((len(PurePosixPath(inside).parts), not (to_write and read_only)))
        return bool(holding) and max(holding)[1]  # the innermost decides


class Cluster(Section):
    """All keys of a cluster file."""

    account: Word
    partition: Word | None = None
    qos: Word | None = None
    reservation: Word | None = None
    constraint: Feature | None = None
    exclude: Feature | None = None  # nodes that jobs must not get
    exclusive: bool = False
    time: str  # of one attempt, as Slurm writes it: "04:00:00", "1-12:00:00"; in quotes
    cpus_per_node: PositiveInt | None = None
    mem: Annotated[Word, BeforeValidator(_text)] | None = None  # of a node; 0: all of it

    gpus_per_node: NonNegativeInt  # 0: ranks run on CPUs
    ranks_per_node: PositiveInt | None = None  # null: one for each GPU
    # How GPUs are asked for; none: the partition gives whole nodes and knows no GPUs.
    gpu_request: Literal["gpus_per_node", "gres", "none"] = "gpus_per_node"
    gpu_memory: PositiveFloat = 76.0  # GiB of one GPU that `proma plan` may count on
    srun: tuple[Word, ...] = ()  # further arguments, such as --mpi=pmix
    sbatch: dict[str, Parameter] = Field(default={})  # further parameters: mail_type: FAIL

    # A run has saved and stopped so long before the time limit, and is queued again.
    stop_minutes: PositiveInt = 5
    max_requeues: NonNegativeInt = 20  # of a run that stopped; then it is to be submitted again
    requeue_failures: NonNegativeInt = 0  # of one that failed, which it may do again

    ssh: SshConfig | None = None  # null: sbatch is on this machine
    # Run directories, as the job sees them; null: `root` of the configuration, under ssh.job_dir or
    # on this machine.
    runs: RemotePath | None = None
    code: Literal["committed", "working_tree", "image"] = "committed"
    container: ContainerConfig | None = None  # null: on the node itself, after `setup`
    setup: tuple[Line, ...] = ()  # shell lines before the job: module load, activate
    environment: dict[Variable, Text] = Field(default={})  # on top of `environment.DEFAULTS`
    secrets: tuple[Variable, ...] = ()  # names; values stay in the environment of sbatch

    @field_validator("time", mode="before")
    @classmethod
    def _in_quotes(cls, value: Any) -> Any:
        if isinstance(value, int):  # 60 * (60 * hours + minutes) + seconds, which nobody meant
            raise ValueError(
                'it should be text such as "04:00:00", in quotes, without which YAML reads a number'
            )
        return value

    @field_validator("time")
    @classmethod
    def _is_time(cls, value: str) -> str:
        if not _TIME.fullmatch(value) or not _minutes(value):
            raise ValueError('it should be a time limit such as "04:00:00" or "1-12:00:00"')
        return value

    @field_validator("sbatch")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        named = {key.replace("-", "_"): entry for key, entry in value.items()}
        for key in named:
            if not re.fullmatch(r"[a-z][a-z0-9_]+", key):
                raise ValueError(f"'{key}' should be a parameter of sbatch, such as mail_type")
            if key in cls.model_fields:
                raise ValueError(f"'{key}' is a key of the cluster file itself; give it there")
            if key in _OURS:
                raise ValueError(f"'{key}' is set by proma itself; leave it out")
        return named

    @field_validator("setup")
    @classmethod
    def _whole_commands(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for line in value:
            if subprocess.run(["bash", "-n", "-c", line], capture_output=True).returncode:
                raise ValueError(f"'{line}' should be a whole command of the shell, on its line")
        return value

    @field_validator("srun")
    @classmethod
    def _not_ours_either(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for argument in value:
            if argument.startswith(_OURS_OF_SRUN) or not argument.startswith("--"):
                raise ValueError(
                    f"'{argument}' is set by proma itself, or no option in full; leave it out"
                )
        return value

    @field_validator("environment")
    @classmethod
    def _in_full(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if "$" in text or text.startswith("~"):
                raise ValueError(
                    f"{name} is '{text}', which no shell would expand; give it in full, or export "
                    "it in setup"
                )
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Cluster:
        for problem in _problems(self):
            raise ValueError(problem)
        return self

    @property
    def minutes(self) -> float:
        """The time limit of one attempt."""
        return _minutes(self.time)

    @property
    def ranks(self) -> int:
        """Ranks of a node that is used in full."""
        return self.ranks_per_node or self.gpus_per_node


def _minutes(time: str) -> float:
    found = _TIME.fullmatch(time)
    assert found
    part = {key: int(value or 0) for key, value in found.groupdict().items()}
    hours = 24 * part["days"] + part["dh"] + part["h"]
    minutes = part["dm"] + part["m"] + part["minutes"]
    return 60 * hours + minutes + (part["ds"] + part["s"] + part["seconds"]) / 60


def _problems(cluster: Cluster) -> Iterator[str]:
    if not cluster.ranks:
        yield (
            "gpus_per_node is 0, so ranks run on CPUs, but ranks_per_node does not say how many; "
            "add it"
        )
    if cluster.gpus_per_node and cluster.ranks > cluster.gpus_per_node:
        yield (
            f"ranks_per_node is {cluster.ranks}, expected at most gpus_per_node="
            f"{cluster.gpus_per_node}, for NCCL gives each rank a GPU of its own"
        )
    if cluster.minutes <= cluster.stop_minutes:
        yield (
            f"time is {cluster.time}, expected more than stop_minutes={cluster.stop_minutes}, "
            "which a run is given to save before the limit"
        )
    before = cluster.ssh.before if cluster.ssh else None
    for line in (*cluster.setup, *cluster.srun, *map(str, cluster.sbatch.values()), before or ""):
        for name, text in re.findall(r"\b(?=([A-Z0-9_]+)=(\S+))", line):
            if _SECRET.fullmatch(name) and text.lstrip("\"'")[0:1] not in ("$", "`", ""):
                yield (
                    f"a line sets {name}, a secret, whose value must not be in a file; list its "
                    "name under secrets, and set it where sbatch runs"
                )
    for name in cluster.environment:
        if name in cluster.secrets or _SECRET.fullmatch(name):
            yield (
                f"environment.{name} looks like a secret, whose value must not be in a file; list "
                f"its name under secrets, and set it where sbatch runs"
            )
        if name.startswith(("MASTER_", "SLURM_", "SBATCH_", "TORCHX_", "PROMA_")):
            yield f"environment.{name} follows from the job itself; leave it out"
    if "gres" in cluster.sbatch and cluster.gpus_per_node and cluster.gpu_request != "none":
        yield (
            f"sbatch.gres is {cluster.sbatch['gres']} beside gpus_per_node="
            f"{cluster.gpus_per_node}, which asks for GPUs itself; leave it out, or set "
            "gpu_request: none"
        )
    if cluster.container is not None and cluster.runs is None:
        yield (
            "runs is missing, without which run directories would be lost with the container; add "
            "it, with a mount that holds it"
        )
    elif cluster.container is not None and cluster.runs is not None:
        runs = PurePosixPath(cluster.runs)
        if not cluster.container.holds(runs, to_write=True):
            yield (
                f"runs is {runs}, which no mount of the container holds for writing, so that "
                f"checkpoints would be lost with it; add a mount such as {runs}:{runs}"
            )


def load_cluster(path: Path) -> Cluster:
    """Read a cluster file; its key ``base`` may name another one that it builds on.

    Raises:
        ConfigError: it is missing or no mapping, or a value does not fit.
    """
    path = find_cluster(path)
    try:
        return validate_section(read_tree(path), Cluster)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if str(path) in text else f"{path}: {text}") from None
