"""A private OpenSSH server on this machine, for tests that launch jobs on another one."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

import psutil

from support.slurm import SEARCH, free_ports, until

PROGRAMS = ("sshd", "ssh-keygen", "ssh", "rsync")

# Without PAM it asks nobody but the key file, whose folder is below one that all may write to.
CONFIGURATION = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
AuthenticationMethods publickey
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowUsers {user}
UsePAM no
StrictModes no
MaxStartups 100
MaxSessions 100
PrintMotd no
PrintLastLog no
LogLevel VERBOSE
Subsystem sftp internal-sftp
SetEnv {environment}
"""

# ssh finds its folder through the user's entry in /etc/passwd, whatever HOME says.
PRIVATE_HOME = """\
set -e
mount --bind "$1/passwd" /etc/passwd
if [ -d "$2/.ssh" ]; then mount --bind "$1/home/.ssh" "$2/.ssh"; fi
shift 2
exec "$@"
"""


def missing_ssh() -> str | None:
    """Why no server can run here, None if one can."""
    lacking = [program for program in PROGRAMS if not shutil.which(program, path=SEARCH)]
    if lacking:
        packages = "openssh-server openssh-client rsync"
        return f"needs {', '.join(lacking)}: apt-get install {packages}"
    return None


class SshServer:
    """Runs from ``with`` to its end and lets in the current user, by ``identity`` only.

    Args:
        environment: what remote commands find on top of sshd's few variables; PATH is this
            process's with the folders of daemons, unless given.

    Attributes:
        identity: the user's private key.
        known_hosts: a file that knows the server's key.
    """

    host = "127.0.0.1"
    port: int
    user: str
    folder: Path
    identity: Path
    known_hosts: Path

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self.environment = {"PATH": SEARCH, **(environment or {})}

    def __enter__(self) -> SshServer:
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        self.folder = Path(tempfile.mkdtemp(prefix="sshd-"))
        self.identity = self.folder / "identity"
        self.known_hosts = self.folder / "known_hosts"
        self._server: psutil.Popen | None = None
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

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def _configure(self) -> None:
        (self.port,) = free_ports(1)
        make_key(self.folder / "host_key")
        make_key(self.identity)
        public = (self.folder / "identity.pub").read_text()
        (self.folder / "authorized_keys").write_text(public)
        host_key = (self.folder / "host_key.pub").read_text()
        self.known_hosts.write_text(f"[{self.host}]:{self.port} {host_key}")
        # One line, for sshd ignores all SetEnv but the first.
        pairs = " ".join(f'"{name}={value}"' for name, value in self.environment.items())
        (self.folder / "config").write_text(
            CONFIGURATION.format(
                folder=self.folder, port=self.port, user=self.user, environment=pairs
            )
        )

    def _start(self) -> None:
        if os.geteuid() == 0:
            # Debian's sshd wants this empty folder, which its service makes; it may be in use by
            # another server, too, so it stays.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        program = shutil.which("sshd", path=SEARCH)
        assert program is not None
        with (self.folder / "log").open("w") as log:
            self._server = psutil.Popen(
                # It wants its own absolute path, to start itself again for each connection.
                [program, "-D", "-e", "-f", str(self.folder / "config")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        server = self._server

        def ready() -> bool:
            return "Server listening" in self.log() or server.poll() is not None

        if not until(ready, 10) or server.poll() is not None:
            raise RuntimeError(f"sshd doesn't listen:\n{self.log()}")

    def _stop(self) -> None:
        """End the server and the connections that are open, with their commands."""
        try:
            if self._server is not None:
                processes = [self._server]
                with contextlib.suppress(psutil.NoSuchProcess):
                    processes += self._server.children(recursive=True)
                for process in processes:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.terminate()
                _, alive = psutil.wait_procs(processes, timeout=5)
                for process in alive:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                psutil.wait_procs(alive, timeout=5)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def make_key(path: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )


def private_home_command(known_hosts: Path) -> list[str] | None:
    """What to put before a command so that its ssh has a home of its own, None if that can't be.

    There ssh reads a copy of ``known_hosts`` and nothing else, and writes what it learns. The
    command and its children see it so; no other process does, and HOME stays as it is.
    """
    folder = known_hosts.parent / "private"
    home = folder / "home"
    (home / ".ssh").mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copyfile(known_hosts, home / ".ssh" / "known_hosts")
    entry = pwd.getpwuid(os.geteuid())
    ours = f"{entry.pw_name}:x:{entry.pw_uid}:{entry.pw_gid}::{home}:{entry.pw_shell}"
    others = [
        line
        for line in Path("/etc/passwd").read_text().splitlines()
        if not line.startswith(f"{entry.pw_name}:")
    ]
    (folder / "passwd").write_text("\n".join([ours, *others]) + "\n")
    prefix = ["unshare", "--mount", "sh", "-c", PRIVATE_HOME, "sh", str(folder), entry.pw_dir]
    try:
        done = subprocess.run(
            [*prefix, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except FileNotFoundError:  # no unshare
        return None
    return None if done.returncode else prefix
