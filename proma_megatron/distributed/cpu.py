"""Megatron-Core without a GPU: the same code over Gloo.

Megatron-Core asks for CUDA in a few hard-coded places: ``device="cuda"`` arguments in the schedules
and the optimizer, type names such as ``torch.cuda.FloatTensor``, streams, and CUDA RNG states. This
module answers those calls with their CPU counterparts. `install` replaces functions of
``torch.cuda`` once a process; `megatron_calls` is the context in which Megatron code runs. Neither
does anything on a machine whose run uses GPUs.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_installed = False


def _asks_for_cuda(device: object) -> bool:
    return torch.device(device).type == "cuda" if isinstance(device, str | torch.device) else False


class _CpuForCuda(TorchFunctionMode):
    """Redirect device arguments and answer the optimizer's checks of type names."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The stock optimizers sort parameters by these names, and know no float64; what they do
            # to float32 parameters is right for it.
            return func(*args).replace("torch.", "torch.cuda.").replace("Double", "Float")
        if "device" in kwargs and _asks_for_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)


class _Inert:
    """A stand-in for streams and events: there is one queue of work on a CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def install() -> None:
    """Let Megatron-Core run on the CPU in this process. Safe to call more than once."""
    global _installed
    if _installed:
        return
    _installed = True
    cpu = torch.device("cpu")
    stream = _Inert()
    replacements: dict[str, Any] = {
        "current_device": lambda: cpu,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _Inert,
        "Event": _Inert,
        "empty_cache": lambda: None,
        # RNG states of the tracker behind dropout and recompute become CPU generator states.
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = replacements["get_rng_state"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.tensor_parallel import random as megatron_random

    def get_state(
        device: Any = None, clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    _take_torch_kernels()


def _take_torch_kernels() -> None:
    """Give Megatron's optimizer torch's kernels, where Transformer Engine or Apex is there, too.

    It takes their kernels, which need a GPU, whenever it can import them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.optimizer as optimizers
        from megatron.core import utils
        from megatron.core.optimizer import clip_grads, optimizer

    optimizers.Adam, optimizers.SGD = torch.optim.AdamW, torch.optim.SGD
    optimizers.USING_PYTORCH_OPTIMIZER = True
    module: Any
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None


@contextlib.contextmanager
def megatron_calls(device: torch.device) -> Iterator[None]:
    """Enter what code of Megatron-Core that builds, schedules or updates a model runs within.

    Kept out of the decoding loop: the mode costs a Python call for every torch function.
    """
    if device.type == "cuda":
        yield
    else:
        with _CpuForCuda():
            yield
