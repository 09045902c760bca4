"""Comparisons: which runs there are, what is left of each, and the whole command's course."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.pooled import TINY_RUN, rl_rows
from support.runs import complete, noisy_rows, write_run

from proma_megatron import cli
from proma_megatron.commands.compare import command
from proma_megatron.commands.compare.command import compare, duration
from proma_megatron.commands.compare.runs import Comparison, plan_runs, started_from
from proma_megatron.commands.compare.state import Todo, todo
from proma_megatron.commands.export import command as job
from proma_megatron.commands.train import command as launcher
from proma_megatron.config.loading import apply_overrides, dump_config, load_config, read_tree
from proma_megatron.config.pretrained import write_config
from proma_megatron.config.run import RunConfig
from proma_megatron.errors import ConfigError, WorkerError
from proma_megatron.runs.checkpoint_folder import MARKER
from proma_megatron.runs.directory import RunDir
from proma_megatron.runs.policies import PolicySource

CHECK_RUN = launcher.check_run
ROOT = Path(__file__).parents[2]
TREE: dict[str, Any] = {
    "name": "compare",
    "seed": 5,
    "warm_start": {"steps": 3},
    "projection": {"rule": "iterative", "bound": 0.25},
    "trainer": {"steps": 20, "kl_every": 4},
}


def _plan(root: Path, algorithms: str = "proma,grpo", seeds: int = 2, **more: Any) -> Comparison:
    return plan_runs({**TREE, "root": str(root), **more}, algorithms.split(","), seeds)


# --------------------------------------------------------------------------- planning


def test_runs_are_made_seed_by_seed(tmp_path: Path) -> None:
    plan = _plan(tmp_path, "proma,reinforce,grpo")
    assert [planned.label for planned in plan.runs] == [
        "proma, seed 5",
        "reinforce, seed 5",
        "grpo, seed 5",
        "proma, seed 6",
        "reinforce, seed 6",
        "grpo, seed 6",
    ]
    assert plan.runs[4].config.run_dir == tmp_path / "compare" / "reinforce_seed6"
    assert (plan.algorithms, plan.seeds) == (("proma", "reinforce", "grpo"), (5, 6))


def test_algorithms_of_a_seed_differ_in_nothing_else(tmp_path: Path) -> None:
    plan = _plan(tmp_path, "proma,grpo,isopo")
    for seed in plan.seeds:
        trees = [p.config.model_dump() for p in plan.runs if p.config.seed == seed]
        for tree in trees:
            del tree["name"], tree["algorithm"], tree["projection"]["rule"]
        assert trees[0] == trees[1] == trees[2]
    # What is validated on, and drawn for training, stays whatever the seed of the run.
    assert {planned.config.data.seed for planned in plan.runs} == {0}


def test_rules_and_losses_go_to_their_own_algorithms(tmp_path: Path) -> None:
    plan = _plan(tmp_path, "proma,intra_proma,isopo,ppo", 1, loss={"kind": "cispo"})
    configs = {planned.algorithm: planned.config for planned in plan.runs}
    assert configs["proma"].projection.rule == "iterative"
    assert configs["intra_proma"].projection.rule == "subspace"
    assert configs["isopo"].projection.rule == "kernel"
    assert {config.projection.bound for config in configs.values()} == {0.25}
    assert configs["ppo"].loss.kind is None
    assert configs["proma"].loss.kind == "cispo"


def test_initial_is_the_warm_start_alone(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    assert plan.initial is not None
    assert plan.initial.run_dir == tmp_path / "compare" / "initial"
    assert (plan.initial.seed, plan.initial.trainer.steps) == (5, 0)
    assert plan.initial.warm_start.steps == 3
    assert {planned.config.warm_start.steps for planned in plan.runs} == {0}
    # Another choice of algorithms must not make another policy of it.
    assert _plan(tmp_path, "isopo", 1).initial == plan.initial


def test_random_weights_are_one_policy_too(tmp_path: Path) -> None:
    plan = _plan(tmp_path, warm_start={"steps": 0})
    assert plan.initial is not None
    assert plan.initial.warm_start.steps == 0


def test_given_model_needs_no_initial_but_for_a_warm_start(tmp_path: Path) -> None:
    model = {"path": str(_policy(tmp_path / "model"))}
    given = _plan(tmp_path, model=model, warm_start={"steps": 0})
    assert given.initial is None
    assert {planned.config.model.path for planned in given.runs} == {tmp_path / "model"}
    warmed = _plan(tmp_path, model=model)
    assert warmed.initial is not None
    assert warmed.initial.model.path == tmp_path / "model"


def test_lagged_kl_is_measured_as_often_as_the_other(tmp_path: Path) -> None:
    assert {p.config.trainer.kl_lagged_every for p in _plan(tmp_path).runs} == {4}
    chosen = _plan(tmp_path, trainer={"steps": 20, "kl_every": 4, "kl_lagged_every": 2})
    assert {p.config.trainer.kl_lagged_every for p in chosen.runs} == {2}


def test_steps_of_the_option_win() -> None:
    plan = plan_runs(TREE, ["proma"], 1, steps=7)
    assert plan.runs[0].config.trainer.steps == 7


@pytest.mark.parametrize(
    ("algorithms", "seeds", "more", "message"),
    [
        ("proma,grop", 1, {}, "has 'grop', expected names out of proma, intra_proma,"),
        ("proma,grpo,proma", 1, {}, "has 'proma' more than once; name it once"),
        ("", 1, {}, "has '', expected names"),
        ("proma", 0, {}, "--seeds is 0, expected a count of at least 1"),
        ("proma", 1, {"trainer": {"steps": 0}}, "trainer.steps is 0, expected at least 1"),
        ("proma", 1, {"rollout": {"samples_per_prompt": 1}}, "samples_per_prompt is 1, expected"),
        ("proma", 1, {"trainer": {"step": 3}}, "unknown key 'trainer.step'"),
    ],
)
def test_bad_plans_are_refused(
    tmp_path: Path, algorithms: str, seeds: int, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")) as error:
        _plan(tmp_path, algorithms, seeds, **more)
    assert "\n" not in str(error.value)


def test_no_algorithms_are_refused() -> None:
    with pytest.raises(ConfigError, match="--algorithms is empty"):
        plan_runs(TREE, [], 1)


def test_every_run_is_checked_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proma_megatron.commands.compare import runs as planning

    check = planning.validate_config

    def pickier(tree: dict[str, Any], **options: Any) -> RunConfig:
        if tree.get("algorithm") == "gspo" and tree["seed"] == 6:
            raise ConfigError("loss.x is 1, expected 2")
        return check(tree, **options)

    monkeypatch.setattr(planning, "validate_config", pickier)
    with pytest.raises(ConfigError, match=r"^for gspo: loss\.x is 1, expected 2$"):
        _plan(tmp_path, "proma,gspo", 2)


def test_shipped_configuration_is_the_papers_setting() -> None:
    plan = plan_runs(read_tree(ROOT / "configs" / "compare.yaml"), ["proma", "grpo"], 1)
    proma, grpo = (planned.config for planned in plan.runs)
    assert (proma.projection.rule, proma.projection.bound) == ("iterative", 0.5)
    assert proma.batching.minibatches == 2
    assert proma.batching.sequences_per_microbatch == proma.rollout.samples_per_prompt
    assert proma.trainer.kl_lagged_every == proma.trainer.kl_every > 0
    assert not grpo.projects


# --------------------------------------------------------------------------- what is left


def _policy(path: Path, **shape: Any) -> Path:
    """A Hugging Face directory without weights."""
    path.mkdir(parents=True)
    fields = write_config(RunConfig(name="x").model.model_copy(update=shape), 300, 64, "float32")
    (path / "config.json").write_text(json.dumps(fields))
    return path


def _start(config: RunConfig, *checkpoints: int) -> RunDir:
    """A run's directory as training leaves it after these checkpoints."""
    run_dir = RunDir(config.run_dir)
    write_run(config.run_dir, noisy_rows(config.trainer.steps, config.seed))
    run_dir.config.write_text(dump_config(config))
    run_dir.tokenizer.write_text("a tokenizer")
    for step in checkpoints:
        complete(run_dir.checkpoint(step))
    return run_dir


