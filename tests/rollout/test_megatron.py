"""A rollout is a function of its prompt and its noise: not of batch, layout or cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.generation import (
    NO_EOS,
    Case,
    Decoded,
    generations,
    gradients_around_a_rollout,
    sampled_and_trained_logprobs,
)
from support.gradients import TINY
from support.pool import WorkerPool
from support.slow import all_but

from proma_megatron.config.model import ModelConfig, ParallelConfig
from proma_megatron.rollout.engine import Completion, SamplingOptions

VOCAB = 251
FEW = 13  # a vocabulary in which a token comes again and again
LENGTHS = (3, 1, 9, 5, 5, 2, 7, 12)
NEW = 10
ALL = tuple(range(len(LENGTHS)))
GREEDY = SamplingOptions(max_new_tokens=NEW, batch_size=8, greedy=True)
SAMPLED = SamplingOptions(temperature=0.7, top_k=100, top_p=0.95, max_new_tokens=NEW, batch_size=8)
UNTRUNCATED = replace(SAMPLED, top_k=0, top_p=1.0)
TOP_K = replace(SAMPLED, top_k=3, top_p=1.0)
LAYOUTS = {
    "TP2": ParallelConfig(tensor=2),
    "SP2": ParallelConfig(tensor=2, sequence=True),
    "TP4": ParallelConfig(tensor=4),  # more ranks than key-value heads
    "PP2": ParallelConfig(pipeline=2),
    "VPP2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "TP2xPP2": ParallelConfig(tensor=2, pipeline=2),
}


def prompts_of(vocabulary: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(4)
    return [
        tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist())
        for length in LENGTHS
    ]


def noise() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand((len(LENGTHS), NEW), generator=generator, dtype=torch.float64)


def run(
    workers: WorkerPool,
    parallel: ParallelConfig,
    cases: list[Case],
    vocabulary: int = VOCAB,
    model: ModelConfig = TINY,
    prompts: list[tuple[int, ...]] | None = None,
) -> list[list[Decoded]]:
    """The cases by rank."""
    return workers.run(
        parallel.model_size * (parallel.data or 1),
        generations,
        model=model,
        parallel=parallel,
        vocab_size=vocabulary,
        prompts=prompts or prompts_of(vocabulary),
        noise=noise(),
        cases=cases,
    )


def assert_same(found: list[Completion], expected: list[Completion], atol: float = 1e-12) -> None:
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    assert [c.finished for c in found] == [c.finished for c in expected]
    for x, y in zip(found, expected, strict=True):
        assert x.logprobs == pytest.approx(y.logprobs, abs=atol)


# --------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def alone(workers: WorkerPool) -> dict[str, Decoded]:
    """One rank: batches of 1, 3 and 8, and every prompt in a call of its own."""
    cases = {
        f"{name} {size}": Case(replace(options, batch_size=size), ALL)
        for name, options in (("greedy", GREEDY), ("sampled", SAMPLED))
        for size in (1, 3, 8)
    }
    cases |= {f"greedy row {row}": Case(GREEDY, (row,)) for row in ALL}
    cases["sampled backwards"] = Case(SAMPLED, ALL[::-1])
    cases |= {"untruncated 8": Case(UNTRUNCATED, ALL), "top-k 8": Case(TOP_K, ALL)}
    (found,) = run(workers, ParallelConfig(), list(cases.values()))
    return dict(zip(cases, found, strict=True))


def test_greedy_batch_of_mixed_lengths_equals_one_prompt_at_a_time(
    alone: dict[str, Decoded],
) -> None:
    single = [alone[f"greedy row {row}"].completions[0] for row in ALL]
    assert_same(alone["greedy 8"].completions, single)
    assert len({completion.tokens for completion in single}) > 1
    assert all(len(completion.tokens) == NEW for completion in single)


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_batch_size_changes_no_rollout(alone: dict[str, Decoded], kind: str) -> None:
    whole = alone[f"{kind} 8"]
    assert [batch for batch, _ in whole.decoding] == [8] * NEW
    assert [count for _, count in whole.decoding] == [max(LENGTHS)] + [1] * (NEW - 1)
    for size in (1, 3):
        parts = alone[f"{kind} {size}"]
        assert max(batch for batch, _ in parts.decoding) == size
        assert_same(parts.completions, whole.completions)


def test_order_of_prompts_is_the_order_of_completions(alone: dict[str, Decoded]) -> None:
    backwards = alone["sampled backwards"].completions[::-1]
    assert_same(backwards, alone["sampled 8"].completions)
    assert len({completion.tokens for completion in backwards}) == len(ALL)


def test_samples_of_a_prompt_share_its_forward_pass_and_nothing_else(workers: WorkerPool) -> None:
    prompts = prompts_of(VOCAB)
    prompts[4], prompts[5], prompts[0] = prompts[3], prompts[2], prompts[2]
    together, *singles = [Case(SAMPLED, ALL), *(Case(SAMPLED, (row,)) for row in ALL)]
    one = run(workers, ParallelConfig(), [together, *singles], prompts=prompts)[0]
    several = run(workers, LAYOUTS["PP2"], [together], prompts=prompts)[0]
    alone = [decoded.completions[0] for decoded in one[1:]]
    assert len({completion.tokens for completion in alone}) == len(ALL)
    for found in (one[0], several[0]):
        assert_same(found.completions, alone)
        assert found.decoding == [(5, max(LENGTHS))] + [(len(ALL), 1)] * (NEW - 1)


# --------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", all_but(LAYOUTS, ["TP2", "PP2"]))
def test_layout_changes_no_rollout(
    workers: WorkerPool, alone: dict[str, Decoded], name: str
) -> None:
    kinds = {
        "greedy 8": GREEDY,
        "sampled 8": SAMPLED,
        "untruncated 8": UNTRUNCATED,
        "top-k 8": TOP_K,
    }
    ranks = run(workers, LAYOUTS[name], [Case(options, ALL) for options in kinds.values()])
    for found in ranks:
        for mine, first in zip(found, ranks[0], strict=True):
            assert mine.completions == first.completions, "ranks disagree"
    for kind, decoded in zip(kinds, ranks[0], strict=True):
        assert_same(decoded.completions, alone[kind].completions)


@pytest.mark.parametrize("name", ["TP2", "PP2"])
def test_layout_changes_no_rollout_of_an_untied_model_with_biases(
    workers: WorkerPool, name: str
) -> None:
    model = TINY.model_copy(update={"tie_embeddings": False, "qkv_bias": True, "qk_norm": False})
    cases = [Case(replace(SAMPLED, batch_size=3), ALL)]
    one = run(workers, ParallelConfig(), cases, model=model)[0][0]
    several = run(workers, LAYOUTS[name], cases, model=model)[0][0]
    assert_same(several.completions, one.completions)


# --------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize(
    ("dtype", "error", "name"),
    all_but(
        [
            *(("float64", 1e-12, name) for name in ("one rank", *LAYOUTS)),
            *(("float32", 1e-5, name) for name in ("one rank", "SP2", "TP2xPP2")),
        ],
        [*(("float64", 1e-12, n) for n in ("TP2", "TP4", "PP2")), ("float32", 1e-5, "TP2xPP2")],
    ),
)
def test_sampled_log_probabilities_are_those_of_the_training_forward(
    workers: WorkerPool, dtype: str, error: float, name: str
) -> None:
    parallel = LAYOUTS.get(name, ParallelConfig())
    ranks = workers.run(
        parallel.model_size,
        sampled_and_trained_logprobs,
        model=TINY.model_copy(update={"dtype": dtype}),
        parallel=parallel,
        vocab_size=VOCAB,
        prompts=prompts_of(VOCAB),
        noise=noise(),
        options=replace(SAMPLED, batch_size=5),
    )
    found = [agreement for agreement in ranks if agreement is not None]
    assert len(found) == parallel.tensor
    for agreement in found:
        assert len(agreement.sampled) == NEW * len(ALL)
        assert agreement.trained == pytest.approx(agreement.sampled, abs=error)
        assert agreement.trained == agreement.trained_before, "rollouts left a trace in the model"


@pytest.mark.parametrize("name", ["one rank", "SP2", "VPP2"])
def test_a_rollout_leaves_the_training_gradient_as_it_was(workers: WorkerPool, name: str) -> None:
    """Sequence parallelism, off in rollouts, decides which gradients the ranks add up."""
    parallel = LAYOUTS.get(name, ParallelConfig())
    before, after = workers.run(
        parallel.model_size,
        gradients_around_a_rollout,
        model=TINY,
        parallel=parallel,
        vocab_size=VOCAB,
        prompts=prompts_of(VOCAB),
        noise=noise(),
        options=SAMPLED,
    )[0]
    assert before.keys() == after.keys()
    for tensor, gradient in before.items():
        assert torch.equal(after[tensor], gradient), tensor
        assert bool(gradient.any()), tensor


# --------------------------------------------------------------------------- end of sequence


def cut(completion: Completion, eos: int) -> Completion:
    """What a rollout that goes on past EOS would have been."""
    if eos not in completion.tokens:
        return completion
    end = completion.tokens.index(eos) + 1
    return Completion(completion.tokens[:end], completion.logprobs[:end], finished=True)


def uneven_eos(completions: list[Completion]) -> int:
    """A token that ends as many rows as possible at as many different times as possible."""

    def score(token: int) -> tuple[int, int]:
        ends = [len(cut(c, token).tokens) for c in completions if token in c.tokens]
        return len(set(ends)), -abs(len(ends) - 6)

    return max(range(FEW), key=score)


@pytest.fixture(scope="module")
def endless(workers: WorkerPool) -> list[Completion]:
    """Rollouts that no token ends."""
    (found,) = run(workers, ParallelConfig(), [Case(SAMPLED, ALL)], FEW)
    assert not any(completion.finished for completion in found[0].completions)
    return found[0].completions


@pytest.mark.parametrize("name", all_but(["one rank", "SP2", "PP2", "VPP2"], ["PP2"]))
def test_rows_end_at_eos_and_dropping_them_from_the_cache_changes_nothing(
    workers: WorkerPool, endless: list[Completion], name: str
) -> None:
    eos = uneven_eos(endless)
    expected = [cut(completion, eos) for completion in endless]
    ends = [len(completion.tokens) for completion in expected if completion.finished]
    assert len(set(ends)) >= 3, "the choice of EOS shows nothing"
    assert len(ends) < len(ALL)
    cases = [
        Case(replace(SAMPLED, batch_size=size), ALL, eos, keep_fraction=keep)
        for keep in (0.0, 0.75, 1.0)
        for size in (8, 3)
    ]
    for decoded in run(workers, LAYOUTS.get(name, ParallelConfig()), cases, FEW)[-1]:
        assert_same(decoded.completions, expected)


def test_any_of_several_tokens_ends_a_row(workers: WorkerPool, endless: list[Completion]) -> None:
    """A chat model ends a turn or a text; whichever comes first."""
    eos = uneven_eos(endless)
    other = next(t for c in endless if eos not in c.tokens for t in c.tokens if t != eos)
    expected = [min(cut(c, eos), cut(c, other), key=lambda c: len(c.tokens)) for c in endless]
    assert {c.tokens[-1] for c in expected if c.finished} == {eos, other}
    cases = [Case(SAMPLED, ALL, *stops) for stops in ((eos, (other,)), (other, (eos,)))]
    for decoded in run(workers, ParallelConfig(pipeline=2), cases, FEW)[-1]:
        assert_same(decoded.completions, expected)


def test_the_cache_holds_the_rows_that_its_threshold_asks_for(
    workers: WorkerPool, endless: list[Completion]
) -> None:
    eos = uneven_eos(endless)
    cases = [Case(SAMPLED, ALL, eos, keep_fraction=keep) for keep in (0.0, 0.75, 1.0)]
    (found,) = run(workers, ParallelConfig(), cases, FEW)
    never, some, always = ([batch for batch, _ in decoded.decoding] for decoded in found)
    lengths = [len(cut(completion, eos).tokens) for completion in endless]
    alive = [sum(length > step for length in lengths) for step in range(NEW)]
    assert never == [len(ALL)] * NEW
    assert always == alive
    held = [len(ALL)]
    for count in alive[1:]:
        held.append(count if count <= 0.75 * held[-1] else held[-1])
    assert some == held
    assert len(set(some)) > 1


def test_decoding_stops_when_every_row_has_ended(
    workers: WorkerPool, endless: list[Completion]
) -> None:
    eos = uneven_eos(endless)
    lengths = {i: len(cut(c, eos).tokens) for i, c in enumerate(endless) if eos in c.tokens}
    rows = tuple(i for i, length in lengths.items() if length < NEW)
    assert len(rows) >= 2
    for parallel in (ParallelConfig(), LAYOUTS["PP2"]):
        for keep in (0.0, 1.0):
            ranks = run(workers, parallel, [Case(SAMPLED, rows, eos, keep_fraction=keep)], FEW)
            for (decoded,) in ranks:
                assert len(decoded.decoding) == max(lengths[i] for i in rows) < NEW
                assert all(completion.finished for completion in decoded.completions)


def test_eos_as_the_last_allowed_token_still_finishes_the_row(
    workers: WorkerPool, endless: list[Completion]
) -> None:
    row = 2
    tokens = endless[row].tokens
    step = next(i for i in range(NEW - 1, -1, -1) if tokens[i] not in tokens[:i])
    options = replace(SAMPLED, max_new_tokens=step + 1)
    with_eos = Case(options, (row,), tokens[step])
    without = Case(options, (row,), NO_EOS)
    ((finished, truncated),) = run(workers, ParallelConfig(), [with_eos, without], FEW)
    assert finished.completions[0].tokens == truncated.completions[0].tokens == tokens[: step + 1]
    assert finished.completions[0].finished
    assert not truncated.completions[0].finished


def test_no_prompts_give_no_completions(workers: WorkerPool) -> None:
    ((decoded,),) = run(workers, ParallelConfig(), [Case(SAMPLED, ())])
    assert decoded.completions == []
    assert decoded.decoding == []
