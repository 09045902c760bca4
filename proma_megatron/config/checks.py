"""What keys of the configuration must agree with: each fault is one sentence for the user.

`config` calls these when a tree is validated; what algorithms, losses and estimators go together is
decided in `algorithms`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from proma_megatron.config.choices import REWARDS, expected_reward
from proma_megatron.config.combinations import combination_problems, estimator_problems
from proma_megatron.config.fp8 import RECIPES
from proma_megatron.config.model import ComputeConfig, ModelConfig, ParallelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.config.rollout import RewardConfig
from proma_megatron.config.sections import RunSections


def layout_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Yield what keeps this model from being cut into this layout."""
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
    yield from fp8_shape_problems(model, parallel)
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


def precision_problems(
    model: ComputeConfig, projection: ProjectionConfig, *, projects: bool
) -> Iterator[str]:
    """Yield where dtype, backend, FP8 recipe and operands of the projection disagree.

    Args:
        projects: whether sequence gradients are formed at all.
    """
    te = model.backend == "transformer_engine"
    if te and model.dtype != "bfloat16":
        yield (
            f"model.backend is 'transformer_engine' with model.dtype={model.dtype}, whose layers "
            "are used in bfloat16; use model.dtype=bfloat16, or model.backend=torch"
        )
    if model.fp8 == "none":
        if model.fp8_skipped:
            yield (
                f"model.fp8_skip_first + model.fp8_skip_last is {model.fp8_skipped} with "
                "model.fp8=none; choose a recipe, or leave them at 0"
            )
        if projection.fp8_operands == "fp8":
            yield (
                "projection.fp8_operands is 'fp8' with model.fp8=none; choose a recipe, or use "
                "projection.fp8_operands=bfloat16"
            )
        return
    if model.dtype != "bfloat16":
        yield (
            f"model.fp8 is '{model.fp8}' with model.dtype={model.dtype}, but FP8 layers take and "
            "give bfloat16; use model.dtype=bfloat16, or model.fp8=none"
        )
    if model.backend == "torch":
        yield (
            f"model.fp8 is '{model.fp8}' with model.backend=torch, which has no FP8 layers; use "
            "model.backend=transformer_engine or auto, or model.fp8=none"
        )
    if model.fp8 == "delayed" and model.fp8_skipped:
        yield (
            "model.fp8 is 'delayed' with layers that stay in bfloat16 (model.fp8_skip_first, "
            "model.fp8_skip_last), which Megatron-Core refuses; set both to 0, or use "
            "model.fp8=current"
        )
    if projects and projection.by_subspaces and projection.fp8_operands == "fp8":
        yield (
            f"projection.rule is '{projection.rule}' with projection.fp8_operands=fp8, whose "
            "rounding hides the directions that it looks for; use projection.fp8_operands=bfloat16"
        )


def fp8_shape_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Yield which dimensions of this model's layers, on one rank, the FP8 recipe does not take."""
    if model.fp8 == "none":
        return
    multiple, tp = RECIPES[model.fp8].alignment, parallel.tensor
    groups = max(1, model.kv_heads // tp)
    widths = {
        "model.hidden_size": model.hidden_size,
        "model.heads x model.head_dim / parallel.tensor": model.heads * model.head_dim // tp,
        "queries, keys and values of a rank": (model.heads // tp + 2 * groups) * model.head_dim,
        "model.ffn_hidden_size / parallel.tensor": model.ffn_hidden_size // tp,
    }
    for what, width in widths.items():
        if width % multiple:
            yield (
                f"{what} is {width}, expected a multiple of {multiple} for model.fp8={model.fp8}; "
                "use another shape or a smaller parallel.tensor, another recipe, or model.fp8=none"
            )
    stage = model.layers // parallel.pipeline
    for key, skipped in (
        ("model.fp8_skip_first", model.fp8_skip_first),
        ("model.fp8_skip_last", model.fp8_skip_last),
    ):
        if skipped > stage:
            yield (
                f"{key} is {skipped}, expected at most the {stage} layers of a pipeline stage; "
                f"use {stage} or fewer, or a smaller parallel.pipeline"
            )
    if model.fp8_skipped >= model.layers:
        yield (
            f"model.fp8_skip_first + model.fp8_skip_last is {model.fp8_skipped} of {model.layers} "
            "layers, so that none computes in FP8; lower them, or use model.fp8=none"
        )


def training_problems(config: RunSections) -> Iterator[str]:
    """Yield what keeps an RL step from being cut into prompts, groups and microbatches."""
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


def run_problems(config: RunSections) -> Iterator[str]:
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
    yield from precision_problems(config.model, config.projection, projects=config.projects)
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
    if reward.function not in REWARDS and not (module and name):
        yield f"reward.function is '{reward.function}', expected {expected_reward()}"


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
