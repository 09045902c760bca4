"""Plans cover every sequence within the budget; packed tensors line up with their records."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proma_megatron.batching.packing import (
    consecutive_microbatches,
    loss_tokens,
    pack,
    plan_microbatches,
)
from proma_megatron.types import TrainingSequence

CPU = torch.device("cpu")
BUDGET = 40

lengths_ = st.lists(st.integers(1, BUDGET), max_size=40)
small = st.integers(1, 3)
unhurried = settings(deadline=None)  # torch's first call of anything is slow


@st.composite
def training_sequences(draw: st.DrawFn, referenced: bool = False) -> TrainingSequence:
    length = draw(st.integers(1, 9))

    def entries(element: st.SearchStrategy) -> tuple:
        return tuple(draw(st.lists(element, min_size=length, max_size=length)))

    unit = st.floats(0.25, 4.0)
    return TrainingSequence(
        tokens=entries(st.integers(1, 250)),
        loss_mask=entries(st.integers(0, 1)),
        advantage=draw(st.floats(-3, 3)),
        old_logprobs=entries(st.floats(-5, -0.125)),
        token_weights=entries(unit) if draw(st.booleans()) else None,
        reference_logprobs=entries(st.floats(-5, -0.125)) if referenced else None,
    )


# --------------------------------------------------------------------------- the plan


@unhurried
@given(lengths_, small, small)
def test_every_sequence_is_in_one_microbatch_within_the_budget(
    lengths: list[int], replicas: int, multiple: int
) -> None:
    plan = plan_microbatches(lengths, BUDGET, replicas, multiple)
    flat = [index for replica in plan for microbatch in replica for index in microbatch]
    assert sorted(flat) == list(range(len(lengths)))
    for replica in plan:
        for microbatch in replica:
            assert sum(lengths[index] for index in microbatch) <= BUDGET
            assert microbatch == sorted(microbatch)


@unhurried
@given(lengths_, small, small)
def test_replicas_have_equal_numbers_of_microbatches_in_the_asked_multiple(
    lengths: list[int], replicas: int, multiple: int
) -> None:
    plan = plan_microbatches(lengths, BUDGET, replicas, multiple)
    assert len(plan) == replicas
    counts = {len(replica) for replica in plan}
    assert len(counts) == 1
    (count,) = counts
    assert count >= 1
    assert count % multiple == 0


@unhurried
@given(lengths_, small, small)
def test_loads_differ_by_at_most_the_longest_sequence(
    lengths: list[int], replicas: int, multiple: int
) -> None:
    plan = plan_microbatches(lengths, BUDGET, replicas, multiple)
    loads = [sum(lengths[i] for i in microbatch) for replica in plan for microbatch in replica]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@unhurried
@given(lengths_, small, small)
def test_one_more_round_of_microbatches_than_needed_is_never_used(
    lengths: list[int], replicas: int, multiple: int
) -> None:
    """Were every microbatch at most half full, half as many would have done."""
    plan = plan_microbatches(lengths, BUDGET, replicas, multiple)
    step = replicas * multiple
    count = sum(len(replica) for replica in plan)
    # Two microbatches that are the lightest hold more than the budget, or one could go.
    enough = 2 * sum(lengths) // BUDGET + 1
    assert count <= -(-enough // step) * step


@pytest.mark.parametrize(
    ("count", "length", "replicas", "multiple", "expected"),
    [(8, 10, 1, 1, 2), (9, 10, 1, 1, 3), (8, 10, 1, 3, 3), (9, 10, 2, 1, 4), (1, 1, 2, 2, 4)],
)
def test_no_more_microbatches_than_the_budget_and_the_multiple_ask(
    count: int, length: int, replicas: int, multiple: int, expected: int
) -> None:
    plan = plan_microbatches([length] * count, BUDGET, replicas, multiple)
    assert sum(len(replica) for replica in plan) == expected


def test_replicas_take_turns_in_the_global_order() -> None:
    lengths = [31, 7, 24, 18, 3, 12, 40, 9, 22]
    merged = plan_microbatches(lengths, BUDGET, replicas=1, multiple=6)[0]
    split = plan_microbatches(lengths, BUDGET, replicas=2, multiple=3)
    assert len(merged) == 6
    assert [split[i % 2][i // 2] for i in range(6)] == merged


@unhurried
@given(lengths_, small, small)
def test_a_plan_is_a_function_of_its_arguments(
    lengths: list[int], replicas: int, multiple: int
) -> None:
    first = plan_microbatches(lengths, BUDGET, replicas, multiple)
    torch.rand(3)
    assert plan_microbatches(tuple(lengths), BUDGET, replicas, multiple) == first


def test_a_sequence_over_the_budget_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"sequence 1 has 41 tokens.* 40;.*tokens_per_micro"):
        plan_microbatches([40, 41, 3], BUDGET)


# --------------------------------------------------------------------------- the tensors


@unhurried
@given(st.lists(training_sequences(), max_size=5), st.integers(1, 8))
def test_every_entry_speaks_of_the_token_that_its_position_predicts(
    sequences: list[TrainingSequence], multiple: int
) -> None:
    microbatch = pack(sequences, 3, 11.0, CPU, multiple)
    start = 0
    for sequence in sequences:
        length = len(sequence.tokens)
        for i in range(length):
            t = start + i
            assert int(microbatch.tokens[0, t]) == sequence.tokens[i]
            assert int(microbatch.positions[0, t]) == i
            if i == length - 1:
                assert float(microbatch.loss_mask[t]) == 0  # nothing follows to be predicted
                continue
            weights = sequence.token_weights
            assert int(microbatch.labels[t]) == sequence.tokens[i + 1]
            assert float(microbatch.loss_mask[t]) == sequence.loss_mask[i + 1]
            assert float(microbatch.old_logprobs[t]) == sequence.old_logprobs[i + 1]
            assert float(microbatch.weights[t]) == (weights[i + 1] if weights else 1.0)
        start += length
    assert microbatch.lengths == tuple(len(sequence.tokens) for sequence in sequences)
    assert microbatch.advantages.tolist() == [sequence.advantage for sequence in sequences]
    assert (microbatch.index, microbatch.denominator) == (3, 11.0)
    assert float(microbatch.loss_mask.sum()) == loss_tokens(sequences)


@unhurried
@given(st.lists(training_sequences(), max_size=5), st.integers(1, 8))
def test_padding_is_the_least_to_the_multiple_and_counts_nowhere(
    sequences: list[TrainingSequence], multiple: int
) -> None:
    microbatch = pack(sequences, 0, 1.0, CPU, multiple)
    filled = sum(microbatch.lengths)
    assert microbatch.num_tokens % multiple == 0
    # An empty microbatch is not empty of tokens: Megatron can't run on none.
    assert (
        microbatch.num_tokens - filled < multiple if filled else microbatch.num_tokens == multiple
    )
    for field in (microbatch.loss_mask, microbatch.weights, microbatch.old_logprobs):
        assert not field[filled:].any()
        assert field.dtype == torch.float64
    owner = microbatch.sequences.owner
    expected = [s for s, length in enumerate(microbatch.lengths) for _ in range(length)]
    assert owner.tolist() == expected + [len(sequences)] * (microbatch.num_tokens - filled)


@unhurried
@given(st.lists(training_sequences(), max_size=5), st.integers(1, 8))
def test_per_sequence_values_reach_their_tokens_and_indicators_agree(
    sequences: list[TrainingSequence], multiple: int
) -> None:
    members = pack(sequences, 0, 1.0, CPU, multiple).sequences
    values = torch.arange(1.0, members.count + 1, dtype=torch.float64)
    per_token = members.per_token(values)
    assert per_token.tolist() == [
        float(owner + 1) if owner < members.count else 0.0 for owner in members.owner.tolist()
    ]
    total = len(per_token)
    indicator = members.indicator(0, total, torch.float64)
    torch.testing.assert_close(values @ indicator, per_token, rtol=0, atol=0)
    tail = members.indicator(total // 2, total - total // 2, torch.float64)
    assert torch.equal(tail, indicator[:, total // 2 :])
    if not sequences:
        return
    tokens = torch.arange(1.0, total + 1)[:, None]
    for row, start, length in zip(
        members.padded(tokens), members.offsets, members.lengths, strict=False
    ):
        assert torch.equal(row[:length], tokens[start : start + length])
        assert not row[length:].any()


@unhurried
@given(st.lists(training_sequences(referenced=True), min_size=1, max_size=5), st.integers(1, 8))
def test_reference_log_probabilities_speak_of_the_same_tokens_as_the_old_ones(
    sequences: list[TrainingSequence], multiple: int
) -> None:
    microbatch = pack(sequences, 0, 1.0, CPU, multiple)
    swapped = [replace(s, old_logprobs=s.reference_logprobs) for s in sequences]
    found = microbatch.reference_logprobs
    assert found is not None
    assert torch.equal(found, pack(swapped, 0, 1.0, CPU, multiple).old_logprobs)
    assert found.dtype == torch.float64


@unhurried
@given(training_sequences(), training_sequences(referenced=True))
def test_either_all_sequences_have_reference_log_probabilities_or_none(
    without: TrainingSequence, given_: TrainingSequence
) -> None:
    assert pack([without, without], 0, 1.0, CPU).reference_logprobs is None
    with pytest.raises(ValueError, match="1 of 3 sequences have reference_logprobs"):
        pack([without, given_, without], 0, 1.0, CPU)


@unhurried
@given(st.lists(training_sequences(), max_size=5), st.integers(1, 8))
def test_sums_by_sequence_leave_padding_out(
    sequences: list[TrainingSequence], multiple: int
) -> None:
    microbatch = pack(sequences, 0, 1.0, CPU, multiple)
    members, total = microbatch.sequences, microbatch.num_tokens
    values = torch.arange(1.0, total + 1, dtype=torch.float64)
    assert torch.equal(members.sums(values), members.indicator(0, total, torch.float64) @ values)


def test_an_empty_microbatch_is_padding_alone() -> None:
    microbatch = pack([], 0, 5.0, CPU, multiple=4)
    assert microbatch.num_tokens == 4
    assert microbatch.sequences.count == 0
    assert not microbatch.loss_mask.any()
    assert microbatch.positions.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    "name", ["loss_mask", "old_logprobs", "token_weights", "reference_logprobs"]
)
def test_a_record_of_uneven_tuples_is_refused_by_field(name: str) -> None:
    fields: dict = {
        "tokens": (1, 2, 3),
        "loss_mask": (0, 1, 1),
        "old_logprobs": (0.0, -1.0, -1.0),
        "token_weights": (1.0, 1.0, 1.0),
        "reference_logprobs": (0.0, -1.0, -1.0),
        "advantage": 0.0,
    }
    with pytest.raises(ValueError, match=f"{name} has 2 entries, expected 3"):
        TrainingSequence(**{**fields, name: fields[name][:2]})


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 3), st.integers(1, 2))
def test_consecutive_microbatches_keep_the_order_and_the_replicas_in_step(
    count: int, size: int, replicas: int, multiple: int
) -> None:
    plan = consecutive_microbatches(count, size, replicas, multiple)
    assert len(plan) == replicas
    (each,) = {len(bins) for bins in plan}
    assert each % multiple == 0
    in_order = [plan[i % replicas][i // replicas] for i in range(replicas * each)]
    assert [index for found in in_order for index in found] == list(range(count))
    full = [found for found in in_order if found]
    assert all(len(found) == size for found in full[:-1])
    # A replica has a microbatch even if there is nothing to do.
    assert len(in_order) - len(full) < replicas * multiple + (count == 0)
