"""Every key of a configuration, with its type and its default, in sections.

`checks` and `combinations` say what keys must agree on, `run` joins them, and `loading.load_config`
reads a configuration from YAML. Every failure is a `ConfigError` of one sentence that names the
value, what was expected and the fix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
)

from proma_megatron.config.choices import RULES

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
    # Whose linear layers and attention: Megatron-Core's on torch, or Transformer Engine's. "auto"
    # takes Transformer Engine in bfloat16 where a GPU and a tested version of it are there.
    backend: Literal["auto", "torch", "transformer_engine"] = "auto"
    # Recipe of the layers' products, forward and towards the input, in training passes; rollouts
    # stay in bfloat16. current, delayed: a scale a tensor; blockwise: a block of 128; mxfp8: of 32.
    fp8: Literal["none", "current", "delayed", "blockwise", "mxfp8"] = "none"
    fp8_skip_first: NonNegativeInt = 0  # layers at the start that stay in bfloat16
    fp8_skip_last: NonNegativeInt = 0  # and at the end

    @property
    def fp8_skipped(self) -> int:
        """Layers that stay in bfloat16 with a recipe."""
        return self.fp8_skip_first + self.fp8_skip_last


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
    # Further rounds of prompts in place of groups whose rewards are all equal (DAPO's dynamic
    # sampling); what is missing after the last round is filled with such groups. 0: off.
    resampling_rounds: NonNegativeInt = 0


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
    """How rewards become advantages; `batching/advantages/` has the formulas."""

    estimator: Literal["group", "rloo", "leave_one_out", "reinforce_plus_plus", "stratified"] = (
        "group"
    )
    # Divide by the standard deviation: of the group (group, stratified: of the stratum), of the
    # other samples (leave_one_out). Null: only reinforce_plus_plus does, by the batch's.
    normalize_std: bool | None = None
    stratum: Literal["finished", "timed_out", "length"] = "length"  # key of a sample; stratified
    blend: Annotated[float, Field(ge=0, le=1)] = 1.0  # stratified: the rest is the group's


class KLConfig(Section):
    """A penalty on the divergence from a reference policy; the coefficient 0 turns it off.

    With ``target`` the coefficient is halved after a step whose divergence was below target / 1.5,
    and doubled after one above 1.5 * target (PPO, arXiv:1707.06347, section 4).
    """

    coefficient: NonNegativeFloat = 0.0
    estimator: Literal["k1", "k2", "k3"] = "k3"
    place: Literal["loss", "reward"] = "loss"
    # "initial": the policy that RL started from; "rollout": the one that sampled, as PPO does.
    reference: Literal["initial", "rollout"] = "initial"
    target: PositiveFloat | None = None


LossKind = Literal["reinforce", "ppo", "grpo", "dr_grpo", "cispo", "gspo"]


class LossConfig(Section):
    """The policy loss. Null stands for the algorithm's own, see `choices.py`."""

    # proma, intra_proma and isopo take reinforce, or another that their accumulation can carry.
    kind: LossKind | None = None
    # reinforce: weight tokens by the unclipped ratio to the rollout policy. "auto" does so when a
    # rollout batch is split into several minibatches; the first update of a batch is on-policy.
    importance: Literal["auto", "on", "off"] = "auto"
    clip: bool = True  # false: the unclipped surrogate, as with PPO's KL penalty
    clip_low: NonNegativeFloat | None = None  # ratio >= 1 - clip_low
    clip_high: NonNegativeFloat | None = None  # ratio <= 1 + clip_high
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    ratio: Literal["token", "sequence"] | None = None  # what is clipped: of a token or a sequence
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] | None = None
    # sequence_sum: what the sum of a sequence's tokens is divided by; null: max_new_tokens.
    aggregation_constant: PositiveFloat | None = None
    entropy: NonNegativeFloat = 0.0  # coefficient of the entropy bonus
    kl: KLConfig = KLConfig()
    # Weight tokens by pi_trainer / pi_generator of the sampling policy, truncated at mismatch_cap,
    # by token or by sequence; the trainer's log-probabilities cost a forward pass a step.
    mismatch: Literal["off", "token", "sequence"] = "off"
    mismatch_cap: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0


Algorithm = Literal[
    "proma", "intra_proma", "isopo", "reinforce", "ppo", "grpo", "dr_grpo", "cispo", "gspo"
]


