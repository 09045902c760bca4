"""Every key of a configuration, with its type and its default, in sections.

`checks` and `combinations` say what keys must agree on, `run` joins them, and `loading.load_config`
reads a configuration from YAML. Every failure is a `ConfigError` of one sentence that names the
value, what was expected and the fix.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
)

from proma_megatron.config.choices import ACCUMULATIONS, ALGORITHMS, ESTIMATORS, LOSSES, RULES

if TYPE_CHECKING:  # a type checker can't look into the tables, as pydantic does
    Algorithm = Rule = LossKind = Estimator = str
else:
    Algorithm, Rule = Literal[*ALGORITHMS], Literal[*RULES]
    LossKind, Estimator = Literal[*LOSSES], Literal[*ESTIMATORS]

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

    dtype: Literal["float64", "float32", "bfloat16"] = Field(
        default="float32",
        description=(
            "Of weights and activations; gradients accumulate in float32, or float64 with float64."
        ),
    )
    recompute: Literal["none", "full"] = Field(
        default="none",
        description=(
            "Activations that are computed again in backward instead of being kept: none, or "
            "all but each layer's input."
        ),
    )
    backend: Literal["auto", "torch", "transformer_engine"] = Field(
        default="auto",
        description=(
            "Whose linear layers and attention: Megatron-Core's on torch, or Transformer "
            "Engine's. auto takes Transformer Engine in bfloat16 where a GPU and a tested "
            "version of it are there."
        ),
    )
    fp8: Literal["none", "current", "delayed", "blockwise", "mxfp8"] = Field(
        default="none",
        description=(
            "Recipe of the layers' products, forward and towards the input, in training "
            "passes; rollouts stay in bfloat16. current, delayed: a scale a tensor; blockwise: "
            "a block of 128; mxfp8: of 32."
        ),
    )
    fp8_skip_first: NonNegativeInt = Field(
        default=0, description="Layers at the start that stay in bfloat16."
    )
    fp8_skip_last: NonNegativeInt = Field(
        default=0, description="Layers at the end that stay in bfloat16."
    )

    @property
    def fp8_skipped(self) -> int:
        """Layers that stay in bfloat16 with a recipe."""
        return self.fp8_skip_first + self.fp8_skip_last


class ModelConfig(ComputeConfig):
    """A Qwen3- or Qwen2-shaped decoder.

    With ``path``, a Hugging Face directory, weights come from there and the shape from its
    config.json: keys of the shape need not be given, and may not differ.
    """

    path: UserPath | None = Field(
        default=None,
        description=(
            "Hugging Face directory with weights and shape; null: random weights of the shape "
            "below."
        ),
    )
    vocab_size: PositiveInt | None = Field(
        default=None, description="Rows of the embedding; null: the tokenizer's."
    )
    hidden_size: PositiveInt = Field(default=128, description="Width of the residual stream.")
    ffn_hidden_size: PositiveInt = Field(
        default=384, description="Width of the feed-forward layers."
    )
    layers: PositiveInt = Field(default=4, description="Number of transformer layers.")
    heads: PositiveInt = Field(default=4, description="Attention heads, of queries.")
    kv_heads: PositiveInt = Field(default=2, description="Attention heads of keys and values.")
    head_dim: PositiveInt = Field(default=32, description="Width of one attention head.")
    qk_norm: bool = Field(
        default=True, description="RMSNorm on queries and keys of each head, as in Qwen3."
    )
    qkv_bias: bool = Field(
        default=False, description="Biases of queries, keys and values, as in Qwen2 and Qwen2.5."
    )
    tie_embeddings: bool = Field(
        default=True, description="Whether embedding and head are one table."
    )
    rope_base: PositiveFloat = Field(
        default=1_000_000.0, description="Base of the rotary embedding."
    )
    norm_eps: PositiveFloat = Field(
        default=1e-6, description="Added to the mean square in RMSNorm."
    )
    init_std: PositiveFloat = Field(
        default=0.02, description="Standard deviation of random initial weights."
    )


class ParallelConfig(Section):
    tensor: PositiveInt = Field(default=1, description="Ranks that share each layer's weights.")
    pipeline: PositiveInt = Field(default=1, description="Stages that the layers are cut into.")
    virtual_pipeline: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="Model chunks per pipeline stage; null: no interleaving."
    )
    sequence: bool = Field(
        default=False,
        description=(
            "Sequence parallelism: norms and residual stream cut along the tokens of tensor ranks."
        ),
    )
    data: PositiveInt | None = Field(
        default=None,
        description="Replicas of the policy; null: 1, or what torchrun or srun started.",
    )

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the policy."""
        return self.tensor * self.pipeline

    @property
    def world_size(self) -> int:
        """Ranks of all replicas; one replica where the number is left open."""
        return self.model_size * (self.data or 1)


