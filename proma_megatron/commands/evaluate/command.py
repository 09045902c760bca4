"""`proma eval`: what its ranks are told, and how they are started."""

from __future__ import annotations

import os
from pathlib import Path

from proma_megatron.commands.evaluate.job import EvaluationJob
from proma_megatron.config.run import check_model_files
from proma_megatron.data.datasets import load_problems
from proma_megatron.data.loading import load_tokenizer, make_prompts
from proma_megatron.errors import ConfigError
from proma_megatron.files import check_output
from proma_megatron.processes.ranks import (
    already_started,
    as_started,
    is_first_rank,
    run_on_ranks,
    say,
)
from proma_megatron.rewards.registry import check_references, check_reward
from proma_megatron.runs.policies import PolicySource
from proma_megatron.weights.huggingface import conversion_note, read_model


def evaluate_saved(saved: PolicySource, data: Path, out: Path | None, *, overwrite: bool) -> None:
    """Evaluate a policy; the last line of standard output is JSON with the figures.

    Raises:
        ConfigError: policy, data, layout or output file don't fit.
        RewardError, WorkerError: a rank failed.
    """
    config = as_started(saved.config)
    out = out or default_output(saved, data)
    problems = load_problems(data, config.data.columns)
    if is_first_rank():  # the one that writes
        if out.exists() and not overwrite:
            raise ConfigError(f"{out} exists already; give another --out, or --overwrite")
        check_output(out, [data])
    check_model_files(config)
    check_reward(config.reward, config.rollout.max_new_tokens)
    notes: list[str | None] = []
    if saved.checkpoint is None:
        assert config.model.path is not None
        found = read_model(config.model.path, config.model, compare_head=is_first_rank())
        notes.append(conversion_note(found))
    tokenizer = load_tokenizer(config, Path(os.devnull), ())
    prompts, note = make_prompts(problems, "evaluation", config, tokenizer)
    if is_first_rank():
        check_references(config.reward.function, prompts)
    for text in filter(None, (*notes, note)):
        say(text)
    job = EvaluationJob(config=config, checkpoint=saved.checkpoint, data=data, out=out)
    if not already_started():
        samples = config.evaluation.samples
        say(f"{saved.name} on {data}: {len(prompts):,} problems, {samples} completions each")
    summary = run_on_ranks("proma_megatron.commands.evaluate.rank", job, purpose="eval")
    if summary is not None:
        print(summary, flush=True)


def default_output(saved: PolicySource, data: Path) -> Path:
    """Return a path in the run's directory, or for a Hugging Face model in the current one."""
    name = f"{saved.name}_{data.stem}.jsonl"
    return Path(f"eval_{name}") if saved.run is None else saved.run.path / "evaluation" / name
