"""Peak host memory of reading Hugging Face weights into the shards of a layout.

    uv run python benchmarks/loading.py --tensor 2 --pipeline 2

Writes a random Qwen3 directory in bfloat16, reads it on the CPU in every rank of the layout, and
prints for each rank the largest private memory (RssAnon) while it was built and filled, above that
of the process before, next to what the issue allows: the rank's own shard plus one tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from proma_megatron.config.fields import Section
from proma_megatron.config.loading import validate_config
from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.run import RunConfig
from proma_megatron.processes import logs
from proma_megatron.processes.ranks import run_on_ranks

if TYPE_CHECKING:
    from proma_megatron.distributed.topology import Topology


class LoadingJob(Section):
    config: RunConfig


def private_bytes() -> int:
    """Memory of this process that is backed by no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Samples `private_bytes` until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self._stopped = private_bytes(), threading.Event()

    def run(self) -> None:
        while not self._stopped.is_set():
            self.largest = max(self.largest, private_bytes())
            time.sleep(0.001)

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return self.largest


JOB = LoadingJob


def run(job: LoadingJob, topology: Topology) -> str | None:
    """Measure this rank; rank 0 returns the figures of all, as JSON."""
    import torch.distributed as dist

    from proma_megatron.checkpoints.loading import load_policy
    from proma_megatron.weights.mapping import tensor_shapes

    before, peak = private_bytes(), Peak()
    peak.start()
    policy = load_policy(job.config, 0, None, topology)
    found = {
        "rank": topology.rank,
        "shard": sum(s.parameter.nbytes for s in policy.shards),
        "tensor": max(
            2 * math.prod(shape)
            for shape in tensor_shapes(policy.model, policy.vocab_size).values()
        ),
        "peak": peak.stop() - before,
    }
    everyone: list[object] = [None] * topology.world_size
    dist.all_gather_object(everyone, found)
    return json.dumps(everyone) if topology.is_main else None


def write_model(path: Path, hidden: int, layers: int, vocabulary: int) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    Qwen3ForCausalLM(shape).save_pretrained(path, max_shard_size="200MB")


def main() -> None:
    logs.configure()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=50_000)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model, chosen.hidden, chosen.layers, chosen.vocabulary)
        parallel = ParallelConfig(tensor=chosen.tensor, pipeline=chosen.pipeline)
        tree = {"name": "loading", "device": "cpu", "model": {"path": model, "dtype": "bfloat16"}}
        config = validate_config({**tree, "parallel": parallel.model_dump()})
        job = LoadingJob(config=config)
        # The ranks import this file.
        search = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, search))
        summary = run_on_ranks("loading", job, purpose="loading", folder=Path(folder))
    rows = json.loads(summary or "[]")
    print(f"{'rank':>4} {'shard':>10} {'tensor':>10} {'allowed':>10} {'peak':>10}   (MiB)")
    for row in rows:
        figures = (row["shard"], row["tensor"], row["shard"] + row["tensor"], row["peak"])
        print(f"{row['rank']:>4}" + "".join(f" {value / 2**20:>10.1f}" for value in figures))


if __name__ == "__main__":
    main()
