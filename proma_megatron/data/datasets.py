"""Problems from data files: JSONL or parquet, in GSM8K's columns, verl's, or named ones.

A file is a table of rows, whatever its format; a schema says where a row holds a problem's parts.
Which schema fits is found by the columns of the first row, and every row must then follow it: what
does not is refused with the file and the row, and never skipped.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proma_megatron.config.data import ColumnsConfig
from proma_megatron.data.answers import ANSWER_MARK, final_answer
from proma_megatron.errors import ConfigError
from proma_megatron.types import Message, Problem

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

ROLES = ("system", "user", "assistant")
BATCH_ROWS = 4096  # of a parquet file that are Python objects at the same time
NO_NAMES = ColumnsConfig()  # the schema is found by the columns


def load_problems(path: Path, columns: ColumnsConfig = NO_NAMES) -> list[Problem]:
    """Read all problems of a data file, in its order; ids are ``<file name>-<row>``, from 1 on.

    Three schemas are known, each in JSONL and in parquet:

        named columns   ``columns`` names the prompt, the reference answer and perhaps a solution
        verl            prompt = [{role, content}, ...], reward_model = {ground_truth, ...}
        GSM8K           question = "...", answer = "<worked solution>\\n#### <number>"

    A prompt is a text or a list of chat messages that ends in the user's. A reference is a text or
    a number; of a text with "####", it is what follows the last one. In JSONL, blank lines are
    skipped but counted.

    Raises:
        ConfigError: the file can't be read, holds no problem or fits no schema; a row (named) does
            not follow its schema; ``columns`` has a prompt without an answer, or the reverse.
    """
    named = _named_schema(columns)
    table = _open(path)
    names = table.columns()
    if names is None:
        raise ConfigError(f"dataset {path} holds no problem; give it at least one row")
    schema = named or _find_schema(names, path)
    return [_problem(row, schema, path) for row in table.rows(schema.columns)]


# --------------------------------------------------------------------------- schemas


@dataclass(frozen=True)
class Schema:
    """Where a row holds a problem's parts, as dotted paths."""

    prompt: str
    answer: str
    solution: str | None = None
    worked: bool = False  # the answer is the solution, and its number after "####" the reference
    partial: bool = False  # rows may lack the solution

    @property
    def columns(self) -> set[str]:
        """The columns of the file that hold these parts."""
        paths = (self.prompt, self.answer, self.solution)
        return {path.split(".")[0] for path in paths if path is not None}


GSM8K = Schema("question", "answer", "answer", worked=True)
VERL = Schema("prompt", "reward_model.ground_truth", "extra_info.answer", partial=True)


def _named_schema(columns: ColumnsConfig) -> Schema | None:
    """Return the schema that the configuration names, if it names one."""
    if columns.prompt is not None and columns.answer is not None:
        return Schema(columns.prompt, columns.answer, columns.solution)
    for key in ("prompt", "answer", "solution"):
        value = getattr(columns, key)
        if value is not None:
            raise ConfigError(
                f"data.columns.{key} is '{value}', but a dataset's own columns need both "
                "data.columns.prompt and data.columns.answer; set both, or none of data.columns"
            )
    return None


def _find_schema(names: Collection[str], path: Path) -> Schema:
    # verl's first: its files may carry GSM8K's columns along, but not the other way round.
    for schema in (VERL, GSM8K):
        if {schema.prompt, schema.answer.split(".")[0]} <= set(names):
            return schema
    raise ConfigError(
        f"dataset {path} has the columns {_listed(names)}, expected 'question' and 'answer', or "
        "'prompt' and 'reward_model'; name its own in data.columns.prompt and data.columns.answer"
    )


# --------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Row:
    """One row of a file, as far as it was read."""

    where: str  # for errors: "train.jsonl, line 17"
    number: int
    values: Mapping[str, Any]
    names: Collection[str]  # of all columns that the row has in the file

    def at(self, path: str) -> Any:
        """Return the value at a dotted path; ConfigError if there is no such field."""
        value: Any = self.values
        parts = path.split(".")
        for depth, part in enumerate(parts):
            above = ".".join(parts[:depth])
            if not isinstance(value, Mapping):
                raise self.unexpected(above, value, f"an object with the field '{part}'")
            if part not in value:
                holder = f"'{above}' has" if above else "its fields are"
                names = value if above else self.names
                raise self.error(f"has no field '{path}'; {holder} {_listed(names)}")
            value = value[part]
        return value

    def error(self, what: str) -> ConfigError:
        return ConfigError(f"{self.where} {what}")

    def unexpected(self, path: str, value: Any, expected: str) -> ConfigError:
        return self.error(f"has {path}={_shown(value)}, expected {expected}")


@dataclass(frozen=True)
class JsonLines:
    """A file with one JSON object a line."""

    path: Path

    def columns(self) -> Collection[str] | None:
        """Return the first row's columns; None if there is no row."""
        first = next(self.rows(), None)
        return None if first is None else first.names

    def rows(self, columns: Collection[str] = ()) -> Iterator[Row]:
        """Yield all rows; a line is read as a whole, whatever the ``columns`` in need."""
        # In bytes: a text file's lines would also end at "\r" and, by str.splitlines, at U+2028.
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise ConfigError(f"dataset {self.path} can't be read: {error.strerror}") from None
        with file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    values = self._parse(line, number)
                    yield Row(f"{self.path}, line {number}", number, values, values.keys())

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        where = f"{self.path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{where} is not valid JSON: {error}; write one object a line"
            ) from None
        if not isinstance(row, dict):
            raise ConfigError(f"{where} holds {type(row).__name__}, expected a JSON object")
        return row