def test_what_is_left_of_a_run(tmp_path: Path) -> None:
    config = _plan(tmp_path).runs[0].config
    assert todo(config) is Todo.START
    run_dir = _start(config)
    assert todo(config) is Todo.RESTART
    run_dir.checkpoint(10).mkdir(parents=True)  # not complete
    assert todo(config) is Todo.RESTART
    complete(run_dir.checkpoint(10))
    assert todo(config) is Todo.RESUME
    complete(run_dir.checkpoint(20), pending={"step": 20})  # its validation was interrupted
    assert todo(config) is Todo.RESUME
    complete(run_dir.checkpoint(20))
    assert todo(config) is Todo.NOTHING


def test_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    _start(_plan(tmp_path).runs[0].config, 20)
    other = _plan(tmp_path, optimizer={"lr": 3e-5}).runs[0].config
    with pytest.raises(ConfigError) as error:
        todo(other)
    assert str(error.value) == (
        f"{tmp_path}/compare/proma_seed5 holds a run with optimizer.lr=0.001, but this comparison "
        "has optimizer.lr=3e-05; give it another name, or start it anew with --overwrite"
    )


def test_run_with_a_key_that_is_no_more_is_refused(tmp_path: Path) -> None:
    config = _plan(tmp_path).runs[0].config
    run_dir = _start(config, 20)
    run_dir.config.write_text(yaml.safe_dump({**read_tree(run_dir.config), "old": {"key": 1}}))
    with pytest.raises(ConfigError, match=r"old\.key=1, but this comparison has old\.key=not"):
        todo(config)


