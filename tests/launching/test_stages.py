"""What an experiment runs, in terms of the command."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proma_megatron.config.model import ParallelConfig
from proma_megatron.config.run import RunConfig
from proma_megatron.errors import ConfigError
from proma_megatron.launching.stages import CONFIG, stages_of, sweep


def config(name: str = "one") -> RunConfig:
    parallel = ParallelConfig(tensor=2, data=4)
    return RunConfig(name=name, root=Path("/my runs"), parallel=parallel)


def test_a_training_by_itself() -> None:
    (train,) = stages_of([config()])
    assert train.name == "train"
    assert train.arguments == ("train", CONFIG, "--resume-or-start")
    assert train.after is None
    assert train.trains
    assert train.parallel.world_size == 8


def test_what_follows_reads_the_run_of_its_training() -> None:
    train, evaluation, export = stages_of(
        [config()], evaluate="/data/a test.jsonl", samples=4, export="hf"
    )
    assert [stage.name for stage in (train, evaluation, export)] == ["train", "eval", "export"]
    assert [evaluation.after, export.after] == ["train", "train"]
    assert not evaluation.trains
    assert not export.trains
    assert evaluation.arguments == (
        "eval",
        "/my runs/one",
        "--data",
        "/data/a test.jsonl",
        "--samples",
        "4",
        "--overwrite",
    )
    assert export.arguments == (
        "export",
        "/my runs/one",
        "--out",
        "/my runs/one/hf",
        "--overwrite",
        "parallel.data=1",
    )


def test_an_export_takes_one_replica_and_an_evaluation_all() -> None:
    _, evaluation, export = stages_of([config()], evaluate="/test", export="hf")
    assert evaluation.parallel == config().parallel
    assert export.parallel == ParallelConfig(tensor=2, data=1)
    assert "--samples" not in evaluation.arguments


def test_several_trainings_have_names_of_their_own_and_what_follows_each_is_its_own() -> None:
    stages = stages_of([config("a"), config("b")], evaluate="/test", export="hf")
    assert [(stage.name, stage.after) for stage in stages] == [
        ("train-a", None),
        ("eval-a", "train-a"),
        ("export-a", "train-a"),
        ("train-b", None),
        ("eval-b", "train-b"),
        ("export-b", "train-b"),
    ]
    assert stages[4].arguments[1] == "/my runs/b"


# --------------------------------------------------------------------------- sweeps


def test_a_sweep_is_every_combination() -> None:
    assert sweep(["optimizer.lr=1e-6, 2e-6", "algorithm=proma,grpo"]) == [
        ("lr1e-6-algorithmproma", ("optimizer.lr=1e-6", "algorithm=proma")),
        ("lr1e-6-algorithmgrpo", ("optimizer.lr=1e-6", "algorithm=grpo")),
        ("lr2e-6-algorithmproma", ("optimizer.lr=2e-6", "algorithm=proma")),
        ("lr2e-6-algorithmgrpo", ("optimizer.lr=2e-6", "algorithm=grpo")),
    ]


def test_without_axes_there_is_one_training() -> None:
    assert sweep([]) == [("", ())]


def test_combinations_that_would_be_named_alike_are_numbered() -> None:
    assert [name for name, _ in sweep(["a.b=x/y,x_y"])] == ["bx_y-1", "bx_y-2"]
    assert [name for name, _ in sweep(["a.b=1,2", "c.b=1,2"])] == [
        "b1-b1",
        "b1-b2",
        "b2-b1",
        "b2-b2",
    ]


KEY = st.text(alphabet="abc.", min_size=1, max_size=5)
VALUES = st.lists(
    st.text(alphabet="01e-+./ü ", min_size=1, max_size=4).map(str.strip).filter(bool),
    min_size=1,
    max_size=3,
    unique=True,
)


@given(st.dictionaries(KEY, VALUES, min_size=1, max_size=3))
def test_each_combination_has_overrides_and_a_name_of_its_own(axes: dict[str, list[str]]) -> None:
    made = sweep([f"{key}={','.join(values)}" for key, values in axes.items()])
    count = 1
    for values in axes.values():
        count *= len(values)
    assert len({name for name, _ in made}) == len({chosen for _, chosen in made}) == count
    for name, chosen in made:
        assert [item.partition("=")[0] for item in chosen] == list(axes)
        assert all(item.partition("=")[2] in axes[item.partition("=")[0]] for item in chosen)
        RunConfig(name=f"run-{name}")  # fit for one


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        *(
            (
                [axis],
                f"--sweep is '{axis}', expected key=value,value such as optimizer.lr=1e-6,2e-6",
            )
            for axis in ("optimizer.lr", "=1,2", "seed=", "seed=, ,", "")
        ),
        (["seed=1", "seed=2"], "--sweep has seed twice; give all its values at once"),
        (
            ["name=a,b"],
            "--sweep is over name, which follows from the other keys; choose one",
        ),
        (["seed=1,2,1"], "--sweep is 'seed=1,2,1', which has a value twice; leave one out"),
    ],
)
def test_a_sweep_that_is_none_is_refused_in_a_sentence(axes: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(axes)
    assert str(caught.value) == sentence
