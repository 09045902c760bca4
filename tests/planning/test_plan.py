"""The plan as a whole: counts, verdicts, knobs, and how it is shown."""

import io
import json
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from proma_megatron.batching.packing import plan_microbatches
from proma_megatron.config.run import RunConfig
from proma_megatron.planning.counts import count
from proma_megatron.planning.knobs import with_override
from proma_megatron.planning.plan import Plan, make_plan
from proma_megatron.planning.printing import print_plan, size
from proma_megatron.planning.training import in_flight

VOCAB = 151936
GIB = 2**30


def run_config(**changes: dict[str, Any]) -> RunConfig:
    """Qwen3-8B with changes by section."""
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "hidden_size": 4096,
            "ffn_hidden_size": 12288,
            "layers": 36,
            "heads": 32,
            "kv_heads": 8,
            "head_dim": 128,
            "tie_embeddings": False,
            "dtype": "bfloat16",
        },
        "parallel": {"tensor": 4, "data": 2},
        "rollout": {
            "prompts_per_step": 32,
            "samples_per_prompt": 8,
            "max_prompt_tokens": 1024,
            "max_new_tokens": 3072,
        },
        "batching": {"tokens_per_microbatch": 8192},
    }
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    return RunConfig.model_validate({"name": "planned"} | sections)


# --------------------------------------------------------------------------- verdicts and knobs


def test_what_does_not_fit_gets_knobs_that_save_what_they_say() -> None:
    config = run_config()
    plan = make_plan(config, VOCAB, gpu_memory=60 * GIB)
    assert not plan.fits
    assert len(plan.knobs) >= 3
    assert list(plan.knobs) == sorted(plan.knobs, key=lambda knob: -knob.saves)
    for knob in plan.knobs:
        key, _, value = knob.change.partition("=")
        changed = with_override(config, key, json.loads(value) if value != "full" else value)
        assert changed is not None
        again = make_plan(changed, VOCAB, gpu_memory=60 * GIB)
        assert plan.needed - again.needed == knob.saves > 0
        assert again.fits == knob.fits
        assert (again.gpus > plan.gpus) == knob.more_gpus


def test_the_knob_of_each_cause_is_offered() -> None:
    def offered(**changes: dict[str, Any]) -> set[str]:
        plan = make_plan(run_config(**changes), VOCAB, gpu_memory=GIB)
        return {knob.change.partition("=")[0] for knob in plan.knobs}

    long = {"batching": {"tokens_per_microbatch": 32768}}
    assert {"model.recompute", "batching.tokens_per_microbatch"} <= offered(**long)
    decoding = {"rollout": {"prompts_per_step": 512, "batch_size": 1024}}
    assert "rollout.batch_size" in offered(**decoding)
    states = {"model": {"recompute": "full"}, "batching": {"tokens_per_microbatch": 4096}}
    assert "optimizer.distributed" in offered(**states)
    assert "optimizer.distributed" not in offered(parallel={"data": 1})


def test_no_knob_is_invalid() -> None:
    """4 heads can't go over 8 ranks, 6 layers not over 4 stages, and a sequence must fit."""
    model = {"heads": 4, "kv_heads": 2, "layers": 6}
    config = run_config(
        model=model,
        parallel={"tensor": 4, "pipeline": 2},
        batching={"tokens_per_microbatch": 4096},
    )
    plan = make_plan(config, VOCAB, gpu_memory=GIB)
    keys = {knob.change.partition("=")[0] for knob in plan.knobs}
    assert plan.knobs
    assert not keys & {"parallel.tensor", "parallel.pipeline", "batching.tokens_per_microbatch"}


def test_tensor_parallel_stays_within_a_node() -> None:
    def keys(gpus_per_node: int) -> set[str]:
        plan = make_plan(run_config(), VOCAB, gpu_memory=GIB, gpus_per_node=gpus_per_node)
        return {knob.change.partition("=")[0] for knob in plan.knobs}

    assert "parallel.tensor" in keys(8)
    assert "parallel.tensor" not in keys(4)


def test_a_plan_that_fits_says_so() -> None:
    plan = make_plan(run_config(), VOCAB, gpu_memory=1000 * GIB)
    assert plan.fits
    assert not plan.tight
    close = make_plan(run_config(), VOCAB, gpu_memory=plan.needed)
    assert close.fits
    assert close.tight


