"""Jobs for the worker pool: what a projected backward pass would wait for on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from proma_megatron.projection import host_sync
from proma_megatron.projection.accumulator import Accumulator
from proma_megatron.projection.updaters import sums
from support.gradients import gradients

# Operations that read values on the host, by name; `_waits` has those that do so only sometimes.
READING = {
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_eigvals",
    "_linalg_svd",
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "lift_fresh",  # a tensor of a Python list: a copy from memory that is not pinned
    "linalg_eig",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


def _waits(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    name = function.overloadpacket.__name__
    if name in READING or (name, function._overloadname) == ("repeat_interleave", "Tensor"):
        return True
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(i is not None and not i.dtype.is_signed for i in arguments[1])  # a mask
    if name == "_to_copy" and options.get("device") is not None:
        return torch.device(options["device"]).type != arguments[0].device.type
    if name == "copy_":
        return arguments[0].device.type != arguments[1].device.type
    return bool(options.get("check_errors"))


class _Watch(TorchDispatchMode):
    """Notes the operations between `begin_backward` and the end of that backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.within = False
        self.found: set[str] = set()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if self.within:
            name = func.overloadpacket.__name__
            self.names.add(name)
            if _waits(func, args, options):
                self.found.add(name)
        return func(*args, **options)

    @contextlib.contextmanager
    def backward_passes(self) -> Iterator[None]:
        begin, end = Accumulator.begin_backward, Accumulator._end_backward

        def beginning(accumulator: Accumulator, *arguments: Any) -> None:
            self.within = True
            begin(accumulator, *arguments)

        def ending(accumulator: Accumulator) -> None:
            end(accumulator)
            self.within = False

        with (
            mock.patch.object(Accumulator, "begin_backward", beginning),
            mock.patch.object(Accumulator, "_end_backward", ending),
            self,
        ):
            yield


def behind(device: torch.device, **arguments: Any) -> dict[str, torch.Tensor]:
    """`gradients`, computed as where the host must not wait for the device."""
    with mock.patch.object(host_sync, "asynchronous", return_value=True):
        return gradients(device, **arguments)


def watched(device: torch.device, **arguments: Any) -> dict[str, Any]:
    """The same, with the names of operations that wait, and of all, within backward passes."""
    watch = _Watch()
    with watch.backward_passes():
        found = behind(device, **arguments)
    return {"gradients": found, "waiting": watch.found, "operations": watch.names}


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm")
        return func(*args, **(kwargs or {}))


def products_beside_sums(device: torch.device, **arguments: Any) -> list[int]:
    """A job: of each sum over tensor ranks, how many products came before it was waited for."""
    products, begun, found = _Products(), {}, []
    start, wait = sums.start_sum, sums.Sum.wait

    def starting(*given: Any) -> sums.Sum:
        made = start(*given)
        if made.work is not None:
            begun[id(made)] = products.count
        return made

    def waited(made: sums.Sum) -> list[torch.Tensor]:
        if id(made) in begun:
            found.append(products.count - begun.pop(id(made)))
        return wait(made)

    with (
        mock.patch.object(sums, "start_sum", starting),
        mock.patch.object(sums.Sum, "wait", waited),
        products,
    ):
        gradients(device, **arguments)
    assert not begun
    return found