class TokenizerConfig(Section):
    path: UserPath | None = Field(
        default=None,
        description=(
            "A SentencePiece .model file, or a directory with a Hugging Face tokenizer. Null: "
            "that of model.path; without one, a SentencePiece model trained from the task's "
            "own text."
        ),
    )
    vocab_size: PositiveInt = Field(
        default=320, description="Tokens of a tokenizer that is trained here."
    )


class PromptConfig(Section):
    """How a question becomes the text that the policy continues."""

    template: Literal["auto", "chat", "plain"] = Field(
        default="auto",
        description=(
            'auto: the tokenizer\'s chat template where it has one, else "Question: ... Answer:".'
        ),
    )
    thinking: bool = Field(default=False, description="A chat template's enable_thinking.")
    system: str | None = Field(
        default=None, description="A system message before the question; null: none."
    )
    instruction: str | None = Field(
        default=None,
        description="Follows a question, after a space; chats of the data stay as they are.",
    )


class ColumnsConfig(Section):
    """Columns of data files; a dot reaches into a column. Null: GSM8K's own, or verl's."""

    prompt: str | None = Field(default=None, description="A text, or chat messages.")
    answer: str | None = Field(default=None, description="The reference answer.")
    solution: str | None = Field(default=None, description="A worked answer, for the warm start.")


class DataConfig(Section):
    train_problems: PositiveInt = Field(
        default=20_000, description="Generated problems to train on, where there is no train_file."
    )
    validation_problems: PositiveInt = Field(
        default=128,
        description="Generated problems to validate on, where there is no validation_file.",
    )
    largest_number: Annotated[int, Field(ge=2)] = Field(
        default=50, description="Largest number in a generated question."
    )
    solution_steps: Literal[1, 2] = Field(
        default=2, description="Lines of arithmetic in a generated solution, at most."
    )
    train_file: UserPath | None = Field(
        default=None, description="JSONL or parquet file of problems, instead of the generator."
    )
    validation_file: UserPath | None = Field(default=None, description="The same for validation.")
    columns: ColumnsConfig = Field(
        default=ColumnsConfig(), description="Columns of the data files."
    )
    seed: int = Field(default=0, description="Seed of generated problems.")


class RolloutConfig(Section):
    prompts_per_step: PositiveInt = Field(
        default=16, description="Prompts of an RL step, of all replicas together."
    )
    samples_per_prompt: PositiveInt = Field(
        default=8, description="Completions of each prompt: a group."
    )
    temperature: PositiveFloat = Field(default=1.0, description="Of sampling.")
    top_k: NonNegativeInt = Field(
        default=0, description="Sample from so many most likely tokens; 0: off."
    )
    top_p: Fraction = Field(
        default=1.0,
        description=(
            "Sample from the most likely tokens that have this probability together; 1: off."
        ),
    )
    max_prompt_tokens: PositiveInt = Field(
        default=96, description="Longest prompt; longer ones are dropped."
    )
    max_new_tokens: PositiveInt = Field(default=48, description="Longest completion.")
    batch_size: PositiveInt = Field(
        default=128, description="Sequences that decode at the same time on one replica."
    )
    resampling_rounds: NonNegativeInt = Field(
        default=0,
        description=(
            "Further rounds of prompts in place of groups whose rewards are all equal (DAPO's "
            "dynamic sampling); what is missing after the last round is filled with such "
            "groups. 0: off."
        ),
    )


