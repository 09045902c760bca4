"""Plant faults, one after the other, and run the tests that must notice each.

``python tests/plant.py [ID ...]``, all of tests/planted_faults.toml without an ID. A fault changes
a file of this checkout while its tests run, so let nothing else work there meanwhile. The file is
as it was afterwards, whatever happens; one with changes that aren't committed is refused. Exits
with 1 if a fault stays green, or if its text isn't found.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "planted_faults.toml"
FAILED_TESTS = 1  # of pytest's exit codes; others say that it found no tests, or couldn't run them
SECONDS = 600  # after which tests that hang are given up


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A change of one file that makes tests of the default suite fail."""

    id: str
    file: str  # from the checkout's root
    text: str  # once in the file
    replacement: str
    breaks: str
    red: tuple[str, ...]  # test files, or tests; one of them fails
    before: str  # the file at commit 09d38d8


def read_faults() -> list[Fault]:
    """Return the faults in the order of their file."""
    found = tomllib.loads(LIST.read_text())["fault"]
    return [Fault(**{**entry, "red": tuple(entry["red"])}) for entry in found]


def with_fault(fault: Fault, content: str) -> str:
    """Return a file's content with the fault in it.

    Raises:
        ValueError: its text isn't there exactly once.
    """
    count = content.count(fault.text)
    if count != 1:
        raise ValueError(
            f"the text of fault {fault.id} is {count} times in {fault.file}, expected once; "
            f"choose another in {LIST.name}"
        )
    return content.replace(fault.text, fault.replacement)


@contextmanager
def planted(fault: Fault, path: Path) -> Iterator[None]:
    """Have the fault in this file within the ``with`` block.

    The time of its last change is restored, too: Python takes what it has compiled of a file by
    that time, so that of the broken one isn't taken for the whole one's.

    Raises:
        ValueError: as `with_fault`, or the file has changes that aren't committed.
    """
    changes = ["git", "-C", str(path.parent), "status", "--porcelain", "--", path.name]
    if subprocess.run(changes, capture_output=True, text=True, check=True).stdout:
        raise ValueError(f"{path} has changes that aren't committed; commit or drop them first")
    content, times = path.read_bytes(), path.stat()
    broken = with_fault(fault, content.decode())
    try:
        path.write_bytes(broken.encode())
        yield
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def run_tests(selected: tuple[str, ...], root: Path) -> int:
    """Run these tests to the first that fails; return pytest's exit code.

    Raises:
        ValueError: they don't come to an end.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *selected]
    tests = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        return tests.wait(SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the tests ran for more than {SECONDS} s; narrow them") from None
    finally:
        if tests.poll() is None:
            os.killpg(tests.pid, signal.SIGKILL)
            tests.wait()


def try_fault(fault: Fault, path: Path, selected: tuple[str, ...], root: Path) -> bool:
    """Plant a fault, say what became of it, and return whether it was noticed."""
    began = time.monotonic()
    try:
        with planted(fault, path):
            code = run_tests(selected, root)
    except ValueError as error:
        print(f"{fault.id}  {error}", flush=True)
        return False
    said = "red" if code == FAILED_TESTS else "GREEN" if code == 0 else f"pytest ended with {code}"
    print(f"{fault.id}  {said}  {time.monotonic() - began:.0f} s", flush=True)
    return code == FAILED_TESTS


def main(wanted: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    faults = read_faults()
    unknown = set(wanted) - {fault.id for fault in faults}
    if unknown:
        sys.exit(f"no fault is named {', '.join(sorted(unknown))}; {LIST.name} has their names")
    chosen = [fault for fault in faults if not wanted or fault.id in wanted]
    noticed = [try_fault(fault, ROOT / fault.file, fault.red, ROOT) for fault in chosen]
    sys.exit(0 if all(noticed) else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
