"""What a configuration accepts, and the sentences in which it refuses."""

from pathlib import Path

import pytest
import yaml

from proma_megatron.config import ConfigError
from proma_megatron.config_file import dump_config, load_config, validate_config

CONFIGS = sorted(Path("configs").rglob("*.yaml"))


def refusal(**tree: object) -> str:
    with pytest.raises(ConfigError) as caught:
        validate_config({"name": "run", **tree})
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_shipped_config_loads(path: Path) -> None:
    assert load_config(path).name


def test_shipped_configs_are_found() -> None:
    assert Path("configs/quickstart.yaml") in CONFIGS


def test_a_dumped_config_loads_as_the_same_config(tmp_path: Path) -> None:
    config = load_config(Path("configs/quickstart.yaml"), ["optimizer.lr=0.25"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
    assert config.optimizer.lr == 0.25


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"modle": {}}, ["'modle'", "did you mean 'model'"]),
        ({"model": {"hiden_size": 3}}, ["model.hiden_size", "did you mean 'model.hidden_size'"]),
        ({"trainer": {"xyzzy": 3}}, ["trainer.xyzzy", "known keys of trainer are", "save_every"]),
        ({"model": {"layers": "many"}}, ["model.layers", "'many'", "integer"]),
        ({"model": {"layers": 0}}, ["model.layers", "greater than 0"]),
        ({"algorithm": "ppo"}, ["algorithm", "'ppo'", "'proma', 'reinforce' or 'grpo'"]),
        ({"parallel": {"tensor": 3}}, ["model.heads is 4", "parallel.tensor=3", "[1, 2, 4]"]),
        (
            {"model": {"heads": 6, "kv_heads": 3}, "parallel": {"tensor": 2}},
            ["model.kv_heads is 3", "parallel.tensor is 2"],
        ),
        ({"model": {"heads": 4, "kv_heads": 3}}, ["model.kv_heads is 3", "model.heads=4"]),
        (
            {"model": {"ffn_hidden_size": 99}, "parallel": {"tensor": 2}},
            ["model.ffn_hidden_size is 99", "multiple of 2"],
        ),
        ({"parallel": {"pipeline": 3}}, ["model.layers is 4", "pipeline=3", "multiple of 3"]),
        ({"parallel": {"virtual_pipeline": 2}}, ["virtual_pipeline is 2", "pipeline=1"]),
        (
            {"parallel": {"virtual_pipeline": 1, "pipeline": 2}},
            ["parallel.virtual_pipeline is 1", "greater than or equal to 2"],
        ),
        ({"parallel": {"sequence": True}}, ["parallel.sequence", "at least 2"]),
        ({"rollout": {"samples_per_prompt": 1}}, ["samples_per_prompt is 1", "at least 2"]),
        (
            {"rollout": {"prompts_per_step": 6}, "parallel": {"data": 4}},
            ["prompts_per_step is 6", "multiple of"],
        ),
        (
            {"batching": {"tokens_per_microbatch": 10}},
            ["tokens_per_microbatch is 10", "at least 144"],
        ),
        ({"data": {"train_file": "a"}}, ["data.train_file", "validation_file"]),
        (
            {"data": {"train_file": "no.jsonl", "validation_file": "no.jsonl"}},
            ["no.jsonl", "exists"],
        ),
        ({"tokenizer": {"path": "no.model"}}, ["tokenizer.path is no.model", "check the path"]),
        ({"reward": {"function": "nonsense"}}, ["'nonsense'", "package.module:function"]),
        ({"reward": {"function": "no_such_module:f"}}, ["no module 'no_such_module'"]),
        (
            {"optimizer": {"distributed": True}, "model": {"dtype": "float64"}},
            ["optimizer.distributed", "float64", "float32"],
        ),
        ({"optimizer": {"lr": 1e-3, "min_lr": 1e-2}}, ["optimizer.min_lr is 0.01", "at most"]),
        ({"optimizer": {"lr": float("nan")}}, ["optimizer.lr", "nan"]),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence_that_names_it(
    tree: dict[str, object], parts: list[str]
) -> None:
    message = refusal(**tree)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("content", "part"),
    [("a: [", "not valid YAML"), ("- a\n- b", "expected `key: value` lines"), ("{}", "'name'")],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=part):
        load_config(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")


def test_overrides_win_and_keep_their_types(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"name": "run", "projection": {"bound": 0.5}}))
    config = load_config(path, ["projection.bound=null", "parallel.tensor=2", "name=other"])
    assert config.projection.bound is None
    assert config.parallel.tensor == 2
    assert config.name == "other"


def test_an_override_without_a_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: run")
    with pytest.raises(ConfigError, match="has no '='"):
        load_config(path, ["trainer.steps"])


@pytest.mark.parametrize(
    ("projection", "algorithm", "projects"),
    [
        ({}, "proma", True),
        ({}, "reinforce", False),
        ({}, "grpo", False),
        ({"rule": "none"}, "proma", False),
        ({"shrinkage": 0}, "proma", False),
        ({"bound": 0}, "proma", False),
        ({"bound": None}, "proma", True),
    ],
)
def test_the_accumulator_is_used_only_where_it_would_remove_something(
    projection: dict[str, object], algorithm: str, projects: bool
) -> None:
    config = validate_config({"name": "r", "algorithm": algorithm, "projection": projection})
    assert config.projects is projects
