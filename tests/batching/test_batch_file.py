"""A batch file gives back the batch that was written, and a bad one is refused by its line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proma_megatron.batching.batch_file import read_batch, write_batch
from proma_megatron.errors import ConfigError
from proma_megatron.types import TrainingSequence

VOCAB = 61
GOOD = {"microbatch": 0, "tokens": [7, 8, 9], "loss_mask": [0, 1, 1], "advantage": 0.5}

finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def sequences(draw: st.DrawFn) -> TrainingSequence:
    length = draw(st.integers(1, 6))

    def entries(element: st.SearchStrategy) -> tuple:
        return tuple(draw(st.lists(element, min_size=length, max_size=length)))

    return TrainingSequence(
        tokens=entries(st.integers(0, VOCAB - 1)),
        loss_mask=entries(st.integers(0, 1)),
        advantage=draw(finite),
        old_logprobs=entries(st.floats(-5, 0)),
        token_weights=entries(finite) if draw(st.booleans()) else None,
    )


def has_loss(batch: list[list[TrainingSequence]]) -> bool:
    return any(sequence.loss_tokens for microbatch in batch for sequence in microbatch)


batches = st.lists(st.lists(sequences(), min_size=1, max_size=3), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batches")


def line(**fields: object) -> str:
    return json.dumps({**GOOD, **fields})


def line_without(field: str) -> str:
    return json.dumps({name: value for name, value in GOOD.items() if name != field})


def read_lines(folder: Path, *lines: str) -> list[list[TrainingSequence]]:
    path = folder / "batch.jsonl"
    path.write_text("\n".join(lines))
    return read_batch(path, VOCAB)


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_batch(path, VOCAB)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# --------------------------------------------------------------------------- good files


def test_a_dump_keeps_log_probabilities_and_what_is_not_finite(folder: Path) -> None:
    path = folder / "dump.jsonl"
    sequence = TrainingSequence(
        tokens=(1, 2, 3),
        loss_mask=(0, 1, 1),
        advantage=-math.inf,
        old_logprobs=(0.0, -1.5, math.inf),
        token_weights=(1.0, math.nan, 0.5),
        reference_logprobs=(0.0, -2.0, -math.inf),
    )
    write_batch(path, [[sequence]], logprobs=True)
    text = path.read_text()
    assert "NaN" not in text, "that is no JSON"
    assert "Infinity" not in text
    ((found,),) = read_batch(path, VOCAB)
    assert repr(found) == repr(sequence)  # NaN is not equal to itself


@settings(deadline=None, max_examples=40)
@given(batch=batches.filter(has_loss))
def test_what_is_written_is_read_back_without_old_logprobs(
    folder: Path, batch: list[list[TrainingSequence]]
) -> None:
    path = folder / "batch.jsonl"
    write_batch(path, batch)
    assert read_batch(path, VOCAB) == [
        [replace(s, old_logprobs=(0.0,) * len(s.tokens)) for s in microbatch]
        for microbatch in batch
    ]


def test_microbatches_ascend_and_keep_the_order_of_their_lines(folder: Path) -> None:
    numbers = [(2, 10), (0, 11), (1, 12), (0, 13), (2, 14), (0, 15)]
    lines = [line(microbatch=index, tokens=[token, 1, 2]) for index, token in numbers]
    firsts = [[s.tokens[0] for s in microbatch] for microbatch in read_lines(folder, *lines)]
    assert firsts == [[11, 13, 15], [12], [10, 14]]


def test_blank_lines_are_skipped(folder: Path) -> None:
    (microbatch,) = read_lines(folder, "", line(tokens=[1, 2, 3]), "  \t", "", line(), "")
    assert [s.tokens for s in microbatch] == [(1, 2, 3), (7, 8, 9)]


def test_weights_are_optional_line_by_line(folder: Path) -> None:
    ((without, weighted),) = read_lines(folder, line(), line(token_weights=[1, 0.25, -2.0]))
    assert without.token_weights is None
    assert weighted.token_weights == (1.0, 0.25, -2.0)


def test_a_microbatch_without_sequences_is_not_written(folder: Path) -> None:
    with pytest.raises(ValueError, match="microbatch 0 has no sequence"):
        write_batch(folder / "hollow.jsonl", [[]])


# --------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        pytest.param(line_without("microbatch"), ["'microbatch' is missing"], id="no microbatch"),
        pytest.param(line_without("tokens"), ["'tokens' is missing"], id="no tokens"),
        pytest.param(line_without("loss_mask"), ["'loss_mask' is missing"], id="no loss_mask"),
        pytest.param(line_without("advantage"), ["'advantage' is missing"], id="no advantage"),
        pytest.param(
            line(token_weight=[1, 1, 1]), ["'token_weight'", "'token_weights'"], id="unknown field"
        ),
        pytest.param(
            line(loss_mask=[0, 1, 1, 1]), ["loss_mask has 4", "3 tokens"], id="longer mask"
        ),
        pytest.param(line(loss_mask=[0, 1]), ["loss_mask has 2", "3 tokens"], id="shorter mask"),
        pytest.param(line(loss_mask=[0, 1, 2]), ["loss_mask[2] is 2", "0 or 1"], id="mask of 2"),
        pytest.param(line(loss_mask=1), ["loss_mask is 1", "a list"], id="mask no list"),
        pytest.param(line(tokens=[7, -1, 9]), ["tokens[1] is -1", "vocabulary"], id="token -1"),
        pytest.param(
            line(tokens=[7, 8, VOCAB]), ["tokens[2] is 61", "0 to 60"], id="token vocab_size"
        ),
        pytest.param(line(tokens=["7", 8, 9]), ["tokens[0] is '7'", "integer"], id="token string"),
        pytest.param(line(tokens=[7, True, 9]), ["tokens[1] is True"], id="token bool"),
        pytest.param(line(tokens=[7, 8.0, 9]), ["tokens[1] is 8.0"], id="token float"),
        pytest.param(line(tokens=[], loss_mask=[]), ["tokens is []"], id="empty tokens"),
        pytest.param(line(tokens="789"), ["tokens is '789'", "a list"], id="tokens no list"),
        pytest.param(line(microbatch=2), ["microbatch is 2", "no microbatch 1"], id="gap"),
        pytest.param(line(microbatch=-1), ["microbatch is -1"], id="negative microbatch"),
        pytest.param(line(microbatch=0.0), ["microbatch is 0.0"], id="microbatch float"),
        pytest.param(line(microbatch=False), ["microbatch is False"], id="microbatch bool"),
        pytest.param(line(advantage=float("nan")), ["advantage is nan"], id="advantage NaN"),
        pytest.param(line(advantage=float("inf")), ["advantage is inf"], id="advantage Infinity"),
        pytest.param(line(advantage="1.5"), ["advantage is '1.5'"], id="advantage string"),
        pytest.param(line(advantage=True), ["advantage is True"], id="advantage bool"),
        pytest.param(line(advantage=10**400), ["advantage is 1000"], id="advantage 10**400"),
        pytest.param(
            line(token_weights=[1, 1]), ["token_weights has 2", "3 tokens"], id="weights too few"
        ),
        pytest.param(
            line(token_weights=[1, float("nan"), 1]), ["token_weights[1] is nan"], id="weight NaN"
        ),
        pytest.param(
            line(token_weights=[1, 1, -(10**400)]), ["token_weights[2] is -1000"], id="weight huge"
        ),
        pytest.param('{"microbatch": 0,', ["not valid JSON"], id="invalid JSON"),
        pytest.param("[" * 100_000, ["not valid JSON"], id="JSON too deep"),
        pytest.param("[0, 1]", ["holds list", "JSON object"], id="JSON list"),
    ],
)
def test_a_bad_line_is_refused_by_number_and_value(
    folder: Path, bad: str, parts: list[str]
) -> None:
    path = folder / "batch.jsonl"
    path.write_text("\n".join([line(), "", bad, line()]))
    message = refusal(path)
    for part in ["line 3", *parts]:
        assert part in message


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        pytest.param(
            line(microbatch=1).encode(),
            ["line 1", "microbatch is 1", "no microbatch 0"],
            id="start at 1",
        ),
        pytest.param(b"", ["empty"], id="empty"),
        pytest.param(b"\n  \n", ["empty"], id="blank lines alone"),
        pytest.param(line().encode() + b"\n\xff\xfe", ["not UTF-8"], id="not UTF-8"),
        pytest.param(
            line(loss_mask=[0, 0, 0]).encode(), ["no loss token", "loss_mask"], id="no loss token"
        ),
        pytest.param(
            line(loss_mask=[1, 0, 0]).encode(), ["no loss token", "loss_mask"], id="only position 0"
        ),
    ],
)
def test_a_bad_file_is_refused(folder: Path, content: bytes, parts: list[str]) -> None:
    path = folder / "batch.jsonl"
    path.write_bytes(content)
    message = refusal(path)
    for part in parts:
        assert part in message


def test_a_missing_file_is_refused(folder: Path) -> None:
    assert "can't be read" in refusal(folder / "none.jsonl")


def test_a_directory_is_refused(folder: Path) -> None:
    assert "can't be read" in refusal(folder)
