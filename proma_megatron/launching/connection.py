"""Ask a cluster: shell commands where its Slurm is, over SSH or on this machine."""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from proma_megatron.errors import ConfigError, UnreachableError

_CONNECT_SECONDS = 20
_ANSWER_SECONDS = 120
_KEEPALIVE_SECONDS = 30


class Connection(Protocol):
    def run(self, command: str) -> str:
        """Return the standard output of a shell command, whatever its exit code.

        Raises:
            UnreachableError: the cluster can't be asked.
        """
        ...


class Here:
    """This machine."""

    def run(self, command: str) -> str:
        done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
        return done.stdout.decode(errors="replace")


class There:
    """The login node of a NeMo-Run tunnel."""

    def __init__(self, tunnel: Any) -> None:
        self._tunnel = tunnel

    def run(self, command: str) -> str:
        try:
            _reach(self._tunnel)  # again, if it was cut
            # Login shells differ, and a connection that was cut may never say so.
            asked = f"bash -c {shlex.quote(command)}"
            return self._tunnel.run(asked, hide=True, warn=True, timeout=_ANSWER_SECONDS).stdout
        except (Exception, SystemExit) as error:  # NeMo-Run exits where a new login is refused
            with contextlib.suppress(Exception):
                self._tunnel.cleanup()  # what was cut may else be waited for, for an hour
            reason = str(error) or type(error).__name__
            raise UnreachableError(f"{self._tunnel.host} does not answer: {reason}") from None


@contextlib.contextmanager
def connect(tunnel: Any) -> Iterator[Connection]:
    """Connect to the cluster of a NeMo-Run tunnel.

    Raises:
        ConfigError: the key is not there.
        UnreachableError: there is no way in.
    """
    import nemo_run as run

    if not isinstance(tunnel, run.SSHTunnel):
        yield Here()
        return
    _reach(tunnel)
    yield There(tunnel)


def _reach(tunnel: Any) -> None:
    """Log in; NeMo-Run asks for a password where no key is accepted, and then leaves by exit."""
    from nemo_run.core.frontend.console.api import CONSOLE

    port = f"-p {tunnel.port} " if tunnel.port else ""
    place = f"{tunnel.user}@{tunnel.host}" + (f", port {tunnel.port}," if tunnel.port else "")
    if tunnel.identity is not None and not Path(tunnel.identity).is_file():
        raise ConfigError(
            f"ssh.identity is {tunnel.identity}, expected a private key that exists; check the path"
        )
    before, quiet = socket.getdefaulttimeout(), CONSOLE.quiet
    socket.setdefaulttimeout(_CONNECT_SECONDS)
    CONSOLE.quiet = True
    try:
        tunnel.connect()
        tunnel.session.transport.set_keepalive(_KEEPALIVE_SECONDS)
    except SystemExit:
        raise UnreachableError(
            f"{place} lets nobody in with this key or password; `ssh {port}{tunnel.user}@"
            f"{tunnel.host}` must work before jobs can be submitted"
        ) from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise UnreachableError(
            f"{place} can't be reached: {reason}; check ssh.host and ssh.port of the cluster file, "
            "and the network"
        ) from None
    finally:
        CONSOLE.quiet = quiet
        socket.setdefaulttimeout(before)
