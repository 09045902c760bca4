"""Bytes of the tensors that are alive, now and at the peak."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made under this mode and still exist, now and at the peak.

    A storage counts once, however many tensors view it, from the operator that first returned it.
    What a kernel allocates and frees inside is not seen.

    Args:
        net: take off what was there before and has gone since.
    """

    def __init__(self, *, net: bool = False) -> None:
        super().__init__()
        self.net = net
        self.now = 0
        self.peak = 0
        self._known: dict[int, int] = {}
        self._before: set[int] = set()

    def __enter__(self) -> LiveBytes:
        gc.collect()
        # Views of older storages come out of operators as well, and are nothing new. When one dies,
        # its address may come back as that of a new one.
        for found in gc.get_objects():
            if issubclass(type(found), torch.Tensor):
                storage = found.untyped_storage()
                self._before.add(storage._cdata)
                weakref.finalize(storage, self._leave, storage._cdata, storage.nbytes())
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        if name.startswith("c10d.") and not name.startswith(_PAIRWISE):
            result = _on_copies(func, args, kwargs or {})
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._before:
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _leave(self, key: int, size: int) -> None:
        if key in self._before:  # each storage was found as often as it has views
            self._before.discard(key)
            self.now -= size if self.net else 0

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.now -= size

    @property
    def sizes(self) -> list[int]:
        """Bytes of each storage that exists now."""
        return list(self._known.values())


_PAIRWISE = ("c10d.send.", "c10d.recv_")


def _on_copies(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The collective, done when this returns; its library has seen copies of the tensors only.

    Gloo's threads let go of a tensor some time after whoever waits for it has gone on. On a busy
    machine that is long enough to find a peak that nobody caused.
    """
    given = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
    copies = {id(each): each.clone() for each in given}
    args, kwargs = tree_map_only(torch.Tensor, lambda each: copies[id(each)], (args, kwargs))
    found = func(*args, **kwargs)
    dist.Work.unbox(found[-1] if isinstance(found, tuple) else found).wait()
    for each in given:
        each.copy_(copies[id(each)])
    originals = {id(copies[id(each)]): each for each in given}
    return tree_map_only(torch.Tensor, lambda each: originals[id(each)], found)