def test_run_from_a_policy_takes_its_shape(tmp_path: Path) -> None:
    config = _plan(tmp_path, model={"dtype": "float64", "layers": 2}).runs[0].config
    policy = _policy(tmp_path / "policy", layers=2)
    found = started_from(config, policy, tmp_path / "tokenizer.model")
    assert (found.model.path, found.tokenizer.path) == (policy, tmp_path / "tokenizer.model")
    assert (found.model.vocab_size, found.model.layers, found.model.dtype) == (300, 2, "float64")
    unchanged = ("path", "vocab_size")
    assert found.model.model_dump(exclude={*unchanged}) == config.model.model_dump(
        exclude={*unchanged}
    )
    # And it reads back as itself, so that a second call finds the same configuration.
    (tmp_path / "config.yaml").write_text(dump_config(found))
    assert load_config(tmp_path / "config.yaml") == found


def test_durations_in_words() -> None:
    assert [duration(s) for s in (0.4, 89, 95, 3_600, 12_345)] == [
        "0 s",
        "89 s",
        "2 min",
        "60 min",
        "3 h 26 min",
    ]


# --------------------------------------------------------------------------- the whole command


class Recorder:
    """In place of `launcher.train` and `export`: what was asked for, and files as they leave them.

    ``fails`` is called with the configuration before a run is complete.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.configs: list[RunConfig] = []
        self.fails: Callable[[RunConfig], None] = lambda config: None

    def train(self, config: RunConfig, *, resume: bool, overwrite: bool) -> None:
        assert not (resume and overwrite)
        assert overwrite or resume or not RunDir(config.run_dir).holds_run
        how = "resume" if resume else "overwrite" if overwrite else "start"
        self.calls.append((config.name, how))
        self.configs.append(config)
        run_dir = _start(config)
        self.fails(config)
        _start(config, config.trainer.steps)
        assert run_dir.latest_checkpoint() is not None

    def export(self, saved: PolicySource, out: Path, dtype: None, shard_size: str) -> None:
        assert saved.checkpoint is not None
        self.calls.append(("export", saved.config.name))
        _policy(out)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(launcher, "train", made.train)
    monkeypatch.setattr(launcher, "check_run", lambda config: None)  # it takes a second
    monkeypatch.setattr(job, "export", made.export)
    for variable in ("RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(variable, raising=False)
    return made


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Drawing left out; the number of runs that each picture would have had."""
    drawn: list[int] = []

    def count(plan: Comparison, typed: str) -> tuple[()]:
        drawn.append(sum(len(group.runs) for group in command.groups_of(plan)))
        return ()

    monkeypatch.setattr(command, "draw_comparison", count)
    return drawn


