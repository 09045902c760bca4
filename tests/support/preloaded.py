"""What the server of `forked` has loaded before it forks a rank: seconds of imports, done once.

Nothing here may start a thread, a process group or CUDA, none of which survives a fork.
"""

from __future__ import annotations

import gc
import importlib
import os

import torch

from proma_megatron.processes.entry import defer_compilation

LOADED_BY = os.getpid()
MODULES = (
    "proma_megatron.commands.train.rank",
    "proma_megatron.commands.evaluate.rank",
    "proma_megatron.commands.gradients.rank",
    "proma_megatron.commands.export.rank",
    "transformers",
    # What a run imports when it first takes a step or saves.
    "torch._dynamo",
    "torch.onnx.ops",
    "torch.utils.tensorboard.writer",
    "megatron.core.models.mimo.optimizer",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "pytest",  # the main module of a process that a test starts
    "support.pool",
    "support.pooled",
)

torch.set_num_threads(1)
defer_compilation()
for name in MODULES:
    importlib.import_module(name)
gc.collect()
gc.freeze()  # pages that a collection doesn't touch stay shared
