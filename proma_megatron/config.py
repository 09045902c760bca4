"""The run's configuration: every key with its type, its default and what it must agree with.

`config_file.load_config` reads one from YAML. Every failure is a `ConfigError` of one sentence that
names the value, what was expected and the fix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)


class ConfigError(ValueError):
    """A configuration that can't run; the message is complete and meant for the user."""


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]  # a shell leaves key=~/x as it is
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class ComputeConfig(Section):
    """How a model is computed, whatever its shape."""

    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    recompute: Literal["none", "full"] = "none"


class ModelConfig(ComputeConfig):
    """A Qwen3- or Qwen2-shaped decoder.

    With ``path``, a Hugging Face directory, weights come from there and the shape from its
    config.json: keys of the shape need not be given, and may not differ.
    """

    path: UserPath | None = None
    vocab_size: PositiveInt | None = None  # rows of the embedding; null: the tokenizer's
    hidden_size: PositiveInt = 128
    ffn_hidden_size: PositiveInt = 384
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    head_dim: PositiveInt = 32
    qk_norm: bool = True  # Qwen3
    qkv_bias: bool = False  # Qwen2 and Qwen2.5
    tie_embeddings: bool = True
    rope_base: PositiveFloat = 1_000_000.0
    norm_eps: PositiveFloat = 1e-6
    init_std: PositiveFloat = 0.02


class ParallelConfig(Section):
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    # Model chunks per pipeline stage; null: no interleaving.
    virtual_pipeline: Annotated[int, Field(ge=2)] | None = None
    sequence: bool = False
    data: PositiveInt | None = None  # None: 1, or what torchrun or srun started

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the policy."""
        return self.tensor * self.pipeline

    @property
    def world_size(self) -> int:
        """Ranks of all replicas; one replica where the number is left open."""
        return self.model_size * (self.data or 1)


class TokenizerConfig(Section):
    # A SentencePiece .model file, or a directory with a Hugging Face tokenizer. Null: that of
    # model.path; without one, a SentencePiece model trained from the task's own text.
    path: UserPath | None = None
    vocab_size: PositiveInt = 320  # of a tokenizer that is trained here


class PromptConfig(Section):
    """How a question becomes the text that the policy continues."""

    # "auto": the tokenizer's chat template where it has one, else "Question: ... Answer:".
    template: Literal["auto", "chat", "plain"] = "auto"
    thinking: bool = False  # a chat template's enable_thinking
    system: str | None = None  # a system message before the question
    instruction: str | None = None  # follows a question, after a space; chats of the data stay


class ColumnsConfig(Section):
    """Columns of data files; a dot reaches into a column. Null: GSM8K's own, or verl's."""

    prompt: str | None = None  # a text, or chat messages
    answer: str | None = None  # the reference answer
    solution: str | None = None  # a worked answer, for the warm start


class DataConfig(Section):
    train_problems: PositiveInt = 20_000
    validation_problems: PositiveInt = 128
    largest_number: Annotated[int, Field(ge=2)] = 50  # in a generated question
    solution_steps: Literal[1, 2] = 2  # lines of arithmetic in a generated solution, at most
    train_file: UserPath | None = None  # JSONL or parquet, instead of the generator
    validation_file: UserPath | None = None
    columns: ColumnsConfig = ColumnsConfig()
    seed: int = 0


class RolloutConfig(Section):
    prompts_per_step: PositiveInt = 16
    samples_per_prompt: PositiveInt = 8
    temperature: PositiveFloat = 1.0
    top_k: NonNegativeInt = 0  # 0: off
    top_p: Fraction = 1.0
    max_prompt_tokens: PositiveInt = 96
    max_new_tokens: PositiveInt = 48
    batch_size: PositiveInt = 128  # sequences that decode at the same time on one replica


class RewardConfig(Section):
    """A completion's score, in [0, 1] for the built-in functions, and what is added to it."""

    # "gsm8k": the number after "####"; "math": the last answer in the text, compared by
    # math-verify; or "package.module:function" of (prompt, completion, reference).
    function: str = "gsm8k"
    format_bonus: NonNegativeFloat = 0.0  # for an answer in the form asked for, right or wrong
    format_pattern: str | None = None  # regular expression of that form; null: the function's own
    overlong_penalty: NonNegativeFloat = 0.0  # what a completion loses that meets the length limit
    overlong_buffer: NonNegativeInt = 0  # last tokens over which the penalty grows; 0: at once
    timeout_seconds: PositiveFloat = 5.0  # for one sample, which scores 0 when it runs out
    workers: PositiveInt = 2  # scoring processes of a replica


