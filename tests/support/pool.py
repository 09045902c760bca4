"""One pool of worker processes per test session.

Workers live for the whole session; every job joins a fresh default process group of as many ranks
as it needs. A worker that fails sends its own traceback; the others, which may hang in a
collective, are killed with it, and forked anew for the next job.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing as mp
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from proma_megatron.processes.entry import defer_compilation
from support.forked import Process

MAX_WORKERS = 4
JOB_TIMEOUT = 300.0


def _serve(rank: int, device_type: str, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    defer_compilation()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            number, world_size, function, arguments = pipe.recv()
        except EOFError:
            return  # the session is over
        # Plain pickle: torch's own would pass every tensor as an open file descriptor, and results
        # that are kept for comparison would run out of them.
        try:
            own = dist.PrefixStore(str(number), store)
            result = _run(function, arguments, device_type, rank, world_size, own)
            message = pickle.dumps((True, result))
            del result
            _release_groups()
            pipe.send_bytes(message)
        except Exception:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
            return


def _run(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    device_type: str,
    rank: int,
    world_size: int,
    store: dist.Store,
) -> Any:
    from proma_megatron.distributed.topology import setup_device

    os.environ["LOCAL_RANK"] = str(rank)
    device = setup_device(device_type)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=device if device_type == "cuda" else None,
    )
    try:
        # Connections are made lazily: a rank that is done before they are would break the others'.
        dist.barrier()
        return function(device, **arguments)
    finally:
        dist.destroy_process_group()


def _release_groups() -> None:
    """Free the groups of a layout, which hang on its model and that in reference cycles.

    Each Gloo group has three threads, one of which wakes a hundred times a second: those of a few
    hundred layouts keep two cores busy.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding.forward.cache_clear()  # keeps the last 32 models alive
    gc.collect()
    _freeze()


@functools.cache
def _freeze() -> None:
    """Not search again what was imported; to ask whether it is frozen takes a tenth of a second."""
    gc.freeze()


class WorkerPool:
    """Runs ``function(device, **arguments)`` on the ranks of a process group."""

    def __init__(self, device_type: str = "cpu") -> None:
        self.device_type = device_type
        # Where the ranks of a job find each other: told of news rather than looking for them.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._jobs = 0
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, world_size: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Results by rank. A failure on any rank raises RuntimeError with that rank's traceback."""
        assert world_size <= MAX_WORKERS
        while len(self._workers) < world_size:
            self._start()
        self._jobs += 1
        for _, pipe in self._workers[:world_size]:
            pipe.send((self._jobs, world_size, function, arguments))
        return self._collect(world_size)

    def _start(self) -> None:
        # A fork of what has loaded CUDA's libraries is nothing to rely on.
        kind: Any = mp.get_context("spawn").Process if self.device_type == "cuda" else Process
        ours, theirs = mp.Pipe()
        arguments = (len(self._workers), self.device_type, self._store.port, theirs)
        process = kind(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self._workers.append((process, ours))

    def _collect(self, world_size: int) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + JOB_TIMEOUT
        while len(results) < world_size:
            for rank, (process, pipe) in enumerate(self._workers[:world_size]):
                if rank in results or not pipe.poll(0.002):
                    continue
                try:
                    good, value = pipe.recv()
                except EOFError:
                    process.join()
                    self.close()
                    raise RuntimeError(
                        f"rank {rank} died with exit code {process.exitcode}"
                    ) from None
                if not good:
                    self.close()
                    raise RuntimeError(f"rank {rank} of {world_size} failed:\n{value}")
                results[rank] = value
            if time.monotonic() > deadline:
                missing = sorted(set(range(world_size)) - set(results))
                self.close()
                raise RuntimeError(f"ranks {missing} did not finish within {JOB_TIMEOUT} s")
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers.clear()