class RewardConfig(Section):
    """A completion's score, in [0, 1] for the built-in functions, and what is added to it."""

    function: str = Field(
        default="gsm8k",
        description=(
            '"gsm8k": the number after "####"; "math": the last answer in the text, compared '
            'by math-verify; or "package.module:function" of (prompt, completion, reference).'
        ),
    )
    format_bonus: NonNegativeFloat = Field(
        default=0.0, description="Added for an answer in the form asked for, right or wrong."
    )
    format_pattern: str | None = Field(
        default=None, description="Regular expression of that form; null: the function's own."
    )
    overlong_penalty: NonNegativeFloat = Field(
        default=0.0, description="What a completion loses that meets the length limit."
    )
    overlong_buffer: NonNegativeInt = Field(
        default=0, description="Last tokens over which the penalty grows; 0: at once."
    )
    timeout_seconds: PositiveFloat = Field(
        default=5.0, description="For one sample, which scores 0 when it runs out."
    )
    workers: PositiveInt = Field(default=2, description="Scoring processes of a replica.")


class AdvantageConfig(Section):
    """How rewards become advantages; `advantages/` has the formulas."""

    estimator: Estimator = Field(
        default="group", description="Which estimator, see the guide's page on algorithms."
    )
    normalize_std: bool | None = Field(
        default=None,
        description=(
            "Divide by the standard deviation: of the group (group, stratified: of the "
            "stratum), of the other samples (leave_one_out). Null: only reinforce_plus_plus "
            "does, by the batch's."
        ),
    )
    stratum: Literal["finished", "timed_out", "length"] = Field(
        default="length", description="Key of a sample that stratified compares within."
    )
    blend: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0,
        description="stratified: the share of its own advantage; the rest is the group's.",
    )


class KLConfig(Section):
    """A penalty on the divergence from a reference policy; the coefficient 0 turns it off.

    With ``target`` the coefficient is halved after a step whose divergence was below target / 1.5,
    and doubled after one above 1.5 * target (PPO, arXiv:1707.06347, section 4).
    """

    coefficient: NonNegativeFloat = Field(default=0.0, description="Of the penalty; 0: off.")
    estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="Estimator of the divergence from single tokens."
    )
    place: Literal["loss", "reward"] = Field(
        default="loss", description="Whether it is a term of the loss, or taken from the reward."
    )
    reference: Literal["initial", "rollout"] = Field(
        default="initial",
        description=(
            "initial: the policy that RL started from; rollout: the one that sampled, as PPO does."
        ),
    )
    target: PositiveFloat | None = Field(
        default=None, description="Divergence that the coefficient is adapted to; null: it stays."
    )


class LossConfig(Section):
    """The policy loss. Null stands for the algorithm's own, see `choices.py`."""

    kind: LossKind | None = Field(
        default=None,
        description=(
            "proma, intra_proma and isopo take reinforce, or another that their accumulation "
            "can carry."
        ),
    )
    importance: Literal["auto", "on", "off"] = Field(
        default="auto",
        description=(
            "reinforce: weight tokens by the unclipped ratio to the rollout policy. auto does "
            "so when a rollout batch is split into several minibatches; the first update of a "
            "batch is on-policy."
        ),
    )
    clip: bool = Field(
        default=True, description="False: the unclipped surrogate, as with PPO's KL penalty."
    )
    clip_low: NonNegativeFloat | None = Field(
        default=None, description="Clips the ratio at 1 - clip_low from below."
    )
    clip_high: NonNegativeFloat | None = Field(
        default=None, description="Clips the ratio at 1 + clip_high from above."
    )
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description=(
            "Bounds the loss at this multiple of the advantage where that is negative; null: off."
        ),
    )
    ratio: Literal["token", "sequence"] | None = Field(
        default=None, description="What is clipped: the ratio of a token or of a sequence."
    )
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] | None = Field(
        default=None, description="How token losses become one number."
    )
    aggregation_constant: PositiveFloat | None = Field(
        default=None,
        description=(
            "sequence_sum: what the sum of a sequence's tokens is divided by; null: max_new_tokens."
        ),
    )
    entropy: NonNegativeFloat = Field(default=0.0, description="Coefficient of the entropy bonus.")
    kl: KLConfig = Field(
        default=KLConfig(), description="A penalty on the divergence from a reference policy."
    )
    mismatch: Literal["off", "token", "sequence"] = Field(
        default="off",
        description=(
            "Weight tokens by pi_trainer / pi_generator of the sampling policy, truncated at "
            "mismatch_cap, by token or by sequence; the trainer's log-probabilities cost a "
            "forward pass a step."
        ),
    )
    mismatch_cap: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        default=2.0, description="Largest such weight."
    )


