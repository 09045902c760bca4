import zlib
from collections.abc import Iterator

import pytest
import torch
from support import quick  # noqa: F401 - before anything that loads Megatron
from support.forked import end_all
from support.pool import WorkerPool
from support.pooled import PooledStarter

from proma_megatron.processes import logs
from proma_megatron.processes.elastic import starting_ranks

# As in ranks. A second thread waits for the first more than it helps with matrices this small: the
# tests of the rules take twice as long with it, and more where other processes want its core.
torch.set_num_threads(1)
logs.configure()  # as the entry of a command does

# Fixtures whose tests have processes other than pytest's own. Those that get them from one of these
# (`in_pool`, for one) need no name here.
# `trained` is a run of the whole command, which tests of what comes after it share.
STARTING = {"workers", "gpu_worker", "gpu_workers", "te_workers", "cluster", "trained"}
# Marks of tests that the fast loop leaves out for other reasons: `-m "not ranks"` replaces the
# expression of addopts in pyproject.toml, and would bring them in.
APART = ("slow", "slurm", "te", "faults", "gpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="I/N", help="run the Ith, from 0, of N parts of the tests")


def pytest_report_header(config: pytest.Config) -> list[str]:
    part = _part(config)
    return [] if part is None else [f"part {part[0]} of 0 to {part[1] - 1} of the tests"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what starts processes, and keep one part where one is asked for.

    This runs after the same function in folders below, which set marks that are read here, and
    before pytest deselects by ``-m``: plugins are called from the last registered to the first.
    """
    for item in items:
        starts = STARTING.intersection(getattr(item, "fixturenames", ()))
        if starts or any(item.get_closest_marker(name) for name in APART):
            item.add_marker(pytest.mark.ranks)
    part = _part(config)
    if part is not None:
        dropped = [item for item in items if not _is_in(part, item)]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if _is_in(part, item)]


def _part(config: pytest.Config) -> tuple[int, int] | None:
    """Return number and count of the part that ``--part`` asks for.

    Raises:
        pytest.UsageError: it isn't two numbers of which the first is below the second.
    """
    text = config.getoption("--part")
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise pytest.UsageError(f"--part {text}: give I/N with 0 <= I < N, as in --part 0/3")
    return int(number), int(count)


def _is_in(part: tuple[int, int], item: pytest.Item) -> bool:
    """Return whether a test belongs to a part, which depends on its name alone."""
    number, count = part
    return zlib.crc32(item.nodeid.encode()) % count == number


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Ranks on the CPU, over Gloo."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture
def in_pool(workers: WorkerPool) -> Iterator[None]:
    """Commands run in this process, and their ranks in the pool: starting others takes seconds."""
    with starting_ranks(PooledStarter(workers)):
        yield


@pytest.fixture(scope="session")
def gpu_worker() -> Iterator[WorkerPool]:
    """One rank on a GPU."""
    if not torch.cuda.device_count():
        pytest.skip("needs a GPU, and here is none")
    pool = WorkerPool("cuda")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def gpu_workers() -> Iterator[WorkerPool]:
    """Two ranks on GPUs of their own, over NCCL."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        pytest.skip(f"needs two GPUs, for NCCL gives each rank one of its own; here are {gpus}")
    pool = WorkerPool("cuda")
    yield pool
    pool.close()


@pytest.hookimpl(trylast=True)  # after fixtures have closed their pools
def pytest_sessionfinish() -> None:
    end_all()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures behind the exactness tests, which otherwise only say that they passed."""
    from support.cases import LARGEST

    if not LARGEST:
        return
    terminalreporter.section("largest relative error of a gradient tensor")
    for comparison, (error, where) in sorted(LARGEST.items()):
        terminalreporter.write_line(f"{error:.1e}  {comparison}  ({where})")
