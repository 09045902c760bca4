"""A real Slurm cluster of two nodes on this machine, for the tests that need one."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

NODES = ("node1", "node2")
PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "scancel",
    "scontrol",
    "sinfo",
    "squeue",
    "srun",
)
# Daemons are often not on the PATH of a user.
SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

# Without accounting and cgroups, so that nothing outside the folder is needed. A requeued job
# has to wait until its old credential has expired; Slurm takes five seconds at the least.
CONFIGURATION = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
SlurmdParameters=config_overrides
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=1,bf_interval=1
DependencyParameters=kill_invalid_depend
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MinJobAge=3600
KillWait={kill_wait}
{gres}
{nodes}
PartitionName=batch Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=8 SocketsPerBoard=1"
    " CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000 {gres}State=UNKNOWN"
)


def missing() -> str | None:
    """Why Slurm can't run here, None if it can."""
    lacking = [program for program in PROGRAMS if not shutil.which(program, path=SEARCH)]
    if lacking:
        packages = "slurmctld slurmd slurm-client munge"
        return f"needs {', '.join(lacking)}: apt-get install {packages}"
    if os.geteuid() != 0:
        return "needs root, as which slurmd starts the tasks of jobs"
    return None


class SlurmCluster:
    """Runs from ``with`` to its end; whatever jobs are left then are killed.

    Callers start Slurm's commands with ``environment`` on top of their own, or use ``run``.

    Args:
        gpus: of each node, as far as Slurm knows: it hands out numbers, there is no device.
        kill_wait: seconds between SIGTERM and SIGKILL for jobs that are cancelled or requeued.
    """

    folder: Path
    environment: dict[str, str]

    def __init__(self, gpus: int = 0, kill_wait: int = 5) -> None:
        self.gpus = gpus
        self.kill_wait = kill_wait

    def __enter__(self) -> SlurmCluster:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            self._configure()
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def run(
        self, *command: str | Path, check: bool = True, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; its output is part of the error if it fails.

        Args:
            check: whether an exit status other than 0 is an error.
        """
        done = subprocess.run(
            command,
            env={**os.environ, "PATH": SEARCH, **self.environment},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command} exited with {done.returncode}:\n{output(done)}")
        return done

    def submit(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        """The id of the job that ``sbatch`` makes of these arguments."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd).stdout.strip()

    def job(self, job: str | int) -> dict[str, str]:
        """What ``scontrol show job`` says, by its names: JobState, Restarts, ExitCode, ..."""
        return fields(self.run("scontrol", "-o", "show", "job", str(job)).stdout)

    def wait(
        self, job: str | int, states: str | Iterable[str], seconds: float = 30
    ) -> dict[str, str]:
        """The job as soon as it is in one of the states, such as COMPLETED."""
        wanted = {states} if isinstance(states, str) else set(states)
        found: dict[str, str] = {}

        def arrived() -> bool:
            nonlocal found
            found = self.job(job)
            return found["JobState"] in wanted

        if not until(arrived, seconds, every=0.1):
            text = "\n".join(f"  {name}={value}" for name, value in found.items())
            raise TimeoutError(
                f"job {job} isn't {wanted} after {seconds} s:\n{text}\n{self.logs()}"
            )
        return found

    def start_again(self, job: str | int, seconds: float = 20) -> None:
        """Let a requeued job start at once, instead of five seconds later, as Slurm has planned.

        Not within the second in which it was stopped, though: a node knows by the second which
        credentials are revoked, and the job would fail with a new one of that second.
        """
        self.wait(job, "PENDING", seconds)
        time.sleep(1.05 - time.time() % 1)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def logs(self, lines: int = 15) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
            for path in sorted((self.folder / "log").glob("*.log"))
        )

    def _configure(self) -> None:
        # Jobs of any user read slurm.conf, and munged insists on strict rights for its key.
        self.folder.chmod(0o755)
        for name in ("munge", "state", "spool", "run", "log", "dev"):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        (self.folder / "plugstack.conf").touch()
        for index in range(self.gpus):
            # Slurm refuses GPUs without device files; these are /dev/null by another name.
            device = self.folder / "dev" / f"nvidia{index}"
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        if self.gpus:
            files = f"{self.folder}/dev/nvidia[0-{self.gpus - 1}]"
            (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={files}\n")
        gres = f"Gres=gpu:{self.gpus} " if self.gpus else ""
        port, *ports = free_ports(1 + len(NODES))
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder,
                host=socket.gethostname().split(".")[0],
                port=port,
                kill_wait=self.kill_wait,
                gres="GresTypes=gpu" if self.gpus else "",
                nodes="\n".join(
                    NODE.format(name=name, port=port, gres=gres)
                    for name, port in zip(NODES, ports, strict=True)
                ),
                names=",".join(NODES),
            )
        )

    def _start(self) -> None:
        munge = self.folder / "munge"
        self._daemon(
            "munged",
            f"--key-file={munge / 'key'}",
            f"--socket={munge / 'socket'}",
            f"--pid-file={self.folder / 'run' / 'munged.pid'}",
            f"--log-file={self.folder / 'log' / 'munged.log'}",
            f"--seed-file={munge / 'seed'}",
        )
        self._daemon("slurmctld")
        for name in NODES:
            self._daemon("slurmd", "-N", name)

        def idle() -> bool:
            states = self.run("sinfo", "-h", "-N", "-o", "%T", check=False).stdout.split()
            return states == ["idle"] * len(NODES)

        if not until(idle, 20, every=0.1):
            raise RuntimeError(
                f"Slurm's nodes aren't idle 20 s after the start:\n{self._sinfo()}\n{self.logs()}"
            )

    def _sinfo(self) -> str:
        return output(self.run("sinfo", "-N", "-o", "%N %T %E", check=False))

    def _daemon(self, *command: str) -> None:
        """Start a program that puts itself in the background.

        It holds none of our pipes, for a caller that reads them would wait for its end.
        """
        with (self.folder / "log" / "start.log").open("a") as log:
            done = subprocess.run(
                command,
                env={**os.environ, "PATH": SEARCH, **self.environment},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=20,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{command} exited with {done.returncode}:\n{self.logs()}")

    def _stop(self) -> None:
        """End jobs and daemons, also where only some of them have come to life."""
        try:
            if (self.folder / "run" / "slurmctld.pid").exists():
                self._end_jobs()
            files = (self.folder / "run").glob("*.pid")
            pids = {int(text) for file in files if (text := file.read_text().strip()).isdigit()}
            end({pid for pid in pids if self._is_ours(pid)}, seconds=3)
            # Steps whose slurmd is gone, and what tasks have put in the background.
            everything = {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()}
            end({pid for pid in everything if self._is_ours(pid)}, seconds=0)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _end_jobs(self) -> None:
        """Kill them all at once, since nobody waits for what they'd still write."""

        def none_left() -> bool:
            listed = self.run("squeue", "-h", "-o", "%i", check=False)
            return bool(listed.returncode) or not listed.stdout.strip()

        with contextlib.suppress(subprocess.TimeoutExpired):
            if none_left():
                return
            jobs = self.run("squeue", "-h", "-o", "%A", check=False).stdout.split()
            # In this order, for a job that is being cancelled can't be signalled.
            self.run("scancel", "--full", "--signal=KILL", *jobs, check=False)
            self.run("scancel", *jobs, check=False)
            # A step lasts for as long as anything holds its output open, so don't insist.
            until(none_left, 3, every=0.1)

    def _is_ours(self, pid: int) -> bool:
        """Whether a process is one of this cluster's daemons, steps or tasks.

        Asked before each kill, for the number may belong to another process by now. The processes
        of a test, which have SLURM_CONF too, have no SLURMD_NODENAME.
        """
        if pid == os.getpid():
            return False
        try:
            proc = Path(f"/proc/{pid}")
            name = proc.joinpath("comm").read_text().strip()
            variables = proc.joinpath("environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            return False
        if f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() not in variables:
            return False
        daemons = ("munged", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd")
        return name in daemons or any(each.startswith(b"SLURMD_NODENAME=") for each in variables)


def output(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stdout + done.stderr).strip()


def fields(line: str) -> dict[str, str]:
    """The NAME=value pairs of a line of scontrol's.

    A word without = belongs to the value before it, such as the name of a job or a comment.
    """
    found: dict[str, str] = {}
    last = ""
    for word in line.split():
        name, equals, value = word.partition("=")
        if equals:
            last = name
            found[name] = value
        elif last:
            found[last] += f" {word}"
    return found


def free_ports(count: int) -> list[int]:
    """Different TCP ports of 127.0.0.1 that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def until(condition: Callable[[], bool], seconds: float, every: float = 0.05) -> bool:
    """Ask again and again; whether the condition held before the time was up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has, though nobody has read its status."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


def end(pids: set[int], seconds: float) -> None:
    """SIGTERM, and SIGKILL for those that haven't ended after these seconds."""

    def tell(number: signal.Signals) -> None:
        for pid in pids:
            if not gone(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def all_gone() -> bool:
        return all(gone(pid) for pid in pids)

    if seconds:
        tell(signal.SIGTERM)
        if until(all_gone, seconds):
            return
    tell(signal.SIGKILL)
    until(all_gone, 10)
