"""What a configuration accepts, and the sentences in which it refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.messages import assert_names
from support.qwen import write_qwen

from proma_megatron.config.loading import dump_config, load_config, validate_config
from proma_megatron.config.run import RunConfig, check_data_files, check_model_files
from proma_megatron.errors import ConfigError

CONFIGS = sorted(Path("configs").rglob("*.yaml"))


def refusal(**tree: object) -> str:
    with pytest.raises(ConfigError) as caught:
        validate_config({"name": "run", **tree}, training=True)
    return str(caught.value)


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
        ({"algorithm": "trpo"}, ["algorithm", "'trpo'", "'proma', 'intra_proma', 'isopo'"]),
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
        ({"model": {"path": "no/such/Model"}}, ["no/such/Model", "does not exist", "Qwen3-0.6B"]),
        (
            {"model": {"path": "Qwen3-0.6B", "layers": 4}},
            ["model.layers is 4", "it is 28", "leave the key out"],
        ),
        ({"reward": {"function": "nonsense"}}, ["'nonsense'", "package.module:function"]),
        ({"reward": {"function": "module:"}}, ["'module:'", "package.module:function"]),
        ({"reward": {"format_pattern": "("}}, ["reward.format_pattern is '('", "regular"]),
        ({"data": {"columns": {"prompt": "q"}}}, ["data.columns.answer", "only one is set"]),
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
    assert_names(refusal(**tree), *parts)


@pytest.mark.parametrize(
    ("content", "part"),
    [("a: [", "not valid YAML"), ("- a\n- b", "expected `key: value` lines"), ("{}", "'name'")],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=part):
        load_config(path)


@pytest.mark.parametrize(
    ("tree", "check", "parts"),
    [
        (
            {"data": {"train_file": "no.jsonl", "validation_file": "no.jsonl"}},
            check_data_files,
            ["data.train_file is no.jsonl", "exists"],
        ),
        (
            {"tokenizer": {"path": "no.model"}},
            check_model_files,
            ["tokenizer.path is no.model", "check the path"],
        ),
        ({"model": {"path": "a/Qwen3-4B"}}, check_model_files, ["hf download Qwen/Qwen3-4B"]),
    ],
)
def test_what_a_valid_config_names_must_be_there_in_the_end(
    tree: dict[str, object], check: Callable[[RunConfig], None], parts: list[str]
) -> None:
    config = validate_config({"name": "run", **tree})
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert_names(caught, *parts)


def test_a_policy_may_be_read_where_it_could_not_be_trained() -> None:
    tree = {
        "name": "run",
        "rollout": {"max_new_tokens": 2048, "samples_per_prompt": 1},
        "parallel": {"data": 3},
    }
    assert validate_config(tree).parallel.data == 3
    with pytest.raises(ConfigError, match="tokens_per_microbatch is 1024"):
        validate_config(tree, training=True)


def test_a_home_directory_is_found() -> None:
    config = validate_config({"name": "run", "tokenizer": {"path": "~/t.model"}})
    assert config.tokenizer.path == Path.home() / "t.model"


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"c\.yaml can't be read as text"):
        load_config(tmp_path / "c.yaml")


def test_a_file_builds_on_its_base(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("name: a\nmodel: {layers: 8, heads: 8}\nseed: 3\n")
    (tmp_path / "sub" / "one.yaml").write_text("base: ../base.yaml\nname: b\nmodel: {layers: 2}\n")
    (tmp_path / "sub" / "two.yaml").write_text("base: one.yaml\nname: c\n")
    config = load_config(tmp_path / "sub" / "two.yaml", ["seed=4"])
    assert (config.name, config.model.layers, config.model.heads, config.seed) == ("c", 2, 8, 4)


def test_a_base_that_is_missing_or_goes_round_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("base: two.yaml\nname: b\n")
    with pytest.raises(ConfigError, match=r"two\.yaml does not exist"):
        load_config(tmp_path / "one.yaml")
    (tmp_path / "two.yaml").write_text("base: one.yaml\n")
    with pytest.raises(ConfigError, match="is its own base"):
        load_config(tmp_path / "one.yaml")


def test_the_algorithms_siblings_differ_in_the_algorithm_alone() -> None:
    paper = load_config(Path("configs/qwen3_0.6b_gsm8k.yaml")).model_dump()
    assert paper["algorithm"] == "proma"
    for algorithm in ("reinforce", "grpo"):
        sibling = load_config(Path(f"configs/qwen3_0.6b_gsm8k_{algorithm}.yaml")).model_dump()
        assert sibling.pop("algorithm") == algorithm
        assert sibling.pop("name").endswith(algorithm)
        assert sibling == {k: v for k, v in paper.items() if k not in ("algorithm", "name")}


def test_the_papers_run_is_the_papers() -> None:
    """Figures of nilin/proma's run.sh, which the paper names as its code."""
    config = load_config(Path("configs/qwen3_0.6b_gsm8k.yaml"))
    assert config.rollout.prompts_per_step == 128
    assert config.rollout.samples_per_prompt == 8
    assert config.rollout.prompts_per_step // config.batching.minibatches == 64
    assert config.batching.sequences_per_microbatch == 8
    assert (config.rollout.max_prompt_tokens, config.rollout.max_new_tokens) == (512, 2048)
    assert config.rollout.temperature == 1
    assert config.optimizer.lr == 2e-6
    assert (config.projection.rule, config.projection.bound) == ("iterative", 0.5)
    assert (config.trainer.steps, config.trainer.eval_every) == (302, 5)


def test_a_resolved_config_outlives_its_model(tmp_path: Path) -> None:
    model = tmp_path / "Tiny"
    write_qwen(model, tokenizer=False)
    config = validate_config({"name": "run", "model": {"path": str(model)}})
    assert (config.model.layers, config.model.vocab_size) == (4, 331)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    shutil.rmtree(model)
    assert load_config(copy) == config


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