class ProjectionConfig(Section):
    """What happens to gradients while they accumulate; `rule: none` is Megatron's own way.

    exact, iterative and ridge are PROMA's: they project what has been accumulated. subspace is
    Intra-PROMA's: it projects the microbatch's own gradient. norm and kernel are ISOPO's: they
    change the advantages of a microbatch by unit. Only what a rule uses counts.
    """

    rule: Rule = Field(
        default="exact", description="Which rule; in a run without one: the algorithm's own."
    )
    bound: NonNegativeFloat | None = Field(
        default=0.5,
        description=(
            "Removed part at most bound * |P|, P the microbatch's own gradient; null: unbounded."
        ),
    )
    rank: PositiveInt = Field(
        default=8, description="subspace: dimension of each dominant subspace."
    )
    sides: Literal["both", "input", "output"] = Field(
        default="both", description="subspace: whose directions are removed."
    )
    regularization: PositiveFloat = Field(
        default=1.0, description="kernel, norm: relative to the mean eigenvalue of K."
    )
    shrinkage: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0, description="Share of the removed part that is removed."
    )
    parameters: Literal["all", "linear"] = Field(
        default="all",
        description="Which parameters are projected; linear: weights of linear layers only.",
    )
    unit: Literal["huggingface", "megatron"] = Field(
        default="huggingface",
        description=(
            "What is projected together: tensors as Hugging Face names them, or as Megatron "
            "fuses them."
        ),
    )
    data_parallel: Literal["replica"] = Field(
        default="replica",
        description=(
            "With several replicas: each runs its own chain over its microbatches, and the "
            "chains are added."
        ),
    )
    workspace_mb: PositiveInt = Field(
        default=512, description="Half for sequence gradients of one layer, half for blocks."
    )
    gradients: Literal["auto", "materialize", "stream"] = Field(
        default="auto",
        description=(
            "Sequence gradients of a weight: kept until the layer is solved where they fit "
            "(materialize), formed in passing (stream), or what was measured to be faster "
            "(auto)."
        ),
    )

    fp8_operands: Literal["bfloat16", "fp8"] = Field(
        default="bfloat16",
        description=(
            "With model.fp8: what sequence gradients are formed from, inputs and output "
            "gradients of layers as they were, or as FP8 has them."
        ),
    )
    fp8_gate_every: NonNegativeInt = Field(
        default=50,
        description=(
            "With model.fp8: steps between comparisons of one microbatch's K and c from both "
            "kinds of operands; 0: only the first step."
        ),
    )
    fp8_gate_beta: PositiveFloat = Field(
        default=0.2, description="Warn when the median relative error of beta is above this."
    )
    fp8_gate_cosine: Fraction = Field(
        default=0.99,
        description="Warn when the cosine between both accumulated gradients is below this.",
    )

    @property
    def acts_alone(self) -> bool:
        """Whether the rule changes a microbatch's own gradient, whatever came before it."""
        return RULES[self.rule].acts_on in ("microbatch", "advantages")

    @property
    def by_subspaces(self) -> bool:
        """Whether the rule works on Linear layers' inputs and output gradients, without K."""
        return RULES[self.rule].solved_from == "subspaces"

    @property
    def active(self) -> bool:
        """Whether anything can change; if not, Megatron's own accumulation runs."""
        acts_on = RULES[self.rule].acts_on
        if acts_on == "advantages":
            return True
        return acts_on is not None and self.shrinkage > 0 and self.bound != 0


class BatchingConfig(Section):
    tokens_per_microbatch: PositiveInt = Field(
        default=1024, description="Largest number of tokens of a microbatch."
    )
    sequences_per_microbatch: PositiveInt | None = Field(
        default=None,
        description=(
            "Consecutive sequences instead of a token budget: with samples_per_prompt of them, "
            "a microbatch is one prompt's group. Null: the token budget."
        ),
    )
    minibatches: PositiveInt = Field(default=1, description="Optimizer steps per rollout batch.")
    zero_advantage: Literal["keep", "drop"] = Field(
        default="keep",
        description=(
            "A sequence of advantage 0 adds nothing to the policy loss, but what others "
            "accumulated is made orthogonal to it, as in the paper. drop saves its forward and "
            "backward; entropy and mismatch are then measured on the others only."
        ),
    )


