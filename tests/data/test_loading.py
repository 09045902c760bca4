"""From data files to prompts: what is dropped is said, what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proma_megatron.config.loading import validate_config
from proma_megatron.config.run import RunConfig
from proma_megatron.data.loading import prepare_data
from proma_megatron.errors import ConfigError

SAMPLE = Path(__file__).parents[2] / "configs" / "sample"
FILES: dict[str, object] = {
    "train_file": SAMPLE / "train.jsonl",
    "validation_file": SAMPLE / "validation.jsonl",
}


def config(**sections: dict[str, object]) -> RunConfig:
    rollout = {"prompts_per_step": 2, "max_prompt_tokens": 96, **sections.pop("rollout", {})}
    tree = {"name": "run", "data": FILES, "rollout": rollout, **sections}
    return validate_config(tree)


def test_what_is_too_long_is_dropped_and_said(tmp_path: Path) -> None:
    whole = prepare_data(config(), tmp_path / "t.model")
    assert whole.notes == ()
    prompts = [*whole.train.all(), *whole.validation]
    assert len(prompts) == 56
    limit = sorted(len(prompt.tokens) for prompt in prompts)[40]
    found = prepare_data(config(rollout={"max_prompt_tokens": limit}), tmp_path / "t.model")
    kept = [*found.train.all(), *found.validation]
    assert kept == [prompt for prompt in prompts if len(prompt.tokens) <= limit]
    train, validation = found.notes
    dropped = 40 - len(found.train.all())
    longest = max(len(prompt.tokens) for prompt in whole.train.all())
    assert train == (
        f"dropped {dropped} of 40 training prompts, which are longer than "
        f"rollout.max_prompt_tokens={limit} (the longest has {longest} tokens)"
    )
    assert f"dropped {16 - len(found.validation)} of 16 validation" in validation


def test_two_streams_of_the_same_prompts_go_in_orders_of_their_own(tmp_path: Path) -> None:
    data = prepare_data(config(), tmp_path / "t.model")
    rl, supervised = (
        [prompt.problem.id for prompt in source.take(40)]
        for source in (data.train, data.supervised)
    )
    assert sorted(rl) == sorted(supervised)
    assert rl != supervised


def test_chats_that_only_end_alike_are_no_shared_questions(tmp_path: Path) -> None:
    """A tokenizer without a template can't render them, which comes after the comparison."""
    for name in ("train", "test"):
        chat = [{"role": "system", "content": name}, {"role": "user", "content": "Why?"}]
        row = {"prompt": chat, "reward_model": {"ground_truth": "1"}}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    files: dict[str, object] = {
        "train_file": tmp_path / "train.jsonl",
        "validation_file": tmp_path / "test.jsonl",
    }
    with pytest.raises(ConfigError, match="chat of 2 messages"):
        prepare_data(config(data=files, tokenizer={"vocab_size": 400}), tmp_path / "t.model")
    with pytest.raises(ConfigError, match="shares 1 questions"):
        prepare_data(config(data={**files, "validation_file": files["train_file"]}), tmp_path / "t")
