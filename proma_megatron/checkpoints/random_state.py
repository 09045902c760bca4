"""States of every random number generator of this process, as tensors.

What a run samples does not depend on them: each rollout's noise is a function of seed, step and
place, and dropout is 0. They are kept for what a user's code or a later layer may draw.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

State = dict[str, torch.Tensor]
_TRACKED = "tracked."  # Megatron's named states, for dropout in tensor-parallel regions


def seed_generators(seed: int, rank: int) -> None:
    """Let the generators of this process start from the run's seed; Megatron seeds its own."""
    of_rank = f"{seed}/{rank}"
    random.seed(of_rank)
    np.random.seed(random.Random(of_rank).getrandbits(32))
    torch.manual_seed(random.Random(of_rank).getrandbits(63))


def random_state(device: torch.device) -> State:
    """Copy the states of torch, Python, NumPy and Megatron's tracker."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert name == "MT19937", "NumPy's global generator"
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python.gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    tracker: Any = get_cuda_rng_tracker()
    for key, state in tracker.get_states().items():
        found[_TRACKED + key] = state
    return {key: value.detach().cpu().clone() for key, value in found.items()}


def restore_random_state(state: State, device: torch.device) -> None:
    """Continue where a process with these states would."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python.gauss"].item()
    random.setstate((version, tuple(words), None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss = state["numpy"].tolist()
    cached = state["numpy.gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    tracker: Any = get_cuda_rng_tracker()
    tracked = {
        key.removeprefix(_TRACKED): value
        for key, value in state.items()
        if key.startswith(_TRACKED)
    }
    if tracked:
        tracker.set_states(tracked)
