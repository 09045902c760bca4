"""One rank of `proma eval`."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

from proma_megatron.checkpoints.loading import load_policy
from proma_megatron.commands.evaluate.job import EvaluationJob
from proma_megatron.data.datasets import load_problems
from proma_megatron.data.loading import load_tokenizer, make_prompts
from proma_megatron.distributed.topology import Topology
from proma_megatron.evaluation.evaluate import Evaluation, evaluate
from proma_megatron.files import atomic_write, write_rows
from proma_megatron.rewards.pool import Scorer

logger = logging.getLogger(__name__)

JOB = EvaluationJob


def run(job: EvaluationJob, topology: Topology) -> str | None:
    """Sample and score on this rank; rank 0 writes the completions.

    Returns:
        On rank 0 the figures, as JSON.
    """
    config, start = job.config, time.monotonic()

    def say(text: str) -> None:
        if topology.is_main:
            logger.info("[%6.1f s] %s", time.monotonic() - start, text)

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
