"""Hugging Face weights in every layout: the same logits, the same bits back, no byte too many."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.pool import WorkerPool
from support.pretrained import Layout, logits_of, weights_of
from support.qwen import theirs, write_qwen
from support.slow import all_but

LAYOUTS: dict[str, Layout] = {
    "one rank": {},
    "TP2": {"tensor": 2},
    "TP4": {"tensor": 4},  # more ranks than key-value heads
    "TP2 SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP2 VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "TP2 PP2": {"tensor": 2, "pipeline": 2, "sequence": True},
}
MODELS = {
    "Qwen3 tied": ("qwen3", True),
    "Qwen3": ("qwen3", False),
    "Qwen2": ("qwen2", False),
    "Qwen2 tied": ("qwen2", True),
}
FILES = {"one file": "1GB", "an index": "20KB"}
draw = random.Random(0)
SEQUENCES = [[draw.randrange(331) for _ in range(length)] for length in (9, 1, 14)]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sizes = {"Qwen3": "20KB"}  # one of them comes in several files
    return {
        name: write_qwen(
            tmp_path_factory.mktemp("model"),
            family,
            tied=tied,
            dtype=torch.float64,
            shard_size=sizes.get(name, "1GB"),
            tokenizer=False,
            stored_head=name == "Qwen2 tied",
        )
        for name, (family, tied) in MODELS.items()
    }


def ranks(parallel: Layout) -> int:
    return int(str(parallel.get("tensor", 1))) * int(str(parallel.get("pipeline", 1)))


CASES = [(name, "Qwen3") for name in LAYOUTS]
CASES += [(name, model) for name in ("TP4", "TP2 PP2") for model in MODELS if model != "Qwen3"]


REPEATED = [("TP4", "Qwen2 tied"), ("TP4", "Qwen3 tied"), ("TP2 PP2", "Qwen2")]


@pytest.mark.parametrize(("name", "model"), all_but(CASES, REPEATED))
def test_logits_are_those_of_transformers(
    workers: WorkerPool, directories: dict[str, Path], model: str, name: str
) -> None:
    path, parallel = directories[model], LAYOUTS[name]
    found = workers.run(
        ranks(parallel), logits_of, path=path, parallel=parallel, sequences=SEQUENCES
    )
    expected = theirs(path, SEQUENCES)
    for rank in found:
        # What a rank reads is what it holds, and no more; a slice is at most a tensor.
        assert rank.bytes_read == rank.held
        assert rank.largest <= 8 * 331 * 32
    *_, last = found
    assert last.logits is not None
    for ours, reference in zip(last.logits, expected, strict=True):
        assert ours.shape == reference.shape
        assert float((ours - reference).abs().max()) < 1e-9


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("name", ["one rank", "TP4", "TP2 PP2", "PP2 VPP2"])
def test_weights_come_back_bit_by_bit(
    workers: WorkerPool, tmp_path: Path, name: str, files: str
) -> None:
    path = write_qwen(
        tmp_path / "model",
        tied=False,
        dtype=torch.bfloat16,
        shard_size=FILES[files],
        tokenizer=False,
    )
    written: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        written |= load_file(file)
    parallel = LAYOUTS[name]
    found, *_ = workers.run(ranks(parallel), weights_of, path=path, parallel=parallel)
    assert found.keys() == written.keys()
    for tensor, value in written.items():
        assert found[tensor].dtype == torch.bfloat16
        assert torch.equal(found[tensor], value), tensor