class ProjectionConfig(Section):
    """What happens to gradients while they accumulate; `rule: none` is Megatron's own way.

    exact, iterative and ridge are PROMA's: they project what has been accumulated. subspace is
    Intra-PROMA's: it projects the microbatch's own gradient. norm and kernel are ISOPO's: they
    change the advantages of a microbatch by unit. Only what a rule uses counts.
    """

    rule: Literal["exact", "iterative", "ridge", "subspace", "norm", "kernel", "none"] = (
        "exact"  # in a run without one: the algorithm's first
    )
    # Removed part at most bound * |P|, P the microbatch's own gradient; null: unbounded.
    bound: NonNegativeFloat | None = 0.5
    rank: PositiveInt = 8  # subspace: dimension of each dominant subspace
    sides: Literal["both", "input", "output"] = "both"  # subspace: whose directions are removed
    regularization: PositiveFloat = 1.0  # kernel, norm: relative to the mean eigenvalue of K
    shrinkage: Annotated[float, Field(ge=0, le=1)] = 1.0
    parameters: Literal["all", "linear"] = "all"
    unit: Literal["huggingface", "megatron"] = "huggingface"
    data_parallel: Literal["replica"] = "replica"
    workspace_mb: PositiveInt = 512  # half for sequence gradients of one layer, half for blocks
    # Sequence gradients of a weight: kept until the layer is solved where they fit (materialize),
    # formed in passing (stream), or what was measured to be faster (auto).
    gradients: Literal["auto", "materialize", "stream"] = "auto"

    # With model.fp8: what sequence gradients are formed from, inputs and output gradients of layers
    # as they were, or as FP8 has them.
    fp8_operands: Literal["bfloat16", "fp8"] = "bfloat16"
    # With model.fp8: steps between comparisons of one microbatch's K and c from both; 0: only the
    # first step. Warn when the median relative error of beta is above fp8_gate_beta, or the cosine
    # between both accumulated gradients below fp8_gate_cosine.
    fp8_gate_every: NonNegativeInt = 50
    fp8_gate_beta: PositiveFloat = 0.2
    fp8_gate_cosine: Fraction = 0.99

    @property
    def acts_alone(self) -> bool:
        """Whether the rule changes a microbatch's own gradient, whatever came before it."""
        return self.rule in (*RULES["intra_proma"], *RULES["isopo"])

    @property
    def active(self) -> bool:
        """Whether anything can change; if not, Megatron's own accumulation runs."""
        if self.rule in RULES["isopo"]:
            return True
        return self.rule != "none" and self.shrinkage > 0 and self.bound != 0


class BatchingConfig(Section):
    tokens_per_microbatch: PositiveInt = 1024
    # Consecutive sequences instead of a token budget: with samples_per_prompt of them, a
    # microbatch is one prompt's group.
    sequences_per_microbatch: PositiveInt | None = None
    minibatches: PositiveInt = 1  # optimizer steps per rollout batch
    # A sequence of advantage 0 adds nothing to the policy loss, but what others accumulated is made
    # orthogonal to it, as in the paper. "drop" saves its forward and backward; entropy and mismatch
    # are then measured on the others only.
    zero_advantage: Literal["keep", "drop"] = "keep"


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


class PhaseMinutes(Section):
    """How long a phase may take before the run is taken for hung, and ends; null: for ever.

    Each time that it is entered: a rollout of one round of prompts, one step of the warm start.
    """

    setup: PositiveFloat | None = 60.0  # tokenizer, data, model, weights
    warm_start: PositiveFloat | None = 60.0
    rollout: PositiveFloat | None = 120.0
    score: PositiveFloat | None = 60.0
    reference: PositiveFloat | None = 60.0
    train: PositiveFloat | None = 120.0
    kl: PositiveFloat | None = 60.0  # also to the lagged policy
    validation: PositiveFloat | None = 120.0
    save: PositiveFloat | None = 60.0


class TrainerConfig(ProcessConfig):
    steps: NonNegativeInt = 50  # 0: only the warm start
    # Minutes since the start after which the run has saved and stopped; exit code 75. Null: none.
    max_minutes: PositiveFloat | None = None
    phase_minutes: PhaseMinutes = PhaseMinutes()
    eval_every: NonNegativeInt = 20  # accuracy on the validation split; 0: only before and after
    # KL to earlier policies, a forward pass each. To the one that RL started from; 0: only at the
    # end.
    kl_every: NonNegativeInt = 1
    kl_step_every: NonNegativeInt = 0  # from before a step to after it; 0: never
    # To the mean of the weights of the last lag_steps steps, a copy in host memory; 0: never.
    kl_lagged_every: NonNegativeInt = 0
    lag_steps: PositiveInt = 40
    # Steps between checkpoints; 0: only before RL and after the last step.
    save_every: NonNegativeInt = 0
    save_in_background: bool = True  # train on while a checkpoint is written; false: wait for it
    keep_last: PositiveInt | None = None  # complete checkpoints that stay; null: all
    # Those with the highest validation accuracy, which also stay; 1 or more: save each new best.
    keep_best: NonNegativeInt = 0
    # Stop after so many steps in a row whose gradients were not finite, with a checkpoint from
    # before the first of them.
    max_skipped_steps: PositiveInt = 5
    log_samples: NonNegativeInt = 4  # rollouts written to samples.jsonl each step
    # Write where the time goes to logs/: seconds by phase (profile.txt), and a torch profiler trace
    # of the second RL step, or of the only one. Changes no result.
    profile: bool = False


# What the configuration names need not be there for it to be valid: a run can be planned before its
# data are.


class RunSections(Section):
    """Every key of a run, each section checked by itself; `run.RunConfig` checks them together."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    root: UserPath = Path("runs")
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    algorithm: Algorithm = "proma"
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
        """Whether weight gradients go through the accumulator."""
        return self.algorithm in RULES and self.projection.active

    @property
    def max_sequence_length(self) -> int:
        return self.rollout.max_prompt_tokens + self.rollout.max_new_tokens


def loss_kind(config: RunSections) -> str:
    """The policy loss of this run."""
    if config.loss.kind is not None:
        return config.loss.kind
    return "reinforce" if config.algorithm in RULES else config.algorithm


def normalizes_std(config: RunSections) -> bool:
    """Whether advantages are divided by a standard deviation."""
    chosen = config.advantage.normalize_std
    return config.advantage.estimator == "reinforce_plus_plus" if chosen is None else chosen
