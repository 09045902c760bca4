"""Write full tensors as safetensors files of a size, with their index."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from proma_megatron.config.pretrained import CONFIG
from proma_megatron.errors import ConfigError
from proma_megatron.weights.huggingface import INDEX

logger = logging.getLogger(__name__)


def _plan(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_size: str
) -> dict[str, list[str]]:
    """Plan files of at most this size with their tensors, named as transformers names them."""
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    return split_torch_state_dict_into_shards(empty, max_shard_size=shard_size).filename_to_tensors


def _write(
    out: Path,
    tensors: Iterator[tuple[str, torch.Tensor]],
    files: Mapping[str, Sequence[str]],
    dtype: torch.dtype,
) -> dict[str, int]:
    """Fill file after file; one file's tensors are held at a time."""
    size = 0
    for number, (file, names) in enumerate(files.items(), start=1):
        content = {}
        for expected in names:
            name, value = next(tensors)
            assert name == expected, f"{name} came for {expected}"
            if not bool(value.isfinite().all()):
                raise ConfigError(
                    f"{name} of the checkpoint holds NaN or infinity; export an earlier one"
                )
            value = value.to(dtype)
            if not bool(value.isfinite().all()):
                raise ConfigError(
                    f"--dtype is {str(dtype).removeprefix('torch.')}, in which {name} overflows; "
                    "use bfloat16 or float32"
                )
            content[name] = value.contiguous()
            size += value.nbytes
        save_file(content, out / file, metadata={"format": "pt"})
        shutil.copymode(out / CONFIG, out / file)  # safetensors lets nobody else read it
        logger.info("%s of %s files", number, len(files))
    for name, _ in tensors:
        raise AssertionError(f"{name} belongs to no file")
    if len(files) > 1:
        where = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return {"files": len(files), "bytes": size}
