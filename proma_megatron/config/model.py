"""Keys of the model: how it is computed, its shape, layout and tokenizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from proma_megatron.config.fields import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    UserPath,
)


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