class OptimizerConfig(Section):
    lr: PositiveFloat = Field(default=1e-3, description="Learning rate of RL, after its warmup.")
    min_lr: NonNegativeFloat = Field(default=0.0, description="Where a decay ends.")
    warmup_steps: NonNegativeInt = Field(
        default=0, description="Optimizer steps over which the rate rises from 0."
    )
    decay: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="How the rate falls after the warmup."
    )
    weight_decay: NonNegativeFloat = Field(default=0.0, description="AdamW's.")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Decay of Adam's first moment."
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.95, description="Decay of Adam's second moment."
    )
    eps: PositiveFloat = Field(
        default=1e-8, description="Added to the root of Adam's second moment."
    )
    clip_grad: NonNegativeFloat = Field(
        default=1.0, description="Largest norm of the gradient; 0: off."
    )
    distributed: bool = Field(
        default=False, description="Shard optimizer state over data-parallel ranks."
    )


class WarmStartConfig(Section):
    """Supervised steps on worked answers before RL; 0 steps start RL from the initial weights."""

    steps: NonNegativeInt = Field(default=0, description="Supervised steps; 0: none.")
    sequences_per_step: PositiveInt = Field(default=64, description="Demonstrations of a step.")
    guesses: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Share of demonstrations without the work."
    )
    lr: PositiveFloat = Field(default=2e-3, description="Learning rate, after its warmup.")
    warmup_steps: NonNegativeInt = Field(
        default=10, description="Steps over which the rate rises from 0."
    )
    decay: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="How the rate falls after the warmup."
    )


class ProcessConfig(Section):
    """The worker processes."""

    timeout_minutes: PositiveFloat = Field(
        default=10.0, description="Longest time of one collective."
    )
    threads: PositiveInt = Field(
        default=1, description="CPU threads per process, where there is no GPU."
    )


class EvaluationConfig(Section):
    """How `proma eval` and validation sample."""

    samples: PositiveInt = Field(default=1, description="Completions of a problem.")
    temperature: NonNegativeFloat | None = Field(
        default=None,
        description="Null: 0 (greedy) for one sample, and rollout.temperature for several.",
    )
    top_k: NonNegativeInt = Field(
        default=0, description="Sample from so many most likely tokens; 0: off."
    )
    top_p: Fraction = Field(
        default=1.0,
        description=(
            "Sample from the most likely tokens that have this probability together; 1: off."
        ),
    )


class PhaseMinutes(Section):
    """How long a phase may take before the run is taken for hung, and ends; null: for ever.

    Each time that it is entered: a rollout of one round of prompts, one step of the warm start.
    """

    setup: PositiveFloat | None = Field(
        default=60.0, description="Tokenizer, data, model, weights."
    )
    warm_start: PositiveFloat | None = Field(default=60.0, description="One supervised step.")
    rollout: PositiveFloat | None = Field(
        default=120.0, description="Sampling of one round of prompts."
    )
    score: PositiveFloat | None = Field(
        default=60.0, description="Rewards of one round of prompts."
    )
    reference: PositiveFloat | None = Field(
        default=60.0, description="Log-probabilities of other policies."
    )
    train: PositiveFloat | None = Field(
        default=120.0, description="Passes and optimizer steps of an RL step."
    )
    kl: PositiveFloat | None = Field(
        default=60.0, description="Divergences of a step, also to the lagged policy."
    )
    validation: PositiveFloat | None = Field(default=120.0, description="One validation.")
    save: PositiveFloat | None = Field(default=60.0, description="One checkpoint.")