def _command(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, code: int | None = 0
) -> pytest.ExceptionInfo[SystemExit]:
    monkeypatch.setattr("sys.argv", ["proma", "compare", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in ((None, 0) if code == 0 else (code,))
    return stop


RUNS = ["proma_seed5", "grpo_seed5", "proma_seed6", "grpo_seed6"]


def test_whole_command(
    tmp_path: Path,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "my config.yaml"
    config.write_text(yaml.safe_dump({**TREE, "root": str(tmp_path)}))
    arguments = [str(config), "optimizer.lr=2e-4", "--algorithms", "proma, grpo", "--seeds", "2"]
    _command(monkeypatch, *arguments)
    folder = tmp_path / "compare"
    assert recorder.calls == [
        ("initial", "start"),
        ("export", "initial"),
        *((name, "start") for name in RUNS),
    ]
    for started in recorder.configs[1:]:
        assert started.model.path == folder / "initial_policy"
        assert started.tokenizer.path == folder / "initial" / "tokenizer.model"
        assert started.optimizer.lr == 2e-4
    assert {path.name for path in folder.iterdir()} == {
        *RUNS,
        *("initial", "initial_policy"),
        *(f"compare.{kind}" for kind in ("png", "csv", "html", "json")),
    }
    recipe = json.loads((folder / "compare.json").read_text())
    assert recipe["algorithms"] == ["proma", "grpo"]
    assert recipe["seeds"] == [5, 6]
    assert recipe["runs"] == RUNS
    assert recipe["command"].startswith("proma compare '")
    assert "proma-megatron" in recipe["versions"]
    printed = capsys.readouterr().out
    places = [printed.index(f"run {n} of 4: ") for n in (1, 2, 3, 4)]
    assert places == sorted(places)
    assert "run 4 of 4: grpo, seed 6" in printed
    assert "about 0 s left" in printed
    table = printed[printed.index("At the end") :]
    assert [line.split()[:2] for line in table.splitlines() if "grpo" in line or "proma " in line][
        :2
    ] == [["proma", "2"], ["grpo", "2"]]

    recorder.calls.clear()
    (folder / "compare.png").unlink()
    _command(monkeypatch, *arguments)
    assert recorder.calls == []
    assert (folder / "compare.png").stat().st_size < 250_000
    assert "run 3 of 4: proma, seed 6, is finished" in capsys.readouterr().out


def test_picture_after_every_run(tmp_path: Path, recorder: Recorder, pictures: list[int]) -> None:
    compare(_plan(tmp_path), overwrite=False, command="c")
    assert pictures == [1, 2, 3, 4, 4]


def test_failed_comparison_continues(
    tmp_path: Path,
    recorder: Recorder,
    pictures: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = _plan(tmp_path)

    def fail(config: RunConfig) -> None:
        if config.name == "proma_seed6":
            _start(config, 0)
            raise WorkerError("rank 0 failed")

    recorder.fails = fail
    with pytest.raises(WorkerError, match="rank 0 failed"):
        compare(plan, overwrite=False, command="c")
    assert "the same command continues it" in capsys.readouterr().err
    assert recorder.calls[-1] == ("proma_seed6", "start")
    recorder.calls.clear()
    recorder.fails = lambda config: None
    compare(plan, overwrite=False, command="c")
    assert recorder.calls == [("proma_seed6", "resume"), ("grpo_seed6", "start")]
    assert "proma, seed 6, continues from its newest checkpoint" in capsys.readouterr().out


def test_run_without_a_checkpoint_starts_again(
    tmp_path: Path, recorder: Recorder, pictures: list[int]
) -> None:
    plan = _plan(tmp_path, seeds=1)
    compare(plan, overwrite=False, command="c")
    (RunDir(plan.runs[1].config.run_dir).checkpoint(20) / MARKER).unlink()
    recorder.calls.clear()
    compare(plan, overwrite=False, command="c")
    assert recorder.calls == [("grpo_seed5", "overwrite")]


def test_overwrite_makes_everything_anew(
    tmp_path: Path, recorder: Recorder, pictures: list[int]
) -> None:
    compare(_plan(tmp_path), overwrite=False, command="c")
    (tmp_path / "compare" / "notes.txt").write_text("mine")
    recorder.calls.clear()
    compare(_plan(tmp_path, optimizer={"lr": 1e-5}), overwrite=True, command="c")
    assert [name for name, _ in recorder.calls] == ["initial", "export", *RUNS]
    assert (tmp_path / "compare" / "notes.txt").exists()


def test_interrupted_overwrite_does_not_mix_with_what_was_there(
    tmp_path: Path,
    recorder: Recorder,
    pictures: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = _plan(tmp_path)
    compare(plan, overwrite=False, command="c")

    def interrupt(config: RunConfig) -> None:
        raise KeyboardInterrupt

    recorder.fails = interrupt
    with pytest.raises(KeyboardInterrupt):
        compare(plan, overwrite=True, command="c")
    assert "the same command without --overwrite continues it" in capsys.readouterr().err
    recorder.calls.clear()
    recorder.fails = lambda config: None
    compare(plan, overwrite=False, command="c")
    assert [name for name, _ in recorder.calls] == ["initial", "export", *RUNS]


def test_lost_policy_is_exported_again(
    tmp_path: Path, recorder: Recorder, pictures: list[int]
) -> None:
    plan = _plan(tmp_path)
    compare(plan, overwrite=False, command="c")
    (plan.policy / "config.json").unlink()
    plan.policy.rmdir()
    recorder.calls.clear()
    compare(plan, overwrite=False, command="c")
    assert recorder.calls == [("export", "initial")]


def test_runs_of_a_lost_initial_are_refused(
    tmp_path: Path, recorder: Recorder, pictures: list[int]
) -> None:
    plan = _plan(tmp_path)
    compare(plan, overwrite=False, command="c")
    assert plan.initial is not None
    (RunDir(plan.initial.run_dir).checkpoint(0) / MARKER).unlink()
    recorder.calls.clear()
    with pytest.raises(ConfigError, match="which made the policy that it started from"):
        compare(plan, overwrite=False, command="c")
    assert recorder.calls == []


def test_another_configuration_is_refused_before_anything_is_done(
    tmp_path: Path, recorder: Recorder, pictures: list[int]
) -> None:
    compare(_plan(tmp_path, seeds=1), overwrite=False, command="before")
    recorder.calls.clear()
    # initial has no part in the number of RL steps
    longer = _plan(tmp_path, trainer={"steps": 30, "kl_every": 4})
    with pytest.raises(ConfigError, match=r"trainer\.steps=20, but this comparison has"):
        compare(longer, overwrite=False, command="c")
    assert recorder.calls == []
    recipe = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert recipe["command"] == "before"


def test_more_seeds_and_algorithms_join(
    tmp_path: Path, recorder: Recorder, pictures: list[int]
) -> None:
    compare(_plan(tmp_path, "proma", 1), overwrite=False, command="c")
    recorder.calls.clear()
    compare(_plan(tmp_path), overwrite=False, command="c")
    assert recorder.calls == [(name, "start") for name in RUNS[1:]]


def test_given_model_is_not_made(tmp_path: Path, recorder: Recorder, pictures: list[int]) -> None:
    model = {"path": str(_policy(tmp_path / "model"))}
    plan = _plan(tmp_path, model=model, warm_start={"steps": 0})
    compare(plan, overwrite=False, command="c")
    assert [name for name, _ in recorder.calls] == RUNS


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"}
        | {"SLURM_JOB_ID": "7", "SLURM_NODELIST": "one"},
    ],
)
def test_ranks_are_refused(
    tmp_path: Path,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=r"RANK is 1.*without torchrun or srun"):
        compare(_plan(tmp_path), overwrite=False, command="c")
    assert not (tmp_path / "compare").exists()


def test_folder_of_a_run_is_refused(tmp_path: Path, recorder: Recorder) -> None:
    write_run(tmp_path / "compare", noisy_rows(1, 0), name="compare")
    with pytest.raises(ConfigError, match="holds a run, expected a directory for several"):
        compare(_plan(tmp_path), overwrite=True, command="c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"train_file": "a", "validation_file": "b"}}, "expected a file that exists"),
        ({"reward": {"function": "nosuchmodule:f"}}, "nosuchmodule"),
    ],
)
def test_what_can_not_start_removes_nothing(
    tmp_path: Path,
    recorder: Recorder,
    pictures: list[int],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    compare(_plan(tmp_path, seeds=1), overwrite=False, command="c")
    monkeypatch.setattr(launcher, "check_run", CHECK_RUN)
    with pytest.raises(ConfigError, match=message):
        compare(_plan(tmp_path, seeds=1, **change), overwrite=True, command="c")
    initial = _plan(tmp_path).initial
    assert initial is not None
    assert todo(initial) is Todo.NOTHING


def test_overwrite_leaves_no_run_of_the_old_policy(
    tmp_path: Path, recorder: Recorder, pictures: list[int]
) -> None:
    compare(_plan(tmp_path, "proma,isopo"), overwrite=False, command="c")
    smaller = _plan(tmp_path, "proma", 1, warm_start={"steps": 7})
    compare(smaller, overwrite=True, command="c")
    assert smaller.made() == [smaller.runs[0].config.run_dir]


@pytest.mark.usefixtures("in_pool")
def test_real_runs_start_from_one_policy(tmp_path: Path) -> None:
    """Through training, export and loading; only the ranks are those of the pool."""
    tree = {"name": "compare", "root": str(tmp_path), "warm_start": {"steps": 2}}
    plan = plan_runs(apply_overrides(tree, TINY_RUN), ["proma", "grpo"], 1)
    compare(plan, overwrite=False, command="c")
    found = [rl_rows(RunDir(planned.config.run_dir)) for planned in plan.runs]
    for rows in found:
        assert rows[1]["policy/kl_initial"] == pytest.approx(0, abs=1e-6)
        assert rows[1]["policy/kl_lagged"] == pytest.approx(0, abs=1e-6)
    proma, grpo = found
    for key in ("reward/mean", "rollout/length", "policy/entropy"):
        assert proma[1][key] == grpo[1][key]  # one policy, the same prompts and samples
    assert proma[2]["policy/entropy"] != grpo[2]["policy/entropy"]
    assert (plan.folder / "compare.png").is_file()


def test_command_names_a_bad_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ROOT / "configs" / "compare.yaml")
    _command(monkeypatch, path, "--algorithms", "proma,trpo", code=2)
    assert "error: --algorithms has 'trpo'" in capsys.readouterr().err