@pytest.mark.parametrize("name", ["vocab_size", "gpu_memory", "gpus_per_node"])
def test_numbers_must_be_positive(name: str) -> None:
    numbers = {"vocab_size": VOCAB, "gpu_memory": GIB, "gpus_per_node": 8} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0, expected a positive number"):
        make_plan(run_config(), **numbers)


# --------------------------------------------------------------------------- counts


@pytest.mark.parametrize("budget", [4096, 9000, 16384])
@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("virtual", [None, 2])
def test_microbatches_are_those_of_packing(budget: int, replicas: int, virtual: int | None) -> None:
    pipeline = 2 if virtual else 1
    config = run_config(
        parallel={"data": replicas, "pipeline": pipeline, "virtual_pipeline": virtual},
        batching={"tokens_per_microbatch": budget},
    )
    counts = count(config)
    lengths = [config.max_sequence_length] * counts.sequences_per_minibatch
    packed = plan_microbatches(lengths, budget, replicas, pipeline)
    assert {len(found) for found in packed} == {counts.microbatches}
    most = max(len(members) for found in packed for members in found)
    assert most * config.max_sequence_length <= counts.tokens_per_microbatch <= budget


def test_a_fixed_number_of_sequences_decides_over_the_budget() -> None:
    counts = count(run_config(batching={"sequences_per_microbatch": 8}))
    assert counts.sequences_per_microbatch == 8
    assert counts.tokens_per_microbatch == 8 * 4096
    assert counts.microbatches == 32 * 8 // 2 // 8


def test_what_waits_for_its_backward() -> None:
    def waiting(stage: int, **parallel: int) -> int:
        config = run_config(parallel={"data": 1} | parallel)
        return in_flight(config, count(config), stage)

    assert [waiting(stage, pipeline=4) for stage in range(4)] == [4, 3, 2, 1]
    # Interleaved over 2 stages and 3 chunks: 2 warm-up passes a later stage, 2 * 2 for the chunks.
    assert [waiting(stage, pipeline=2, virtual_pipeline=3) for stage in range(2)] == [7, 5]


def test_one_microbatch_projects_nothing() -> None:
    few = run_config(rollout={"prompts_per_step": 2, "samples_per_prompt": 2}).model_dump()
    for rule in ("kernel", "norm", "subspace"):
        algorithm = "intra_proma" if rule == "subspace" else "isopo"
        tree = {**few, "algorithm": algorithm, "projection": {"rule": rule}}
        config = RunConfig.model_validate(tree)
        assert make_plan(config, VOCAB, gpu_memory=GIB).projection_removes is True


# --------------------------------------------------------------------------- what is shown