class TrainerConfig(ProcessConfig):
    steps: NonNegativeInt = Field(default=50, description="RL steps; 0: only the warm start.")
    max_minutes: PositiveFloat | None = Field(
        default=None,
        description=(
            "Minutes since the start after which the run has saved and stopped; exit code 75. "
            "Null: none."
        ),
    )
    phase_minutes: PhaseMinutes = Field(
        default=PhaseMinutes(), description="How long a phase may take."
    )
    eval_every: NonNegativeInt = Field(
        default=20,
        description="Steps between accuracies on the validation split; 0: only before and after.",
    )
    kl_every: NonNegativeInt = Field(
        default=1,
        description=(
            "Steps between measurements of the KL to the policy that RL started from, a "
            "forward pass each; 0: only at the end."
        ),
    )
    kl_step_every: NonNegativeInt = Field(
        default=0,
        description=(
            "Steps between measurements of the KL from before a step to after it, a forward "
            "pass each; 0: never."
        ),
    )
    kl_lagged_every: NonNegativeInt = Field(
        default=0,
        description=(
            "Steps between measurements of the KL to the mean of the weights of the last "
            "lag_steps steps, a forward pass each and a copy in host memory; 0: never."
        ),
    )
    lag_steps: PositiveInt = Field(default=40, description="Steps that this mean is over.")
    save_every: NonNegativeInt = Field(
        default=0,
        description="Steps between checkpoints; 0: only before RL and after the last step.",
    )
    save_in_background: bool = Field(
        default=True, description="Train on while a checkpoint is written; false: wait for it."
    )
    keep_last: PositiveInt | None = Field(
        default=None, description="Complete checkpoints that stay; null: all."
    )
    keep_best: NonNegativeInt = Field(
        default=0,
        description=(
            "Checkpoints with the highest validation accuracy, which also stay; 1 or more: "
            "save each new best."
        ),
    )
    max_skipped_steps: PositiveInt = Field(
        default=5,
        description=(
            "Stop after so many steps in a row whose gradients were not finite, with a "
            "checkpoint from before the first of them."
        ),
    )
    log_samples: NonNegativeInt = Field(
        default=4, description="Rollouts written to samples.jsonl each step."
    )
    profile: bool = Field(
        default=False,
        description=(
            "Write where the time goes to logs/: seconds by phase (profile.txt), and a torch "
            "profiler trace of the second RL step, or of the only one. Changes no result."
        ),
    )


# What the configuration names need not be there for it to be valid: a run can be planned before its
# data are.


class RunSections(Section):
    """Every key of a run, each section checked by itself; `run.RunConfig` checks them together."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="Of the run: its directory is root/name."
    )
    root: UserPath = Field(default=Path("runs"), description="Directory of run directories.")
    seed: int = Field(
        default=0,
        description="Seed of random weights, the order of prompts, sampling and the warm start.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where ranks compute; auto: on GPUs where each rank of a node can have one.",
    )
    algorithm: Algorithm = Field(
        default="proma", description="What the run is made of, see the guide's page on algorithms."
    )
    model: ModelConfig = Field(
        default=ModelConfig(), description="Shape, weights, and how they are computed."
    )
    parallel: ParallelConfig = Field(
        default=ParallelConfig(), description="Layout: how the policy is cut over ranks."
    )
    tokenizer: TokenizerConfig = Field(
        default=TokenizerConfig(), description="What turns text into tokens."
    )
    prompt: PromptConfig = Field(
        default=PromptConfig(), description="How a question becomes a prompt."
    )
    data: DataConfig = Field(
        default=DataConfig(), description="Problems to train and to validate on."
    )
    rollout: RolloutConfig = Field(
        default=RolloutConfig(), description="How completions are sampled in training."
    )
    reward: RewardConfig = Field(default=RewardConfig(), description="How a completion is scored.")
    advantage: AdvantageConfig = Field(
        default=AdvantageConfig(), description="How rewards become advantages."
    )
    loss: LossConfig = Field(default=LossConfig(), description="The policy loss.")
    projection: ProjectionConfig = Field(
        default=ProjectionConfig(), description="What happens to gradients while they accumulate."
    )
    batching: BatchingConfig = Field(
        default=BatchingConfig(), description="How sequences become minibatches and microbatches."
    )
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="Megatron's Adam, and its learning rate in RL."
    )
    warm_start: WarmStartConfig = Field(
        default=WarmStartConfig(), description="Supervised steps before RL."
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="Sampling of `proma eval` and of validation."
    )
    trainer: TrainerConfig = Field(
        default=TrainerConfig(), description="Steps, measurements, checkpoints, limits."
    )

    @property
    def run_dir(self) -> Path:
        return self.root / self.name

    @property
    def projects(self) -> bool:
        """Whether weight gradients go through the accumulator."""
        return self.algorithm in ACCUMULATIONS and self.projection.active

    @property
    def max_sequence_length(self) -> int:
        return self.rollout.max_prompt_tokens + self.rollout.max_new_tokens


def loss_kind(config: RunSections) -> str:
    """The policy loss of this run."""
    if config.loss.kind is not None:
        return config.loss.kind
    return "reinforce" if config.algorithm in ACCUMULATIONS else config.algorithm


def normalizes_std(config: RunSections) -> bool:
    """Whether advantages are divided by a standard deviation."""
    chosen = config.advantage.normalize_std
    return ESTIMATORS[config.advantage.estimator].normalizes if chosen is None else chosen
