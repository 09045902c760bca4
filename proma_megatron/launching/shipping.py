"""What travels with a job: the code of this checkout, and its configuration as one file."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from proma_megatron.config.loading import dump_config
from proma_megatron.config.run import RunConfig
from proma_megatron.errors import ConfigError
from proma_megatron.launching.cluster import Cluster
from proma_megatron.launching.stages import CONFIG, Stage

CODE = PurePosixPath("/nemo_run/code")  # NeMo-Run's name for what it ships, also outside containers
_CONFIG_FILE = "proma_job.yaml"


# --------------------------------------------------------------------------- code


def checkout() -> Path:
    """Return the folder that holds `proma_megatron`."""
    return Path(__file__).resolve().parents[2]


def revision(cluster: Cluster) -> str | None:
    """Return the commit whose files a job gets; None: it gets none, they are in its image.

    With ``code: working_tree`` a commit of the files as they are, which no branch holds.

    Raises:
        ConfigError: this is no git checkout.
    """
    if cluster.code == "image":
        return None
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != checkout():
        raise ConfigError(
            f"code is {cluster.code}, but {checkout()} is no git checkout; install proma_megatron "
            "where jobs run and set code: image in the cluster file"
        )
    head = _git("rev-parse", "HEAD")
    if head is None:
        raise ConfigError(f"code is {cluster.code}, but {checkout()} has no commit yet; make one")
    return head if cluster.code == "committed" else _as_it_is(checkout(), head)


@functools.cache  # all jobs of an experiment get the same
def _as_it_is(folder: Path, head: str) -> str:
    """Commit the tracked files of this folder as they are now, outside of all branches."""
    made = _git("stash", "create")
    if made is None:
        raise ConfigError(
            f"code is working_tree, but git can't take {folder} as it is; finish the merge, or "
            "set code: committed"
        )
    return made or head


def take_working_tree_anew() -> None:
    """Forget the working tree's commit, for the next experiment of this process."""
    _as_it_is.cache_clear()


def left_behind(cluster: Cluster) -> str | None:
    """Warn of files whose present state a job will not see."""
    if cluster.code == "image":
        return None
    status = (_git("status", "--porcelain", "--untracked-files=normal") or "").splitlines()
    untracked = [line[3:] for line in status if line.startswith("??")]
    changed = [line[3:] for line in status if not line.startswith("??")]
    if cluster.code == "committed" and changed + untracked:
        return (
            f"jobs get the last commit, without changes to {_some(changed + untracked)}; commit "
            "them, or set code: working_tree in the cluster file"
        )
    if untracked:
        return (
            f"jobs don't get {_some(untracked)}, which git does not track; git add what they need"
        )
    return None


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _git(*arguments: str) -> str | None:
    """Return the output of a git command in the checkout; None if it fails or there is no git."""
    try:
        result = subprocess.run(
            ["git", "-C", str(checkout()), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return result.stdout.rstrip("\n") if result.returncode == 0 else None


# --------------------------------------------------------------------------- configuration


def arguments_of(stage: Stage, config: PurePath | None) -> tuple[str, ...]:
    """Return the arguments of `proma` in the job, which finds its configuration there."""
    return tuple(str(config) if word == CONFIG else word for word in stage.arguments)


def write_config(stage: Stage, folder: Path) -> Path | None:
    """Write the file that goes into the job's code folder, if the stage needs one."""
    if CONFIG not in stage.arguments:
        return None
    path = folder / stage.name / _CONFIG_FILE
    path.parent.mkdir(parents=True)
    path.write_text(dump_config(stage.config))
    return path


def for_cluster(config: RunConfig, cluster: Cluster) -> RunConfig:
    """Return the configuration as a job of this cluster reads it.

    Run directories go where the cluster file says, other relative paths become absolute, and the
    run stops by itself before the time limit.

    Raises:
        ConfigError: a path can't be the same there.
    """
    tree = config.model_dump()
    for keys, path in _paths(tree):
        if keys != ("root",):
            _set(tree, keys, file_for(".".join(keys), path, cluster))
    tree["root"] = _runs(config, cluster)
    if tree["trainer"]["max_minutes"] is None:
        tree["trainer"]["max_minutes"] = cluster.minutes - cluster.stop_minutes
    return RunConfig.model_validate(tree)


def file_for(name: str, path: Path, cluster: Cluster) -> Path:
    """Return a file or folder that a job reads, as it sees it.

    Args:
        name: of the option or key, for errors.

    Raises:
        ConfigError: the job would not find it.
    """
    container = cluster.container
    if path.is_absolute():
        if container is not None and not container.holds(PurePosixPath(path.as_posix())):
            raise ConfigError(
                f"{name} is {path}, which no mount of the container holds; add it to "
                "container.mounts of the cluster file, or give the path within the container"
            )
        return path
    if path.as_posix() in _shipped(cluster):
        return path  # relative to the code, where jobs are started
    if cluster.ssh is None and container is None and path.exists():
        return path.resolve()
    example = f"{name} /shared/{path.name}" if name[0] == "-" else f"{name}=/shared/{path.name}"
    raise ConfigError(
        f"{name} is {path}, which is relative and not in the code that is shipped; give the path "
        f"as the job sees it, for example {example}"
    )


def _runs(config: RunConfig, cluster: Cluster) -> Path:
    if config.root.is_absolute():
        root = PurePosixPath(config.root.as_posix())
        if cluster.container is not None and not cluster.container.holds(root, to_write=True):
            raise ConfigError(
                f"root is {root}, which no mount of the container holds, so that the run would be "
                "lost with it; leave root out, for the cluster file has runs"
            )
        return config.root
    if cluster.runs is not None:
        return Path(cluster.runs)
    if cluster.ssh is not None:
        return Path(cluster.ssh.job_dir) / config.root
    return Path.cwd() / config.root


def _shipped(cluster: Cluster) -> frozenset[str]:
    """Return files and folders of the code, relative to it."""
    commit = revision(cluster)
    return frozenset() if commit is None else _tracked(commit)


@functools.cache
def _tracked(commit: str) -> frozenset[str]:
    files = (_git("ls-tree", "-r", "--name-only", "-z", commit) or "").split("\0")
    every = {str(part) for file in files for part in (Path(file), *Path(file).parents)}
    return frozenset(every - {"."})


def _paths(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[Any, Path]]:
    """Yield keys and values of all paths of a configuration."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))
        elif isinstance(value, Path):
            yield (*above, key), value


def _set(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree[key]
    tree[keys[-1]] = value