class AdvantageConfig(Section):
    normalize_std: bool = False  # divide by the group's standard deviation


class LossConfig(Section):
    """`importance`: weight tokens by the unclipped ratio to the rollout policy (not for grpo).

    "auto" does so when a rollout batch is split into several minibatches; the first update of a
    batch is on-policy and needs none.
    """

    importance: Literal["auto", "on", "off"] = "auto"
    clip_low: NonNegativeFloat = 0.2  # grpo: ratio >= 1 - clip_low
    clip_high: NonNegativeFloat = 0.2  # grpo: ratio <= 1 + clip_high


class ProjectionConfig(Section):
    """The projected accumulation; `rule: none` is Megatron's own accumulation, untouched."""

    rule: Literal["exact", "iterative", "ridge", "none"] = "exact"
    bound: NonNegativeFloat | None = 0.5  # removed part at most bound * |P|; null: unbounded
    shrinkage: Annotated[float, Field(ge=0, le=1)] = 1.0
    parameters: Literal["all", "linear"] = "all"
    unit: Literal["huggingface", "megatron"] = "huggingface"
    data_parallel: Literal["replica"] = "replica"
    workspace_mb: PositiveInt = 512  # for materialized sequence gradients of one layer

    @property
    def active(self) -> bool:
        """Whether anything can be removed; if not, Megatron's own accumulation runs."""
        return self.rule != "none" and self.shrinkage > 0 and self.bound != 0


class BatchingConfig(Section):
    tokens_per_microbatch: PositiveInt = 1024
    # Consecutive sequences instead of a token budget: with samples_per_prompt of them, a
    # microbatch is one prompt's group.
    sequences_per_microbatch: PositiveInt | None = None
    minibatches: PositiveInt = 1  # optimizer steps per rollout batch


class OptimizerConfig(Section):
    lr: PositiveFloat = 1e-3
    min_lr: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: NonNegativeFloat = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = 1.0  # 0: off
    distributed: bool = False  # shard optimizer state over data-parallel ranks


class WarmStartConfig(Section):
    """Supervised steps on worked answers before RL; 0 steps start RL from the initial weights."""

    steps: NonNegativeInt = 0
    sequences_per_step: PositiveInt = 64
    guesses: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of demonstrations without the work
    lr: PositiveFloat = 2e-3
    warmup_steps: NonNegativeInt = 10
    decay: Literal["constant", "linear", "cosine"] = "cosine"


class ProcessConfig(Section):
    """The worker processes."""

    timeout_minutes: PositiveFloat = 10.0  # of one collective
    threads: PositiveInt = 1  # CPU threads per process, where there is no GPU


class EvaluationConfig(Section):
    """How `proma eval` and validation sample."""

    samples: PositiveInt = 1  # of a problem
    # Null: 0, which is greedy, for one sample, and rollout.temperature for several.
    temperature: NonNegativeFloat | None = None
    top_k: NonNegativeInt = 0
    top_p: Fraction = 1.0


class TrainerConfig(ProcessConfig):
    steps: PositiveInt = 50
    eval_every: NonNegativeInt = 20  # accuracy on the validation split; 0: only before and after
    kl_every: NonNegativeInt = 1  # KL to the policy that RL started from; 0: only at the end
    save_every: NonNegativeInt = 0  # 0: only before RL and after the last step
    log_samples: NonNegativeInt = 4  # rollouts written to samples.jsonl each step


