"""What a Hugging Face directory holds beside its weights: config, generation config, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proma_megatron.config.model import ModelConfig
from proma_megatron.config.pretrained import CONFIG, read_json, read_shape, write_config
from proma_megatron.config.run import RunConfig
from proma_megatron.data.hf_tokenizer import GENERATION_CONFIG, TOKENIZER_FILES
from proma_megatron.data.tokenizer import SentencePieceTokenizer, Tokenizer
from proma_megatron.errors import ConfigError
from proma_megatron.runs.directory import RunDir
from proma_megatron.runs.policies import PolicySource

# Texts on which transformers must agree with the exported SentencePiece model.
PROBES = ("Question: 12 + 30?\nAnswer:\n42", " two  spaces, a line\n\n and ünïcode ✓")


def keep_companions(config: RunConfig, run_dir: RunDir) -> None:
    """Copy what the run reads of its model and tokenizer, apart from weights, into its directory.

    Resuming, evaluation and export take it from there: the originals may be moved or changed.
    """
    model, tokenizer = config.model.path, config.tokenizer.path or config.model.path
    kept = run_dir.huggingface
    if model is not None:
        _copy(model, kept, (CONFIG, GENERATION_CONFIG))
    if tokenizer is None:
        return  # trained by the run itself
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, run_dir.tokenizer)
    else:
        _copy(tokenizer, kept, TOKENIZER_FILES)
        if model is None:  # what ends a text, then, is for the tokenizer's own files to say
            _copy(tokenizer, kept, (CONFIG, GENERATION_CONFIG))


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    target.mkdir(exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_companions(
    out: Path, saved: PolicySource, tokenizer: Tokenizer, vocab_size: int, dtype: str
) -> list[str]:
    """Write everything but the weights; return notes for the user.

    What the run's Hugging Face model came with is copied, but for the dtype.

    Raises:
        ConfigError: no Qwen family has this policy's shape.
    """
    assert saved.run is not None
    kept = saved.run.huggingface
    if _describes(kept, saved.config.model):
        fields = read_json(kept, CONFIG)
        fields["dtype"] = dtype
        if "torch_dtype" in fields:  # as transformers before 5 wrote it
            fields["torch_dtype"] = dtype
    else:
        length = saved.config.max_sequence_length
        fields = write_config(saved.config.model, vocab_size, length, dtype) | _special(tokenizer)
    _write_json(out / CONFIG, fields)
    if (kept / GENERATION_CONFIG).is_file():
        shutil.copyfile(kept / GENERATION_CONFIG, out / GENERATION_CONFIG)
    else:
        stops = list(tokenizer.stop_ids)
        settings = {**_special(tokenizer), "eos_token_id": stops if len(stops) > 1 else stops[0]}
        _write_json(out / GENERATION_CONFIG, settings)
    source = saved.config.tokenizer.path
    assert source is not None, "open_policy names the tokenizer"
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _write_sentencepiece(out, source, tokenizer)
    _copy(source, out, TOKENIZER_FILES)
    return []


def _describes(kept: Path, model: ModelConfig) -> bool:
    """Tell whether the config.json there is this model's; that of a mere tokenizer is another's."""
    if not (kept / CONFIG).is_file():
        return False
    try:
        shape = read_shape(kept)
    except ConfigError:  # of an architecture that is not ours
        return False
    return all(getattr(model, key) == value for key, value in shape.items())


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _write_sentencepiece(out: Path, source: Path, tokenizer: SentencePieceTokenizer) -> list[str]:
    """Write the model file, and the settings with which transformers reads it in the same way."""
    shutil.copyfile(source, out / "tokenizer.model")
    _write_json(out / "tokenizer_config.json", tokenizer.transformers_settings())
    from transformers import AutoTokenizer

    try:
        theirs: Any = AutoTokenizer.from_pretrained(str(out), local_files_only=True)
        differs = [
            probe
            for probe in PROBES
            if theirs.encode(probe, add_special_tokens=False) != tokenizer.encode(probe)
        ]
    except Exception as error:  # a conversion that transformers does not know
        return [
            f"transformers can't read the SentencePiece model ({type(error).__name__}: {error})"
        ]
    if differs:
        return [
            f"transformers tokenizes {differs[0]!r} in another way than the SentencePiece model"
        ]
    return []


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