def shown(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=100)
    print_plan(plan, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("pipeline", [1, 4])
@pytest.mark.parametrize("memory", [20, 200])
def test_tables_fit_into_100_columns(pipeline: int, memory: int) -> None:
    plan = make_plan(run_config(parallel={"pipeline": pipeline}), VOCAB, gpu_memory=memory * GIB)
    text = shown(plan)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text
    assert size(plan.needed) in text
    assert ("Does not fit" in text) == (memory == 20)
    for knob in plan.knobs:
        assert (knob.change in text) == (memory == 20)


def test_one_rank_sends_nothing() -> None:
    small = make_plan(RunConfig(name="planned"), 320, gpu_memory=GIB)
    assert "Nothing crosses ranks" in shown(small)


def test_the_machine_readable_form_is_json() -> None:
    plan = make_plan(run_config(parallel={"pipeline": 2}), VOCAB, gpu_memory=80 * GIB)
    found = json.loads(json.dumps(plan.as_dict()))
    assert found["needed"] == plan.needed
    assert found["fits"] == plan.fits
    for stage, planned in zip(found["stages"], plan.stages, strict=True):
        assert sum(stage["kinds"].values()) == stage["total"] == planned.total


@pytest.mark.parametrize(
    ("count_", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**30 * 3 // 2, "1.5 GiB"),
        (2**50, "1,048,576 GiB"),
    ],
)
def test_sizes_are_readable(count_: int, text: str) -> None:
    assert size(count_) == text


@pytest.mark.ranks
def test_planning_imports_no_megatron() -> None:
    code = "import sys, proma_megatron.planning.printing; print('megatron' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_warm_start_counts_megatrons_own_accumulation() -> None:
    """A dense gradient of an untied embedding, which the projected accumulation never makes."""
    cold = make_plan(run_config(), VOCAB, gpu_memory=GIB)
    warm = make_plan(run_config(warm_start={"steps": 1}), VOCAB, gpu_memory=GIB)
    names = [moment.name for moment in warm.stages[0].training]
    assert set(warm.stages[0].training) > set(cold.stages[0].training)
    assert "warm start: embedding, backward" in names


# --------------------------------------------------------------------------- FP8


def fp8_plan(
    fp8: str = "current",
    *,
    first: int = 0,
    last: int = 0,
    algorithm: str = "proma",
    **changes: Any,
) -> Plan:
    recipe = {"fp8": fp8, "fp8_skip_first": first, "fp8_skip_last": last}
    model = changes.pop("model", {}) | (recipe if fp8 != "none" else {})
    config = run_config(model=model, **changes).model_copy(update={"algorithm": algorithm})
    return make_plan(config, VOCAB, gpu_memory=80 * GIB)


def at(plan: Plan, moment: str, stage: int = 0) -> int:
    (found,) = (m for m in plan.stages[stage].training if m.name == moment)
    return found.activations


def test_layers_that_stay_out_of_fp8_count_as_such() -> None:
    """Without projection an FP8 layer keeps less; each that is skipped brings back its own part."""

    def kept(**options: Any) -> tuple[int, int]:
        config = fp8_plan(algorithm="reinforce", **options)
        return at(config, "fc2, backward"), config.stages[0].update.fp8_weights

    (none, no_copies), (all_, copies) = kept(fp8="none"), kept()
    assert no_copies == 0 < copies
    saved, layer = none - all_, copies // 36
    # The inputs of qkv, fc1 and fc2 take a byte less; attention's output what it did.
    assert saved == 36 * 8192 * (2 * 4096 + 12288 // 4)
    assert kept(first=1) == (all_ + saved // 36, copies - layer)
    assert kept(first=2, last=3) == (all_ + 5 * saved // 36, copies - 5 * layer)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_layer_that_is_recomputed_may_be_one_that_was_skipped(recompute: str) -> None:
    options: dict[str, Any] = {"model": {"recompute": recompute}, "algorithm": "reinforce"}
    everything = at(fp8_plan("none", **options), "fc2, backward")
    in_fp8 = at(fp8_plan(**options), "fc2, backward")
    first = at(fp8_plan(first=1, **options), "fc2, backward")
    assert in_fp8 < first <= everything
    if recompute == "full":
        assert first == everything  # it is the one whose backward comes then


@pytest.mark.parametrize("operands", ["bfloat16", "fp8"])
def test_a_warm_start_keeps_inputs_as_a_run_without_projection(operands: str) -> None:
    plan = fp8_plan(projection={"fp8_operands": operands}, warm_start={"steps": 1})
    warm = {m.name: m for m in plan.stages[0].training if m.name.startswith("warm start: ")}
    plain = fp8_plan(algorithm="reinforce")
    assert len(warm) == len(plain.stages[0].training)
    for moment in plain.stages[0].training:
        assert warm[f"warm start: {moment.name}"].activations == moment.activations
    more = at(plan, "fc2, backward") - at(fp8_plan("none"), "fc2, backward")
    # In a step that compares both are there, a byte an entry more.
    assert more == (36 * 8192 * (2 * 4096 + 12288 // 4) if operands == "fp8" else 0)


def test_fp8_weights_are_shown_where_there_are_any() -> None:
    """Also of a stage without them, beside one that has them; a rollout has none."""
    halves: dict[str, Any] = {"parallel": {"tensor": 4, "pipeline": 2, "data": 1}}
    plan = fp8_plan(first=18, **halves)
    assert [stage.update.fp8_weights > 0 for stage in plan.stages] == [False, True]
    assert all(stage.peak_rollout.fp8_weights == 0 for stage in plan.stages)
    rows = [line.split() for line in shown(plan).splitlines()]
    head = next(row for row in rows if row[:2] == ["stage", "layers"])
    at_fp8 = head.index("FP8") - 1  # "in flight" is two words
    first, second = (row for row in rows if row[:2] in (["0", "18"], ["1", "18"]))
    assert len(first) == len(second) == len(head) - 1
    assert first[at_fp8] == "-"
    assert second[at_fp8] == f"{plan.stages[1].update.fp8_weights / GIB:.1f}"
    without = make_plan(run_config(**halves), VOCAB, gpu_memory=80 * GIB)
    assert "FP8" not in shown(without)