TRAINING = {"purpose": "training"}  # validation context: a policy may also only be read


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    root: UserPath = Path("runs")
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    algorithm: Literal["proma", "reinforce", "grpo"] = "proma"
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    prompt: PromptConfig = PromptConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    projection: ProjectionConfig = ProjectionConfig()
    batching: BatchingConfig = BatchingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    trainer: TrainerConfig = TrainerConfig()

    @property
    def run_dir(self) -> Path:
        return self.root / self.name

    @property
    def projects(self) -> bool:
        """Whether weight gradients go through the projected accumulator."""
        return self.algorithm == "proma" and self.projection.active

    @property
    def max_sequence_length(self) -> int:
        return self.rollout.max_prompt_tokens + self.rollout.max_new_tokens

    @model_validator(mode="after")
    def _check_together(self, info: ValidationInfo) -> RunConfig:
        for problem in _layout_problems(self.model, self.parallel):
            raise ValueError(problem)
        for problem in _run_problems(self):
            raise ValueError(problem)
        if info.context == TRAINING:
            for problem in _training_problems(self):
                raise ValueError(problem)
        return self


class GradientsConfig(Section):
    """What `proma grads` and `proma verify` take as overrides; the names are the run's."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0  # of random weights and batches
    model: ComputeConfig = ComputeConfig()
    parallel: ParallelConfig = ParallelConfig()
    projection: ProjectionConfig = ProjectionConfig()
    trainer: ProcessConfig = ProcessConfig()


# What the configuration names need not be there for it to be valid: a run can be planned before its
# data are.


def check_data_files(config: RunConfig) -> None:
    """Whether the data files that the configuration names are there; ConfigError if not."""
    for key, path in (
        ("data.train_file", config.data.train_file),
        ("data.validation_file", config.data.validation_file),
    ):
        if path is not None and not path.is_file():
            raise ConfigError(f"{key} is {path}, expected a file that exists; check the path")


def check_model_files(config: RunConfig) -> None:
    """Whether model and tokenizer that the configuration names are there; ConfigError if not."""
    if config.tokenizer.path is not None and not config.tokenizer.path.exists():
        raise ConfigError(
            f"tokenizer.path is {config.tokenizer.path}, which does not exist; check the path"
        )
    path = config.model.path
    if path is not None and not path.is_dir():
        raise ConfigError(
            f"model.path is {path}, expected a directory with a Hugging Face model; download it, "
            f"for example with `hf download Qwen/{path.name} --local-dir {path}`"
        )


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Whether this model can be cut into this layout; ConfigError if not."""
    for problem in _layout_problems(model, parallel):
        raise ConfigError(problem)


def _layout_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
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


def _training_problems(config: RunConfig) -> Iterator[str]:
    """What keeps an RL step from being cut into prompts, groups and microbatches."""
    batch, rollout = config.batching, config.rollout
    budgeted = batch.sequences_per_microbatch is None
    if budgeted and batch.tokens_per_microbatch < config.max_sequence_length:
        yield (
            f"batching.tokens_per_microbatch is {batch.tokens_per_microbatch}, but a sequence may "
            f"have {config.max_sequence_length} tokens (rollout.max_prompt_tokens + "
            f"rollout.max_new_tokens); use at least {config.max_sequence_length}"
        )
    if rollout.samples_per_prompt < 2:
        yield (
            f"rollout.samples_per_prompt is {rollout.samples_per_prompt}, expected at least 2: "
            "advantages are relative to the other samples of a prompt"
        )
    data_parallel = config.parallel.data or 1
    if rollout.prompts_per_step % (data_parallel * batch.minibatches):
        yield (
            f"rollout.prompts_per_step is {rollout.prompts_per_step}, expected a multiple of "
            f"parallel.data x batching.minibatches = {data_parallel * batch.minibatches}"
        )


def _run_problems(config: RunConfig) -> Iterator[str]:
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
