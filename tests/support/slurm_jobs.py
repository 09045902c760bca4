"""The `proma launch` command as a user starts it, with a real Slurm behind it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from proma_megatron.runs.directory import RunDir
from support.command import ROOT
from support.slurm import SEARCH, SlurmCluster, until
from support.slurm_rewards import FOLDER

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SHORT = (
    "device=cpu",
    "warm_start.steps=4",
    "trainer.steps=4",
    "trainer.save_every=1",
    "data.validation_problems=8",
    "rollout.prompts_per_step=4",
    "reward.function=support.slurm_rewards:varied",
    "reward.workers=1",
    "reward.timeout_seconds=300",  # tests let rewards wait
)
ALONE = (*SHORT, "parallel.tensor=1", "model.layers=2")
# Slurm runs two of these at a time, and beside them two of one CPU: tests may let any of them wait.
CPUS = 3
BYTECODE = ("PYTHONPYCACHEPREFIX",)  # see `quick`
PROMA = (sys.executable, "-m", "proma_megatron.cli", "launch")


@dataclass(frozen=True)
class Launched:
    """A `proma launch` that was started, and what it has launched."""

    name: str  # of the run
    process: subprocess.Popen[bytes]
    folder: Path  # of what it prints, and of what tests tell the job
    run_dir: RunDir
    cluster: SlurmCluster

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def end(self, seconds: float = 120) -> int:
        """The command's exit code, once it has ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"no end after {seconds} s:\n{printed(self)}") from None

    def submitted(self, seconds: float = 60) -> str:
        """The experiment's id, as soon as the jobs are with Slurm."""
        until(lambda: "submitted " in self.stderr or self.process.poll() is not None, seconds)
        assert "submitted " in self.stderr, self.stdout + self.stderr
        return self.stderr.partition("submitted ")[2].partition(";")[0]

    def job(self, stage: str = "train") -> str:
        """Slurm's number of a job."""
        self.submitted()
        (number,) = jobs_named(self.cluster, f".{self.name}.", stage)
        return number

    def hold(self, step: int) -> None:
        """Let rewards wait after this RL step, and no longer after another one."""
        new = self.folder / "closed.new"
        new.write_text(str(step))
        new.rename(self.folder / "closed")

    def release(self) -> None:
        (self.folder / "closed").unlink()

    def held(self, step: int, seconds: float = 120) -> str:
        """The number of the training, as soon as its rewards wait after this step."""
        job = self.job()
        if not until((self.folder / f"reached_{step}").exists, seconds):
            raise TimeoutError(f"rewards don't wait after {seconds} s:\n{printed(self)}")
        return job


def jobs_named(cluster: SlurmCluster, *parts: str) -> list[str]:
    """Numbers of all jobs, also of those that have ended, whose names hold all of these."""
    lines = cluster.run("squeue", "-h", "-t", "all", "-o", "%i %j").stdout.splitlines()
    found = [line.split(maxsplit=1) for line in lines]
    return [number for number, name in found if all(part in f".{name}." for part in parts)]


def printed(launched: Launched) -> str:
    """Everything that a command and its jobs have printed, for whoever looks for a fault."""
    home = launched.folder.parent / "home" / "experiments" / launched.name
    files = [launched.folder / "stdout", launched.folder / "stderr", *home.glob("*/*/*.out")]
    return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files)


class Launches:
    """Commands of one session; those that haven't ended with it are killed.

    Args:
        folder: of their records, runs and cluster files.
    """

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.runs = folder / "runs"
        self._started: list[Launched] = []

    def site(self, name: str, more_setup: Sequence[str] = (), **keys: Any) -> Path:
        """A cluster file: one rank a node, on CPUs, by this interpreter and its packages."""
        own = {
            "account": "ci",
            "time": "00:30:00",
            "gpus_per_node": 0,
            "ranks_per_node": 1,
            "cpus_per_node": CPUS,
            "runs": str(self.runs),
            "code": "image",
            "setup": [f"export PATH={Path(sys.executable).parent}:$PATH", *more_setup],
            "environment": {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**own, **keys}))
        return path

    def start(
        self,
        name: str,
        *arguments: str | Path,
        hold_after: int | None = None,
        before: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Launched:
        """Start `proma launch` with a run of this name.

        Args:
            hold_after: RL step after which `slurm_rewards.varied` waits.
            before: what to put before the command.
            environment: of the command, on top of this process's own.
        """
        folder = self.folder / name
        folder.mkdir()
        run_dir = RunDir(self.runs / name)
        (folder / "metrics").write_text(str(run_dir.metrics))
        if hold_after is not None:
            (folder / "closed").write_text(str(hold_after))
        with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                [*before, *PROMA, *map(str, arguments), f"name={name}"],
                cwd=folder,
                env={**os.environ, **self.environment_of(folder), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        launched = Launched(name, process, folder, run_dir, self.cluster)
        self._started.append(launched)
        return launched

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`proma launch status|logs|cancel` to its end."""
        return subprocess.run(
            [*PROMA, *arguments],
            cwd=self.folder,
            env={**os.environ, **self.environment_of(self.folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    def environment_of(self, folder: Path) -> dict[str, str]:
        """What a command needs to know; its jobs do, too."""
        shared = {name: os.environ[name] for name in BYTECODE if name in os.environ}
        return {
            **self.cluster.environment,
            **shared,
            "PATH": SEARCH,
            "PYTHONPATH": str(ROOT),
            "NEMORUN_HOME": str(self.folder / "home"),
            FOLDER: str(folder),
        }

    def close(self) -> None:
        for launched in self._started:
            launched.process.kill()
            launched.process.wait()


@contextlib.contextmanager
def launching(cluster: SlurmCluster, folder: Path) -> Iterator[Launches]:
    launches = Launches(cluster, folder)
    try:
        yield launches
    finally:
        launches.close()
