"""Tiny Hugging Face directories of Qwen2 and Qwen3, written by transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.reference import in_float64

TEXTS = [
    "Question: Tom has 12 apples and buys 30 more. How many apples does Tom have now?",
    "Answer: 12 + 30 = 42\n#### 42",
    "system user assistant You are a careful solver. Think, then answer.",
]
END_OF_TURN, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
# In ChatML's form: an empty thought where thinking is off, as Qwen3 does it.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def write_qwen(
    path: Path,
    family: str = "qwen3",
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    vocab_size: int = 331,
    shard_size: str = "1GB",
    std: float = 0.3,
    tokenizer: bool = True,
    stored_head: bool = False,
    **shape: Any,
) -> Path:
    """A model with random weights, and a tokenizer with a chat template.

    Args:
        stored_head: write the head of a tied model as well, as some published ones do.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": tied,
        "max_position_embeddings": 512,
        **({"head_dim": 16} if family == "qwen3" else {}),
        **shape,
    }
    model: Any = (
        Qwen3ForCausalLM(Qwen3Config(**fields))
        if family == "qwen3"
        else Qwen2ForCausalLM(Qwen2Config(**fields))
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(
                mean=float(name.endswith("norm.weight")), std=std, generator=generator
            )
    model.to(dtype).save_pretrained(path, max_shard_size=shard_size)
    if stored_head:
        tensors = load_file(path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        stops = write_tokenizer(path)
        settings = {"eos_token_id": stops, "pad_token_id": stops[1], "do_sample": True}
        (path / "generation_config.json").write_text(json.dumps(settings))
    return path


def write_tokenizer(path: Path, chat_template: str | None = CHAT_TEMPLATE) -> list[int]:
    """A byte-level BPE tokenizer like Qwen's, small; the ids that end a turn and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, "<|im_start|>", END_OF_TURN],
    )
    bpe.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TURN, pad_token=END_OF_TEXT
    )
    fast.add_tokens(["<think>", "</think>"])  # no special tokens: they stay in the text
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(path)
    return [fast.convert_tokens_to_ids(END_OF_TURN), fast.convert_tokens_to_ids(END_OF_TEXT)]  # type: ignore[list-item]


def theirs(path: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    """transformers' logits (L, V) of each sequence, in float64 throughout."""
    from transformers import AutoModelForCausalLM

    # The eager attention's softmax rounds to float32.
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="sdpa"
    )
    with torch.no_grad():
        return [in_float64(model)(torch.tensor([ids])).logits[0] for ids in sequences]
