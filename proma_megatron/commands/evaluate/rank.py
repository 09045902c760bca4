"""One rank of `proma eval`.

Started through `startup`, or entered directly under torchrun and srun.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from proma_megatron.checkpoints.loading import load_policy
from proma_megatron.commands.evaluate.job import EvaluationJob
from proma_megatron.data.datasets import load_problems
from proma_megatron.data.loading import load_tokenizer, make_prompts
from proma_megatron.distributed.topology import Topology
from proma_megatron.evaluation.evaluate import Evaluation, evaluate
from proma_megatron.files import atomic_write, write_rows
from proma_megatron.processes.ranks import on_layout, serve
from proma_megatron.rewards.pool import Scorer


def run_evaluation(job: EvaluationJob, logs: Path | None) -> str | None:
    """The job of this rank, from torchrun's environment variables; rank 0 writes the completions.

    Args:
        logs: where a rank that fails says so; None: on standard error only.

    Returns:
        On rank 0 the figures, as JSON.
    """
    return on_layout(job.config, logs, partial(_run, job))


def _run(job: EvaluationJob, topology: Topology) -> str | None:
    config, start = job.config, time.monotonic()

    def say(text: str) -> None:
        if topology.is_main:
            print(f"[{time.monotonic() - start:6.1f} s] {text}", file=sys.stderr, flush=True)

    tokenizer = load_tokenizer(config, Path(os.devnull), ())
    problems = load_problems(job.data, config.data.columns)
    prompts, _ = make_prompts(problems, "evaluation", config, tokenizer)
    policy = load_policy(config, tokenizer.vocab_size, job.checkpoint, topology)
    say("weights are in place")
    with Scorer(config.reward, config.rollout.max_new_tokens) as scorer:
        found = evaluate(
            policy,
            tokenizer,
            prompts,
            config,
            scorer,
            progress=lambda done: say(f"{done:,} of {len(prompts):,} problems"),
        )
    if not topology.is_main:
        return None
    with atomic_write(job.out) as part:
        write_rows(part, found.rows())
    say(f"wrote {job.out}")
    say(found.describe())
    return json.dumps(_summary(job, found, len(problems) - len(prompts)))


def _summary(job: EvaluationJob, found: Evaluation, dropped: int) -> dict[str, object]:
    return {
        "data": str(job.data),
        "out": str(job.out),
        "samples": found.samples,
        "dropped_problems": dropped,
        **found.metrics(),
    }


def main(arguments: Sequence[str]) -> None:
    serve(arguments, EvaluationJob, run_evaluation)
