"""The `proma train` command, from the shell: runs, run directories and refusals."""

import json
import sys
from pathlib import Path

import pytest
from support.command import forked_proma, proma
from support.pool import WorkerPool
from support.pooled import PooledStarter, run_in_pool

from proma_megatron.cli import main
from proma_megatron.commands.train.command import train
from proma_megatron.config.loading import load_config
from proma_megatron.errors import ConfigError
from proma_megatron.processes.elastic import starting_ranks

TINY = {
    "model.hidden_size": 32,
    "model.ffn_hidden_size": 64,
    "model.layers": 2,
    "model.head_dim": 8,
    "data.train_problems": 200,
    "data.validation_problems": 4,
    "rollout.prompts_per_step": 4,
    "rollout.samples_per_prompt": 2,
    "rollout.max_new_tokens": 6,
    "warm_start.steps": 2,
    "warm_start.sequences_per_step": 4,
    "trainer.steps": 2,
    "trainer.eval_every": 1,
    "trainer.kl_every": 1,
}


# A worked answer that no microbatch can hold.
LONG_ANSWERS = [
    "data.train_file=long.jsonl",
    "data.validation_file=short.jsonl",
    "rollout.prompts_per_step=2",
    "batching.tokens_per_microbatch=120",
]


def tiny(**changes: object) -> list[str]:
    merged = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [f"{key}={value}" for key, value in merged.items()]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("name: tiny\n")
    return path


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ranks
def test_a_tensor_parallel_run_leaves_a_complete_run_directory(
    workers: WorkerPool, tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = proma("train", str(config), *tiny(parallel__tensor=2), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny"
    found = rows(run)
    assert [(row["phase"], row["step"]) for row in found] == [
        ("warm_start", 1),
        ("warm_start", 2),
        ("rl", 0),
        ("rl", 1),
        ("rl", 2),
    ]
    for row in found[3:]:
        assert row["policy/logprob_mismatch_max"] < 1e-5
        assert row["policy/kl_initial"] is not None
        assert 0 <= row["validation/accuracy"] <= 1
    assert (run / "checkpoints" / "step_000002" / "complete.json").is_file()
    assert json.loads((run / "environment.json").read_text())
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert {"prompt", "completion", "reward"} <= set(sample)
    # Rank 1 is quiet: its output is in the logs, and empty or not, not on the screen.
    assert "rank1" not in done.stdout + done.stderr

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="runs/tiny already holds a run; pass --resume or --over"):
        train(load_config(config, tiny(parallel__tensor=2)), resume=False, overwrite=False)
    assert rows(run) == found

    longer = tiny(parallel__tensor=2, trainer__steps=3)
    monkeypatch.setattr(sys, "argv", ["proma", "train", str(config), "--resume", *longer])
    with starting_ranks(PooledStarter(workers)), pytest.raises(SystemExit) as resumed:
        main()
    assert resumed.value.code == 0
    assert [row["step"] for row in rows(run) if row["phase"] == "rl"] == [0, 1, 2, 3]
    assert rows(run)[: len(found)] == found

    monkeypatch.setattr(sys, "argv", ["proma", "report", str(run)])
    with pytest.raises(SystemExit) as done_well:
        main()
    assert done_well.value.code == 0
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.ranks
def test_torchrun_starts_the_same_run(tmp_path: Path, config: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
    arguments = tiny(parallel__pipeline=2, algorithm="grpo", batching__minibatches=2)
    done = proma("train", str(config), *arguments, cwd=tmp_path, launcher=torchrun)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "runs" / "tiny")
    assert [row["step"] for row in found if row["phase"] == "rl"] == [0, 1, 2]


@pytest.mark.ranks
def test_a_failing_reward_names_the_sample_and_loses_nothing(tmp_path: Path, config: Path) -> None:
    (tmp_path / "my_reward.py").write_text(
        "calls = []\n"
        "def score(prompt, completion, reference):\n"
        "    calls.append(1)\n"
        "    return float('nan') if len(calls) > 17 else 0.5\n"
    )
    # One scoring process sees every call, in order.
    arguments = tiny(reward__function="my_reward:score", reward__workers=1, parallel__tensor=2)
    done = forked_proma("train", str(config), *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "sample" in done.stderr
    assert "nan" in done.stderr
    run = tmp_path / "runs" / "tiny"
    # Before RL 4 validation rewards, then 8 of step 1 and 4 more; the second of step 2 failed.
    assert (run / "checkpoints" / "step_000001" / "complete.json").is_file()
    rescued = (run / "unscored_step_000002.jsonl").read_text().splitlines()
    assert len(rescued) == 8


@pytest.mark.ranks
def test_a_killed_rank_is_named_rather_than_the_ranks_that_miss_it(
    tmp_path: Path, config: Path
) -> None:
    # Loaded by every rank for a check; rank 0 has gone before the others know.
    (tmp_path / "broken.py").write_text(
        "import os\n"
        "def score(prompt, completion, reference):\n"
        "    return 0.0\n"
        "if os.environ.get('RANK') == '0':\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    arguments = tiny(reward__function="broken:score", parallel__tensor=2)
    done = proma("train", str(config), *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "rank 0 was ended by signal 9" in done.stderr
    assert done.stderr.count("\n") == 1


def test_rl_in_bfloat16_starts_from_the_warm_started_weights(
    workers: WorkerPool, tmp_path: Path, config: Path
) -> None:
    # Master weights that were copied before the warm start would undo it at the first update.
    far = {"warm_start__lr": 1e-2, "warm_start__warmup_steps": 0, "warm_start__steps": 8}
    arguments = tiny(model__dtype="bfloat16", optimizer__lr=1e-9, root=tmp_path, **far)
    run = run_in_pool(workers, load_config(config, arguments))
    last = rows(run.path)[-1]
    assert last["step"] == 2
    assert last["policy/kl_initial"] < 1e-2


def test_a_run_that_cannot_start_leaves_the_old_run_alone(tmp_path: Path, config: Path) -> None:
    run = tmp_path / "tiny"
    run.mkdir()
    (run / "config.yaml").write_text("name: old\n")
    arguments = tiny(reward__function="json:no_such_name", root=tmp_path)
    with pytest.raises(ConfigError, match="no_such_name"):
        train(load_config(config, arguments), resume=False, overwrite=True)
    assert (run / "config.yaml").read_text() == "name: old\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["parallel.tensor=3"], "parallel.tensor=3"),
        (["model.hiden_size=8"], "did you mean 'model.hidden_size'"),
        (["rollout.max_prompt_tokens=8"], "rollout.max_prompt_tokens=8"),
        (["device=cuda", "parallel.tensor=2", "parallel.data=8"], "GPUs"),
        (["data.train_file=empty.jsonl", "data.validation_file=empty.jsonl"], "empty.jsonl"),
        (["data.train_problems=100000000"], "data.train_problems"),
        (["data.train_problems=8"], "fewer than rollout.prompts_per_step=16"),
        (["rollout.max_new_tokens=8", "warm_start.steps=1", *LONG_ANSWERS], "long-2"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    tmp_path: Path,
    config: Path,
    arguments: list[str],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    long = [{"question": f"q{i}", "answer": "1 + " * 200 * i + "#### 1"} for i in range(2)]
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps(row) for row in long))
    (tmp_path / "short.jsonl").write_text(json.dumps({"question": "r", "answer": "#### 1"}))
    # In this process: a new one would spend seconds on imports.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["proma", "train", str(config), *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert part in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "world", "parts"),
    [
        ([], 6, ["rollout.prompts_per_step is 16", "6 replicas"]),
        (["parallel.tensor=2"], 3, ["3 processes"]),
    ],
)
def test_a_world_that_does_not_fit_is_refused(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    world: int,
    parts: list[str],
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ConfigError) as refused:
        train(load_config(config, arguments), resume=False, overwrite=False)
    assert all(part in str(refused.value) for part in parts)
