"""`proma export`: a Hugging Face directory of a run's policy, complete or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from proma_megatron.commands.export.job import Dtype, ExportJob
from proma_megatron.data.loading import load_tokenizer
from proma_megatron.errors import ConfigError
from proma_megatron.processes.ranks import (
    already_started,
    as_started,
    is_first_rank,
    run_on_ranks,
    say,
)
from proma_megatron.runs.companions import write_companions
from proma_megatron.runs.policies import PolicySource


def export(
    saved: PolicySource, out: Path, dtype: Dtype | None, shard_size: str, *, overwrite: bool = False
) -> None:
    """Write the policy of a run as Hugging Face's and vLLM's loaders want it.

    Args:
        dtype: of the weights; None: the run's own, which loses nothing.
        shard_size: largest file, such as "5GB".
        overwrite: replace an earlier export, when the new one is complete.

    Raises:
        ConfigError: there is nothing to export, or ``out`` can't be written.
        WorkerError: a rank failed; ``out`` is not there then.
    """
    config = as_started(saved.config)
    if saved.checkpoint is None:
        raise ConfigError(
            f"{config.model.path} is a Hugging Face directory already; give a run or a checkpoint"
        )
    if not already_started():  # other replicas would have nothing to give
        one = config.parallel.model_copy(update={"data": 1})
        config = config.model_copy(update={"parallel": one})
    _check_size(shard_size)
    given, out = out, out.resolve()
    if is_first_rank():
        _check_out(given, overwrite=overwrite)
    tokenizer = load_tokenizer(config, Path(os.devnull), ())
    part = out.with_name(f".{out.name}.part")
    job = ExportJob(
        config=config,
        checkpoint=saved.checkpoint,
        vocab_size=config.model.vocab_size or tokenizer.vocab_size,
        dtype=dtype or config.model.dtype,
        shard_size=shard_size,
        out=part,
    )
    main = is_first_rank()
    try:
        if main:
            shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
            part.mkdir()
            for note in write_companions(part, saved, tokenizer, job.vocab_size, job.dtype):
                say(note)
        summary = run_on_ranks("proma_megatron.commands.export.rank", job, purpose="export")
        if already_started() and summary is not None:
            print(summary, flush=True)
        if main:
            old = out.with_name(f".{out.name}.old")
            if overwrite and out.exists():
                shutil.rmtree(old, ignore_errors=True)
                out.replace(old)
            part.replace(out)  # which may be there, empty
            shutil.rmtree(old, ignore_errors=True)  # also of one that was killed in between
            say(f"wrote {given}: {saved.checkpoint.name}, {job.dtype}")
    finally:
        if main:
            shutil.rmtree(part, ignore_errors=True)


def _check_size(text: str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        split_torch_state_dict_into_shards({}, max_shard_size=text)
    except ValueError as error:
        raise ConfigError(
            f"--shard-size is {text!r} ({error}), expected a size such as 5GB"
        ) from None


def _check_out(out: Path, *, overwrite: bool) -> None:
    """Check that a new directory can be made there; ConfigError if not."""
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty and not (overwrite and (out / "config.json").is_file()):
        raise ConfigError(
            f"--out is {out}, which exists already; give the name of a new directory, or "
            "--overwrite an earlier export"
        )
    if not out.resolve().parent.is_dir():
        raise ConfigError(f"--out is {out}, but there is no directory {out.parent}; make it")
    if not os.access(out.resolve().parent, os.W_OK):
        raise ConfigError(f"--out is {out}, but {out.parent} is not writable; choose another")
