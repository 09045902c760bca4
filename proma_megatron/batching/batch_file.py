"""Batches as files: one training sequence a line, microbatches given.

`proma grads` reads them. A line is a JSON object with

    microbatch     0..M-1, no number left out; lines may come in any order
    tokens         token ids, at least one
    loss_mask      0 or 1 a token; 1 counts the log-probability of that token given those before it,
                   so what position 0 says never counts
    advantage      a number
    token_weights  numbers, one a token; optional, 1 everywhere without
    old_logprobs, reference_logprobs
                   numbers, one a token; optional. `proma grads` has no use for them; they are there
                   to be looked at in a microbatch that a run has dumped

Numbers are finite. One that is not, and is meant so, is the string "nan", "inf" or "-inf": a dump
has them, and elsewhere they would be mistakes.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proma_megatron.errors import ConfigError
from proma_megatron.types import TrainingSequence

OPTIONAL = {"token_weights", "old_logprobs", "reference_logprobs"}
FIELDS = {"microbatch", "tokens", "loss_mask", "advantage", *OPTIONAL}
WORDS = ("nan", "inf", "-inf")


def read_batch(path: Path, vocab_size: int) -> list[list[TrainingSequence]]:
    """Return the sequences of each microbatch, in the order of their lines.

    Raises:
        ConfigError: the file, or a line of it, is not as described above; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"batch file {path} can't be read ({reason}); give a JSONL file"
        ) from None
    found: dict[int, list[TrainingSequence]] = {}
    first_line: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            index, sequence = _parse(line, vocab_size)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        found.setdefault(index, []).append(sequence)
        first_line.setdefault(index, number)
    if not found:
        raise ConfigError(f"batch file {path} is empty, expected one JSON object a line")
    for expected, index in enumerate(sorted(found)):
        if index != expected:
            raise ConfigError(
                f"{path}, line {first_line[index]}: microbatch is {index}, but there is no "
                f"microbatch {expected}; number them 0, 1, 2, ... without a gap"
            )
    batch = [found[index] for index in sorted(found)]
    if not any(sequence.loss_tokens for microbatch in batch for sequence in microbatch):
        raise ConfigError(
            f"{path} has no loss token: every loss_mask is 0 after position 0; set some to 1"
        )
    return batch


def write_batch(
    path: Path, batch: Sequence[Sequence[TrainingSequence]], logprobs: bool = False
) -> None:
    """Write the file that `read_batch` reads back as the same sequences.

    Args:
        logprobs: with log-probabilities of other policies; without, old ones are read back as 0.

    Raises:
        ValueError: a microbatch without sequences, which the format can't say.
    """
    with path.open("w", encoding="utf-8") as file:
        for index, microbatch in enumerate(batch):
            if not microbatch:
                raise ValueError(f"microbatch {index} has no sequence")
            for sequence in microbatch:
                row = {"microbatch": index, **_row(sequence, logprobs)}
                file.write(json.dumps(row, allow_nan=False) + "\n")


def _row(sequence: TrainingSequence, logprobs: bool) -> dict[str, Any]:
    """Return a line but for its microbatch."""
    row: dict[str, Any] = {
        "tokens": sequence.tokens,
        "loss_mask": sequence.loss_mask,
        "advantage": _word(sequence.advantage),
    }
    values = {"token_weights": sequence.token_weights}
    if logprobs:
        values["old_logprobs"] = sequence.old_logprobs
        values["reference_logprobs"] = sequence.reference_logprobs
    return row | {
        name: [_word(value) for value in found]
        for name, found in values.items()
        if found is not None
    }


def _word(value: float) -> float | str:
    """Return the number, or the word for one that is not finite, for which JSON has none."""
    return value if math.isfinite(value) else str(float(value))


# --------------------------------------------------------------------------- one line


def _parse(line: str, vocab_size: int) -> tuple[int, TrainingSequence]:
    """Return microbatch and sequence of one line; ValueError with what is wrong."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"holds {type(row).__name__}, expected a JSON object")
    missing = FIELDS - OPTIONAL - row.keys()
    if missing:
        raise ValueError(f"field '{min(missing)}' is missing")
    unknown = row.keys() - FIELDS
    if unknown:
        raise ValueError(f"unknown field '{min(unknown)}'; the fields are {sorted(FIELDS)}")
    index = row["microbatch"]
    if not _is_integer(index) or index < 0:
        raise ValueError(f"microbatch is {index!r}, expected an integer from 0")
    tokens = _tokens(row["tokens"], vocab_size)
    optional = {
        name: None if row.get(name) is None else _numbers(name, row[name], len(tokens))
        for name in OPTIONAL
    }
    sequence = TrainingSequence(
        tokens=tokens,
        loss_mask=_mask(row["loss_mask"], len(tokens)),
        advantage=_number("advantage", row["advantage"]),
        old_logprobs=optional["old_logprobs"] or (0.0,) * len(tokens),
        token_weights=optional["token_weights"],
        reference_logprobs=optional["reference_logprobs"],
    )
    return index, sequence


def _tokens(value: Any, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"tokens is {_short(value)}, expected a list of token ids")
    for position, token in enumerate(value):
        if not _is_integer(token):
            raise ValueError(f"tokens[{position}] is {token!r}, expected an integer")
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"tokens[{position}] is {token}, outside the vocabulary of {vocab_size} tokens "
                f"(0 to {vocab_size - 1})"
            )
    return tuple(value)


def _mask(value: Any, length: int) -> tuple[int, ...]:
    _check_length("loss_mask", value, length)
    for position, entry in enumerate(value):
        if entry not in (0, 1):
            raise ValueError(f"loss_mask[{position}] is {entry!r}, expected 0 or 1")
    return tuple(int(entry) for entry in value)


def _numbers(name: str, value: Any, length: int) -> tuple[float, ...]:
    _check_length(name, value, length)
    return tuple(_number(f"{name}[{at}]", entry) for at, entry in enumerate(value))


def _check_length(name: str, value: Any, length: int) -> None:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {_short(value)}, expected a list with one entry a token")
    if len(value) != length:
        raise ValueError(f"{name} has {len(value)} entries for {length} tokens; expected as many")


def _number(name: str, value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float):
        with contextlib.suppress(OverflowError):  # an integer beyond float64
            if math.isfinite(float(value)):
                return float(value)
    if value in WORDS:
        return float(value)
    raise ValueError(f"{name} is {_short(value)}, expected a finite number")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
