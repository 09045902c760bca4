"""Real files in, trained, measured, out: `proma` on Hugging Face directories and data files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import forked_proma
from support.pool import WorkerPool
from support.pretrained import logprobs_of
from support.qwen import theirs, write_qwen
from transformers import AutoModelForCausalLM, AutoTokenizer

from proma_megatron.commands.evaluate.command import default_output, evaluate_saved
from proma_megatron.commands.export.command import export
from proma_megatron.commands.train.command import train
from proma_megatron.config.loading import load_config, validate_config
from proma_megatron.data.loading import load_tokenizer
from proma_megatron.errors import ConfigError, WorkerError
from proma_megatron.processes.elastic import starting_ranks
from proma_megatron.runs.companions import keep_companions, write_companions
from proma_megatron.runs.directory import RunDir
from proma_megatron.runs.policies import PolicySource, open_policy

SAMPLE = Path(__file__).parents[2] / "configs" / "sample"
SEQUENCES = [[5, 300, 12, 7, 7, 201, 90], [44, 3, 330, 18]]
FAST = {
    "data.train_file": SAMPLE / "train.jsonl",
    "data.validation_file": SAMPLE / "validation.jsonl",
    "prompt.instruction": "End with ####.",
    "rollout.prompts_per_step": 4,
    "rollout.samples_per_prompt": 2,
    "rollout.max_prompt_tokens": 150,
    "rollout.max_new_tokens": 6,
    "batching.sequences_per_microbatch": 2,
    "trainer.steps": 2,
    "trainer.eval_every": 0,
    "trainer.kl_every": 0,
}


# Scored without a process, which a rank of the pool may not start.
PLAIN_REWARD = ["reward.function=gsm8k", "reward.format_pattern=null"]
LAYOUT = ["parallel.pipeline=1", "parallel.tensor=1", "parallel.sequence=false"]
ALONE = {"tensor": 1, "pipeline": 1, "sequence": "false"}
# A reward that a random policy gets now and then.
REWARD = "def score(prompt, completion, reference):\n    return len(completion) % 5 / 4\n"


def arguments(path: Path | None, **changes: object) -> list[str]:
    chosen = {**FAST, **{key.replace("__", "."): value for key, value in changes.items()}}
    if path is not None:
        chosen["model.path"] = path
    return [f"{key}={value}" for key, value in chosen.items()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("qwen") / "Tiny", dtype=torch.float64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A run of two steps in TP2 x PP2, whose Hugging Face model is gone afterwards.

    Its training data are a parquet file with verl's columns.
    """
    folder = tmp_path_factory.mktemp("trained")
    problems = map(json.loads, (SAMPLE / "train.jsonl").read_text().splitlines())
    rows = [
        {
            "prompt": [{"role": "user", "content": problem["question"]}],
            "reward_model": {"ground_truth": problem["answer"].split("#### ")[1], "style": "rule"},
        }
        for problem in problems
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    copy = shutil.copytree(model, folder / "Tiny")
    (folder / "run.yaml").write_text("name: run\noptimizer: {lr: 0.01}\n")
    (folder / "lengths.py").write_text(REWARD)
    layout = {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__sequence": True}
    reward = {
        "reward__function": "lengths:score",
        "reward__overlong_penalty": 0.25,
        "reward__format_pattern": "e",
        "reward__format_bonus": 0.5,
        "data__train_file": folder / "train.parquet",
        "trainer__log_samples": 100,
    }
    changes = arguments(copy, model__dtype="float64", **layout, **reward)
    done = forked_proma("train", "run.yaml", *changes, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loaded the weights of" in done.stdout
    assert "dropped" in done.stdout  # the sample's longest problems, and it says so
    shutil.rmtree(copy)
    return folder / "runs" / "run"


def test_a_run_begins_with_the_models_weights_and_changes_them(
    trained: Path, model: Path, workers: WorkerPool
) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    # The rollout's log-probabilities are the training forward's, before the first update.
    assert rows[1]["policy/logprob_mismatch_max"] < 1e-10
    assert rows[1]["optimizer/grad_norm"] > 0
    before = _theirs(model)
    checkpoint = trained / "checkpoints" / "step_000000"
    ours = workers.run(1, logprobs_of, run=checkpoint, parallel=ALONE, sequences=SEQUENCES)[0]
    assert float((ours - before).abs().max()) < 1e-9
    after = workers.run(1, logprobs_of, run=trained, parallel=ALONE, sequences=SEQUENCES)[0]
    assert float((after - before).abs().max()) > 1e-3


def test_rewards_are_scores_with_bonus_and_penalty(trained: Path) -> None:
    rows = list(map(json.loads, (trained / "samples.jsonl").read_text().splitlines()))
    assert {row["finished"] for row in rows} == {False}  # a random policy has nothing to end
    for row in rows:
        text = row["completion"]
        assert row["reward"] == len(text) % 5 / 4 + 0.5 * ("e" in text) - 0.25
    assert len({"e" in row["completion"] for row in rows}) == 2


def _theirs(path: Path) -> torch.Tensor:
    """transformers' log-probabilities of each next token of SEQUENCES, one after the other."""
    found = []
    for ids, logits in zip(SEQUENCES, theirs(path, SEQUENCES), strict=True):
        chosen = torch.tensor(ids[1:])[:, None]
        found.append(logits.log_softmax(dim=-1)[:-1].gather(1, chosen)[:, 0])
    return torch.cat(found)


@pytest.mark.usefixtures("in_pool")
def test_a_run_goes_on_without_the_model_that_it_began_with(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in another layout; the run's own configuration is all that it needs."""
    shutil.copytree(trained, tmp_path / "runs" / "run")
    monkeypatch.syspath_prepend(trained.parents[1])
    root = tmp_path / "runs"
    changes = [f"root={root}", "trainer.steps=3", *LAYOUT]
    config = load_config(root / "run" / "config.yaml", changes)
    train(config, resume=True, overwrite=False)
    rows = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    """Written by a layout that is not the run's, in several files."""
    out = trained.parent / "exported"
    layout = ("parallel.tensor=1", "parallel.sequence=false")
    done = forked_proma("export", str(trained), "--out", str(out), "--shard-size", "50KB", *layout)
    assert done.returncode == 0, done.stderr
    return out


def test_an_export_loads_in_transformers_with_the_trainers_log_probabilities(
    trained: Path, exported: Path, workers: WorkerPool
) -> None:
    layout = {"tensor": 2, "pipeline": 2}
    found = workers.run(4, logprobs_of, run=trained, parallel=layout, sequences=SEQUENCES)
    ours = next(value for value in found if value is not None)
    assert float((ours - _theirs(exported)).abs().max()) < 1e-9


def test_an_export_has_what_the_model_came_with(model: Path, exported: Path) -> None:
    assert len(list(exported.glob("*.safetensors"))) > 2
    assert AutoModelForCausalLM.from_pretrained(exported, dtype="auto").dtype == torch.float64
    before, after = (AutoTokenizer.from_pretrained(path) for path in (model, exported))
    assert before.get_vocab() == after.get_vocab()
    assert before.chat_template == after.chat_template
    for name in ("generation_config.json", "tokenizer.json"):
        assert (exported / name).read_bytes() == (model / name).read_bytes()
    config = json.loads((exported / "config.json").read_text())
    original = json.loads((model / "config.json").read_text())
    assert {**config, "dtype": ""} == {**original, "dtype": ""}
    assert not list(exported.parent.glob(".*.part"))


@pytest.mark.usefixtures("in_pool")
def test_what_was_imported_is_exported_bit_by_bit(trained: Path, model: Path) -> None:
    """The checkpoint before the first step holds the model's own weights."""
    out = trained.parent / "first"
    out.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (out / name).write_text("of an earlier export")
    first = open_policy(trained / "checkpoints" / "step_000000")
    export(first, out, None, "5GB", overwrite=True)
    assert not (out / "model-00001-of-00002.safetensors").exists()
    assert not list(out.parent.glob(".first.*"))
    before, after = (load_file(path / "model.safetensors") for path in (model, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("in_pool")
def test_an_export_fills_an_empty_directory_and_converts(
    trained: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export(open_policy(trained), Path(), "bfloat16", "5GB")
    found = load_file(tmp_path / "model.safetensors")
    for file in exported.glob("*.safetensors"):
        for name, value in load_file(file).items():
            assert torch.equal(found.pop(name), value.bfloat16())
    assert not found
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_export_refuses_what_it_would_overwrite_or_not_do(
    trained: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes").write_text("mine")
    new = tmp_path / "new"
    for source, out, size, part in (
        (trained, tmp_path, "5GB", "exists already; give the name of a new directory"),
        (model, new, "5GB", "is a Hugging Face directory already"),
        (tmp_path, new, "5GB", "no run"),
        (trained / "checkpoints" / "step_000009", new, "5GB", "no complete checkpoint"),
        (trained, new, "big", "--shard-size is 'big'"),
        (trained, new / "in" / "nothing", "5GB", "there is no directory"),
    ):
        with pytest.raises(ConfigError, match=part):
            export(open_policy(source), out, None, size)
    with pytest.raises(ConfigError, match="exists already"):  # it is no export
        export(open_policy(trained), tmp_path, None, "5GB", overwrite=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "notes"]


def test_an_export_that_fails_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise WorkerError("rank 0 failed")

    with starting_ranks(fail), pytest.raises(WorkerError):
        export(open_policy(trained), tmp_path / "out", None, "5GB")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("in_pool")
def test_evaluation_counts_what_it_wrote(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out, data = tmp_path / "all.jsonl", SAMPLE / "validation.jsonl"
    monkeypatch.syspath_prepend(trained.parents[1])
    saved = open_policy(trained, ["evaluation.samples=4", "parallel.pipeline=1"])
    evaluate_saved(saved, data, out, overwrite=False)
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    problems = {row["problem"] for row in rows}
    assert figures["problems"] == len(problems)
    assert len(rows) == 4 * len(problems)
    assert len(problems) + figures["dropped_problems"] == 16
    assert figures["accuracy"] == figures["pass@1"]
    assert figures["accuracy"] == sum(row["correct"] for row in rows) / len(rows)
    assert figures["truncated"] == sum(not row["finished"] for row in rows) / len(rows)
    assert figures["length"] == sum(row["tokens"] for row in rows) / len(rows)
    assert figures["accuracy_low"] <= figures["accuracy"] <= figures["accuracy_high"]
    assert {"pass@2", "pass@4"} <= figures.keys()
    # Samples of a problem differ, and a second run gives the same ones.
    assert len({row["completion"] for row in rows if row["problem"] == rows[0]["problem"]}) > 1
    with pytest.raises(ConfigError, match=r"all\.jsonl exists already; give another"):
        evaluate_saved(open_policy(trained), SAMPLE / "validation.jsonl", out, overwrite=False)


KEPT = ("problem", "sample", "completion", "tokens", "finished")


def completions(file: Path) -> list[dict[str, Any]]:
    """What was sampled; the run's reward needs a process that a pool's rank can't start."""
    rows = map(json.loads, file.read_text().splitlines())
    return [{key: row[key] for key in KEPT} for row in rows]


@pytest.mark.usefixtures("in_pool")
def test_validation_is_the_same_code_in_every_layout(trained: Path, tmp_path: Path) -> None:
    """What the run wrote after its last step is what `proma eval` finds there, greedily."""
    data, step = SAMPLE / "validation.jsonl", trained / "evaluation" / "step_000002.jsonl"
    for parallel in ([], [*LAYOUT, "parallel.data=2"]):
        saved = open_policy(trained, [*PLAIN_REWARD, *parallel])
        evaluate_saved(saved, data, tmp_path / "again.jsonl", overwrite=True)
        assert completions(tmp_path / "again.jsonl") == completions(step)
    row = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    rows = list(map(json.loads, step.read_text().splitlines()))
    assert row["validation/accuracy"] == sum(r["correct"] for r in rows) / len(rows)
    assert row["validation/score"] == pytest.approx(sum(r["score"] for r in rows) / len(rows))


@pytest.mark.usefixtures("in_pool")
def test_samples_do_not_depend_on_the_layout(trained: Path, tmp_path: Path) -> None:
    """Nor on how many decode together; with an odd number left, a replica has none."""
    data, out = tmp_path / "five.jsonl", tmp_path / "some.jsonl"
    data.write_text("".join((SAMPLE / "validation.jsonl").open().readlines()[:5]))
    found = []
    for parallel in ([], ["rollout.batch_size=6"], ["rollout.batch_size=6", "parallel.data=2"]):
        changes = ["evaluation.samples=3", *PLAIN_REWARD, *LAYOUT, *parallel]
        changes.append("rollout.max_prompt_tokens=300")
        evaluate_saved(open_policy(trained, changes), data, out, overwrite=True)
        found.append(completions(out))
    assert len(found[0]) == 15
    assert found[0] == found[1] == found[2]


@pytest.mark.usefixtures("in_pool")
def test_a_models_evaluation_takes_prompts_and_rewards_from_a_configuration(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        "name: math\nprompt: {instruction: Box it.}\nmodel: {dtype: float64, layers: 9}\n"
        "rollout: {max_prompt_tokens: 200, max_new_tokens: 4}\n"
    )
    saved = open_policy(model, ["parallel.tensor=2"], tmp_path / "run.yaml")
    assert (saved.config.model.dtype, saved.config.model.layers) == ("float64", 4)
    data, out = SAMPLE / "validation.jsonl", tmp_path / "all.jsonl"
    assert default_output(saved, data) == Path("eval_Tiny_validation.jsonl")
    evaluate_saved(saved, data, out, overwrite=False)
    rows = list(map(json.loads, out.read_text().splitlines()))
    assert len(rows) == 16
    assert all("Box it.<|im_end|>" in row["prompt"] for row in rows)
    with pytest.raises(ConfigError, match="which has its own; leave it out"):
        open_policy(tmp_path, [], tmp_path / "run.yaml")


# --------------------------------------------------------------------------- bad input


def refusal(changes: list[str], folder: Path) -> str:
    """What `proma train` says before it starts anything; nothing is left behind."""
    file = folder / "run.yaml"
    file.write_text(f"name: run\nroot: {folder / 'runs'}\n")
    with pytest.raises(ConfigError) as caught:
        train(load_config(file, changes), resume=False, overwrite=False)
    assert not (folder / "runs").exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _integers(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, path / "model.safetensors")


def _small_embedding(path: Path) -> None:
    shutil.rmtree(path)
    write_qwen(path, dtype=torch.float64, vocab_size=290)


def _no_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("break_it", "parts"),
    [
        (_truncate, ["model.safetensors can't be read", "download it again"]),
        (_integers, ["model.norm.weight has dtype I8", "BF16"]),
        (_small_embedding, ["tokens, but the embedding has only 290 rows"]),
        (_no_tokenizer, ["holds no tokenizer", "tokenizer.path"]),
        (shutil.rmtree, ["which does not exist"]),
    ],
)
def test_a_broken_model_is_refused_before_anything_starts(
    model: Path, tmp_path: Path, break_it: Callable[[Path], None], parts: list[str]
) -> None:
    copy = shutil.copytree(model, tmp_path / "Tiny")
    break_it(copy)
    message = refusal(arguments(copy), tmp_path)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model__layers": 3}, ["model.layers is 3", "it is 4 in the config.json"]),
        ({"parallel__tensor": 3}, ["model.heads is 4", "parallel.tensor=3"]),
        ({"prompt__template": "nice"}, ["prompt.template is 'nice'"]),
        ({"rollout__max_prompt_tokens": 4}, ["all 40 training prompts are longer"]),
        ({"rollout__prompts_per_step": 64}, ["fewer than rollout.prompts_per_step=64"]),
        ({"reward__format_bonus": 1, "reward__function": "os:getpid"}, ["format_pattern"]),
        ({"reward__function": "no_such_module:f"}, ["no_such_module"]),
        ({"data__columns__prompt": "question"}, ["data.columns.answer"]),
        ({"data__validation_file": SAMPLE / "train.jsonl"}, ["shares 40 questions"]),
        ({"warm_start__steps": 1, "data__train_file": "NO_WORK"}, ["no worked answer"]),
        ({"data__train_file": "WORDS"}, ["'words-1' has the reference 'many', expected a number"]),
        ({"data__train_file": "BAD"}, ["bad.jsonl, line 2", "####"]),
        (
            {"data__train_file": "DOTS", "reward__function": "math"},
            [r"the reference '\\ldots', in which math-verify finds no answer"],
        ),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_anything_starts(
    model: Path, tmp_path: Path, changes: dict[str, object], parts: list[str]
) -> None:
    files = {
        "BAD": ("bad", '{"question": "a", "answer": "#### 1"}\n{"question": "b", "answer": "?"}\n'),
        "WORDS": ("words", json.dumps({"prompt": "a", "reward_model": {"ground_truth": "many"}})),
        "DOTS": ("dots", json.dumps({"prompt": "a", "reward_model": {"ground_truth": r"\ldots"}})),
        "NO_WORK": ("none", json.dumps({"prompt": "a", "reward_model": {"ground_truth": "1"}})),
    }
    for key, value in changes.items():
        if value in files:
            name, content = files[str(value)]
            (tmp_path / f"{name}.jsonl").write_text(content)
            changes = {**changes, key: tmp_path / f"{name}.jsonl"}
            changes.setdefault("rollout__prompts_per_step", 1)
    message = refusal(arguments(model, **changes), tmp_path)
    for part in parts:
        assert part in message


def test_a_published_model_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    message = refusal(arguments(Path("models/Qwen3-0.6B")), tmp_path)
    assert "model.path is models/Qwen3-0.6B" in message
    assert "hf download Qwen/Qwen3-0.6B" in message


def test_a_policy_with_another_models_tokenizer_is_exported_with_its_own_shape(
    model: Path, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    (run.path / "huggingface").mkdir(parents=True)
    tree = {"name": "run", "root": str(tmp_path), "tokenizer": {"path": str(model)}}
    config = validate_config({**tree, "model": {"hidden_size": 64, "layers": 1}})
    keep_companions(config, run)
    assert (run.huggingface / "config.json").is_file()
    (tmp_path / "out").mkdir()
    tokenizer = load_tokenizer(config, run.tokenizer, [])
    saved = PolicySource(config, run.checkpoint(0), run)
    write_companions(tmp_path / "out", saved, tokenizer, tokenizer.vocab_size, "float32")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["hidden_size"], fields["num_hidden_layers"]) == (64, 1)
