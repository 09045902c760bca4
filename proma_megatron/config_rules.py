"""What keys of the configuration must agree with: each fault is one sentence for the user.

`config` calls these when a tree is validated; what algorithms, losses and estimators go together is
decided in `algorithms`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from proma_megatron.algorithms import combination_problems, estimator_problems

if TYPE_CHECKING:
    from proma_megatron.config import ModelConfig, ParallelConfig, RewardConfig, RunConfig


def layout_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """What keeps this model from being cut into this layout."""
    tp, pp, vpp = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    if model.heads % tp:
        yield (
            f"model.heads is {model.heads}, which parallel.tensor={tp} does not divide; "
            f"use a tensor size out of {_divisors(model.heads)}"
        )
    if model.kv_heads % tp and tp % model.kv_heads:
        yield (
            f"model.kv_heads is {model.kv_heads} and parallel.tensor is {tp}, expected one to "
            f"divide the other; use a tensor size out of {_divisors(model.kv_heads)} or a multiple "
            f"of {model.kv_heads}"
        )
    if model.heads % model.kv_heads:
        yield (
            f"model.kv_heads is {model.kv_heads}, expected a divisor of model.heads={model.heads}; "
            f"use one of {_divisors(model.heads)}"
        )
    if model.head_dim % 2:
        yield f"model.head_dim is {model.head_dim}, expected an even number for rotary embeddings"
    if model.ffn_hidden_size % tp:
        yield (
            f"model.ffn_hidden_size is {model.ffn_hidden_size}, which parallel.tensor={tp} does "
            f"not divide; use a multiple of {tp}"
        )
    if parallel.sequence and tp == 1:
        yield "parallel.sequence is true with parallel.tensor=1; use a tensor size of at least 2"
    if vpp is not None and pp == 1:
        yield (
            f"parallel.virtual_pipeline is {vpp} with parallel.pipeline=1; use at least 2 pipeline "
            "stages, or null"
        )
    if model.layers % (pp * (vpp or 1)):
        stages = f"parallel.pipeline={pp}" + (f" x virtual_pipeline={vpp}" if vpp else "")
        yield (
            f"model.layers is {model.layers}, which {stages} does not divide; use a number of "
            f"layers that is a multiple of {pp * (vpp or 1)}"
        )


def training_problems(config: RunConfig) -> Iterator[str]:
    """What keeps an RL step from being cut into prompts, groups and microbatches."""
    batch, rollout = config.batching, config.rollout
    budgeted = batch.sequences_per_microbatch is None
    if budgeted and batch.tokens_per_microbatch < config.max_sequence_length:
        yield (
            f"batching.tokens_per_microbatch is {batch.tokens_per_microbatch}, but a sequence may "
            f"have {config.max_sequence_length} tokens (rollout.max_prompt_tokens + "
            f"rollout.max_new_tokens); use at least {config.max_sequence_length}"
        )
    yield from estimator_problems(config)
    data_parallel = config.parallel.data or 1
    if rollout.prompts_per_step % (data_parallel * batch.minibatches):
        yield (
            f"rollout.prompts_per_step is {rollout.prompts_per_step}, expected a multiple of "
            f"parallel.data x batching.minibatches = {data_parallel * batch.minibatches}"
        )


def run_problems(config: RunConfig) -> Iterator[str]:
    if config.optimizer.distributed and config.model.dtype == "float64":
        yield (
            "optimizer.distributed is true with model.dtype=float64, which Megatron's distributed "
            "optimizer does not take; use float32 or bfloat16"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        yield (
            f"optimizer.min_lr is {config.optimizer.min_lr}, expected at most "
            f"optimizer.lr={config.optimizer.lr}"
        )
    if config.data.train_file is not None and config.data.validation_file is None:
        yield "data.train_file is set without data.validation_file; give both, or neither"
    if config.data.validation_file is not None and config.data.train_file is None:
        yield "data.validation_file is set without data.train_file; give both, or neither"
    if (config.data.columns.prompt is None) != (config.data.columns.answer is None):
        yield (
            "data.columns.prompt and data.columns.answer go together, but only one is set; give "
            "both, or neither"
        )
    yield from _reward_problems(config.reward)
    yield from combination_problems(config)


def _reward_problems(reward: RewardConfig) -> Iterator[str]:
    if reward.format_pattern is not None:
        try:
            re.compile(reward.format_pattern)
        except (re.error, OverflowError, RecursionError) as error:
            yield (
                f"reward.format_pattern is {reward.format_pattern!r}, expected a regular "
                f"expression; mend it: {error}"
            )
    module, _, name = reward.function.partition(":")
    if reward.function not in ("gsm8k", "math") and not (module and name):
        yield (
            f"reward.function is '{reward.function}', expected 'gsm8k', 'math' or "
            "'package.module:function'"
        )


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