@dataclass(frozen=True)
class Parquet:
    """A parquet file."""

    path: Path

    def columns(self) -> Collection[str] | None:
        """Return the file's columns; None if there is no row."""
        with self._file() as file:
            return file.schema_arrow.names if file.metadata.num_rows else None

    def rows(self, columns: Collection[str]) -> Iterator[Row]:
        """Yield all rows, with the values of these columns alone."""
        with self._file() as file:
            names, number = file.schema_arrow.names, 0
            for batch in file.iter_batches(BATCH_ROWS, columns=sorted(columns)):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{self.path}, row {number}", number, values, names)

    @contextmanager
    def _file(self) -> Iterator[ParquetFile]:
        # Here and not above: a run that generates its problems starts without Arrow.
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(self.path) as file:
                yield file
        # Arrow finds damage when it reads the part that has it, as one of several errors.
        except (ArrowException, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"dataset {self.path} can't be read as parquet: {reason}; write or copy it again"
            ) from None


FORMATS = {".jsonl": JsonLines, ".json": JsonLines, ".parquet": Parquet}


def _open(path: Path) -> JsonLines | Parquet:
    if path.is_dir():
        raise ConfigError(f"dataset {path} is a directory; give the path of a file in it")
    if not path.exists():
        raise ConfigError(f"dataset {path} does not exist; give the path of a data file")
    if path.suffix not in FORMATS:
        raise ConfigError(
            f"dataset {path} has the suffix '{path.suffix}', expected {', '.join(FORMATS)}; "
            "convert the file, or rename it"
        )
    return FORMATS[path.suffix](path)


# --------------------------------------------------------------------------- one row


def _problem(row: Row, schema: Schema, path: Path) -> Problem:
    prompt = row.at(schema.prompt)
    messages = () if isinstance(prompt, str) else _messages(row, schema.prompt, prompt)
    question = messages[-1].content if messages else prompt
    if not question.strip():
        raise row.error(f"has an empty {schema.prompt}, expected a question")
    solution = _solution(row, schema)
    return Problem(
        id=f"{path.stem}-{row.number}",
        question=question,
        solution=solution,
        answer=_worked_number(row, solution) if schema.worked else _reference(row, schema),
        messages=messages,
    )


def _messages(row: Row, path: str, value: Any) -> tuple[Message, ...]:
    """Return the chat at ``path``, whose last message is the user's."""
    if not isinstance(value, list):
        raise row.unexpected(path, value, "a text or a list of chat messages")
    messages = []
    for index, entry in enumerate(value):
        fields = entry if isinstance(entry, Mapping) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            expected = "a message with the texts 'role' and 'content'"
            raise row.unexpected(f"{path}[{index}]", entry, expected)
        if role not in ROLES:
            raise row.unexpected(f"{path}[{index}].role", role, f"one of {_listed(ROLES)}")
        messages.append(Message(role, content))
    if not messages:
        raise row.error(f"has an empty {path}, expected at least the user's message")
    if messages[-1].role != "user":
        raise row.error(
            f"has a {path} whose last message is of the role '{messages[-1].role}', expected "
            "'user'; leave out what follows the question"
        )
    return tuple(messages)


def _solution(row: Row, schema: Schema) -> str:
    if schema.solution is None:
        return ""
    if schema.partial:
        return _text_or_nothing(row.values, schema.solution)
    solution = row.at(schema.solution)
    if not isinstance(solution, str):
        raise row.unexpected(schema.solution, solution, "a text")
    return solution


def _text_or_nothing(values: Mapping[str, Any], path: str) -> str:
    value: Any = values
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else ""


def _worked_number(row: Row, solution: str) -> str:
    """Return the number in which a worked answer ends."""
    number = final_answer(solution)
    if number is None:
        raise row.error(
            f"has an answer without a number after '{ANSWER_MARK}'; end it in a line such as "
            f"'{ANSWER_MARK} 42'"
        )
    return format(number, "f")


def _reference(row: Row, schema: Schema) -> str:
    """Return the reference as text: a number in full, of a marked text what is after the mark."""
    value = row.at(schema.answer)
    if isinstance(value, str):
        text = value.rpartition(ANSWER_MARK)[2].strip()
        if not text:
            raise row.unexpected(schema.answer, value, "an answer")
        return text
    # A bool is an int to Python, but no number that anyone meant.
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise row.unexpected(schema.answer, value, "a text or a number")
    number = Decimal(str(value))  # str, because it is the shortest that gives a float again
    if not number.is_finite():
        raise row.unexpected(schema.answer, value, "a finite number")
    digits = format(number, "f")  # without an exponent
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _shown(value: Any) -> str:
    """Put a value in an error, as JSON says it where Python differs, and cut to a line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
