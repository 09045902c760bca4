"""Data files are read strictly, the same from JSONL and parquet; the sample dataset is correct."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import assert_names

from proma_megatron.config.data import ColumnsConfig
from proma_megatron.data import datasets
from proma_megatron.data.datasets import load_problems
from proma_megatron.errors import ConfigError
from proma_megatron.types import Message, Problem

Rows = list[dict[str, Any]]
SAMPLE = Path(__file__).parents[2] / "configs" / "sample"
NAMED = ColumnsConfig(prompt="ask", answer="key.value", solution="work")


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def verl(prompt: Any = None, truth: Any = "1", **other: Any) -> dict[str, Any]:
    """A row of verl's columns."""
    return {
        "data_source": "test",
        "prompt": [user("q")] if prompt is None else prompt,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        **other,
    }


def named(ask: Any = "q", value: Any = "1", work: Any = "w") -> dict[str, Any]:
    """A row of the columns that NAMED names."""
    return {"ask": ask, "key": {"value": value}, "work": work}


WRITERS = pytest.mark.parametrize(
    ("write", "name"),
    [(write_jsonl, "d.jsonl"), (write_jsonl, "d.json"), (write_parquet, "d.parquet")],
)


# --------------------------------------------------------------------------- schemas


def test_gsm8k_columns(tmp_path: Path) -> None:
    rows = [
        {"question": "How many?", "answer": "40 + 2 = 42\n#### 42"},
        {"question": "And\u2028how much?", "answer": "#### 3 or\n#### $1,000.", "extra": 1},
    ]
    path = tmp_path / "gsm.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    first, second = load_problems(path)
    assert (first.question, first.solution, first.answer) == (*rows[0].values(), "42")
    assert (second.id, second.answer) == ("gsm-3", "1000")
    assert second.question == rows[1]["question"]
    assert first.messages == second.messages == ()


@WRITERS
def test_verl_columns(tmp_path: Path, write: Callable[[Path, Rows], Path], name: str) -> None:
    chat = [{"role": "system", "content": ""}, user("What is 6 * 7?")]
    info = {"split": "train", "index": 0, "answer": "6 * 7 = 42\n#### 42", "question": "6 * 7?"}
    rows = [
        verl(chat, " 42 ", ability="math", extra_info=info),
        verl(chat, "42", ability="math", extra_info=info | {"answer": None}),
    ]
    assert load_problems(write(tmp_path / name, rows)) == [
        Problem(
            id=f"d-{number}",
            question="What is 6 * 7?",
            solution=solution,
            answer="42",
            messages=(Message("system", ""), Message("user", "What is 6 * 7?")),
        )
        for number, solution in ((1, info["answer"]), (2, ""))
    ]


@pytest.mark.parametrize(
    "other", [{}, {"extra_info": None}, {"extra_info": {"index": 1}}, {"extra_info": 3}]
)
@WRITERS
def test_verl_rows_need_no_solution(
    tmp_path: Path, write: Callable[[Path, Rows], Path], name: str, other: dict[str, Any]
) -> None:
    (problem,) = load_problems(write(tmp_path / name, [verl(**other)]))
    assert problem.solution == ""


@WRITERS
def test_verl_wins_over_gsm8k_columns_that_its_file_carries_along(
    tmp_path: Path, write: Callable[[Path, Rows], Path], name: str
) -> None:
    rows = [verl([user("short?")], "7", question="long?", answer="no number")]
    (problem,) = load_problems(write(tmp_path / name, rows))
    assert (problem.question, problem.answer) == ("short?", "7")


@WRITERS
def test_named_columns(tmp_path: Path, write: Callable[[Path, Rows], Path], name: str) -> None:
    rows = [named("How many?", "so #### 3\n#### x + 1 ", "work"), named("Why?", " a b\n", "")]
    first, second = load_problems(write(tmp_path / name, rows), NAMED)
    assert (first.question, first.answer, first.solution) == ("How many?", "x + 1", "work")
    assert (second.question, second.answer, second.solution) == ("Why?", "a b", "")


@WRITERS
def test_named_columns_go_before_known_ones(
    tmp_path: Path, write: Callable[[Path, Rows], Path], name: str
) -> None:
    chat = [user("Hi"), {"role": "assistant", "content": ""}, user("Why?")]
    path = write(tmp_path / name, [verl(question="q", answer="#### 1", chat=chat)])
    columns = ColumnsConfig(prompt="chat", answer="reward_model.ground_truth")
    (problem,) = load_problems(path, columns)
    assert (problem.question, problem.answer, problem.solution) == ("Why?", "1", "")
    assert [message.role for message in problem.messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (42, "42"),
        (-7, "-7"),
        (0, "0"),
        (100, "100"),
        (2**62 + 1, "4611686018427387905"),
        (2.5, "2.5"),
        (42.0, "42"),
        (100.0, "100"),
        (0.1, "0.1"),
        (-0.125, "-0.125"),
        (1e-7, "0.0000001"),
        (1e22, "1" + "0" * 22),
    ],
)
@WRITERS
def test_numbers_become_texts(
    tmp_path: Path,
    write: Callable[[Path, Rows], Path],
    name: str,
    value: float,
    text: str,
) -> None:
    assert load_problems(write(tmp_path / name, [verl(truth=value)]))[0].answer == text
    assert load_problems(write(tmp_path / name, [named(value=value)]), NAMED)[0].answer == text


def test_a_decimal_column_keeps_its_digits(tmp_path: Path) -> None:
    value = Decimal("12345678901234567890.1230")
    (problem,) = load_problems(write_parquet(tmp_path / "d.parquet", [verl(truth=value)]))
    assert problem.answer == "12345678901234567890.123"


@pytest.mark.parametrize(
    ("columns", "key"),
    [
        (ColumnsConfig(prompt="x"), "data.columns.prompt is 'x'"),
        (ColumnsConfig(answer="x"), "data.columns.answer is 'x'"),
        (ColumnsConfig(solution="x"), "data.columns.solution is 'x'"),
        (ColumnsConfig(prompt="x", solution="y"), "data.columns.prompt is 'x'"),
        (ColumnsConfig(answer="x", solution="y"), "data.columns.answer is 'x'"),
    ],
)
def test_prompt_and_answer_are_named_together(columns: ColumnsConfig, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_problems(SAMPLE / "train.jsonl", columns)
    assert_names(error, key, "both data.columns.prompt and data.columns.answer")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q"},
        {"answer": "#### 1"},
        {"prompt": "q", "answer": "1"},
        {"question": "q", "reward_model": "1"},
        {"query": "q", "response": "r"},
    ],
)
@WRITERS
def test_unknown_columns(
    tmp_path: Path, write: Callable[[Path, Rows], Path], name: str, row: dict[str, Any]
) -> None:
    path = write(tmp_path / name, [row])
    with pytest.raises(ConfigError) as error:
        load_problems(path)
    listed = " and ".join(f"'{column}'" for column in row).replace(" and ", ", ")
    assert_names(error, str(path), listed, "data.columns.prompt", "data.columns.answer")


# --------------------------------------------------------------------------- refusals


GOOD = {"question": "q", "answer": "#### 1"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("1" * 10_000, "is not valid JSON"),
        ("[1]", "holds list, expected a JSON object"),
        ("null", "holds NoneType, expected a JSON object"),
        ('{"answer": "#### 1"}', "has no field 'question'; its fields are 'answer'"),
        ('{"question": "q"}', "has no field 'answer'; its fields are 'question'"),
        ("{}", "has no field 'question'; its fields are none"),
        ('{"question": 1, "answer": "#### 1"}', "has question=1, expected a text"),
    ],
)
def test_lines_that_are_no_rows(tmp_path: Path, bad: str, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps(GOOD)
    path.write_text(f"{good}\n\n{bad}\n{good}\n")
    with pytest.raises(ConfigError) as error:
        load_problems(path)
    assert str(error.value).startswith(f"{path}, line 3 {reason}")


# What a row lacks, in the place of a good one; each is a table's last row.
BAD_ROWS = [
    (GOOD, GOOD | {"question": None}, "has question=null, expected a text or a list"),
    (GOOD, GOOD | {"question": ""}, "has an empty question"),
    (GOOD, GOOD | {"question": " \n"}, "has an empty question"),
    (GOOD, GOOD | {"answer": None}, "has answer=null, expected a text"),
    (GOOD, GOOD | {"answer": ""}, "has an answer without a number after '####'"),
    (GOOD, GOOD | {"answer": "1"}, "has an answer without a number after '####'"),
    (GOOD, GOOD | {"answer": "#### one"}, "has an answer without a number after '####'"),
    (verl(), verl() | {"prompt": None}, "has prompt=null, expected a text or a list"),
    (verl(), verl([]), "has an empty prompt"),
    (verl(), verl([user(" ")]), "has an empty prompt"),
    (verl(), verl([user("q"), None]), "has prompt[1]=null, expected a message"),
    (verl(), verl([{"role": "user", "content": None}]), "has prompt[0]={'role': 'user', 'con"),
    (verl(), verl([{"role": None, "content": "q"}]), "has prompt[0]={'role': None, 'con"),
    (
        verl(),
        verl([{"role": "tool", "content": "q"}, user("q")]),
        "has prompt[0].role='tool', expected one of 'system', 'user', 'assistant'",
    ),
    (
        verl(),
        verl([user("q"), {"role": "assistant", "content": "a"}]),
        "has a prompt whose last message is of the role 'assistant', expected 'user'",
    ),
    (verl(), verl() | {"reward_model": None}, "has reward_model=null, expected an object with the"),
    (verl(), verl(truth=None), "has reward_model.ground_truth=null, expected a text or a number"),
    (verl(), verl(truth=" "), "has reward_model.ground_truth=' ', expected an answer"),
    (verl(), verl(truth="5 #### "), "has reward_model.ground_truth='5 #### ', expected an answer"),
    (verl(truth=1.5), verl(truth=float("nan")), "has reward_model.ground_truth=nan, expected a f"),
    (verl(truth=1.5), verl(truth=float("inf")), "has reward_model.ground_truth=inf, expected a f"),
    (named(), named(ask=None), "has ask=null, expected a text or a list of chat messages"),
    (named(), named(ask=" "), "has an empty ask"),
    (named(), named(value=""), "has key.value='', expected an answer"),
    (named(), named() | {"key": None}, "has key=null, expected an object with the field 'value'"),
    (named(), named(work=None), "has work=null, expected a text"),
]


@pytest.mark.parametrize(("good", "bad", "reason"), BAD_ROWS)
@pytest.mark.parametrize(
    ("write", "name", "row"),
    [(write_jsonl, "d.jsonl", "line 3"), (write_parquet, "d.parquet", "row 3")],
)
def test_bad_rows(
    tmp_path: Path,
    write: Callable[[Path, Rows], Path],
    name: str,
    row: str,
    good: dict[str, Any],
    bad: dict[str, Any],
    reason: str,
) -> None:
    columns = NAMED if "ask" in good else datasets.NO_NAMES
    path = write(tmp_path / name, [good, good])
    assert len(load_problems(path, columns)) == 2  # only the third row is to blame
    write(path, [good, good, bad])
    with pytest.raises(ConfigError) as error:
        load_problems(path, columns)
    assert str(error.value).startswith(f"{path}, {row} {reason}")


# Values of a type that the whole column must have in parquet.
BAD_TYPES = [
    (GOOD | {"question": 1}, "has question=1, expected a text or a list of chat messages"),
    (GOOD | {"question": ["q"]}, "has question[0]='q', expected a message with the texts 'role'"),
    (GOOD | {"answer": 1}, "has answer=1, expected a text"),
    (verl(3), "has prompt=3, expected a text or a list of chat messages"),
    (verl({"role": "user", "content": "q"}), "has prompt={'role': 'user', 'content': 'q'}, exp"),
    (verl([{"role": "user"}]), "has prompt[0]={'role': 'user'}, expected a message with the texts"),
    (verl([{"role": "user", "content": 1}]), "has prompt[0]={'role': 'user', 'content': 1}, exp"),
    (verl(truth=True), "has reward_model.ground_truth=True, expected a text or a number"),
    (verl(truth=["1"]), "has reward_model.ground_truth=['1'], expected a text or a number"),
    (verl() | {"reward_model": "1"}, "has reward_model='1', expected an object with the field"),
    (
        verl() | {"reward_model": {"truth": "1"}},
        "has no field 'reward_model.ground_truth'; 'reward_model' has 'truth'",
    ),
    (named(value=False), "has key.value=False, expected a text or a number"),
    (named(work=3), "has work=3, expected a text"),
    ({"ask": "q", "work": "w"}, "has no field 'key.value'; its fields are 'ask', 'work'"),
    ({"other": "q"}, "has no field 'ask'; its fields are 'other'"),
    ({"ask": "q", "key": {"value": "1"}}, "has no field 'work'; its fields are 'ask', 'key'"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_TYPES)
@pytest.mark.parametrize(
    ("write", "name", "row"),
    [(write_jsonl, "d.jsonl", "line 1"), (write_parquet, "d.parquet", "row 1")],
)
def test_bad_types(
    tmp_path: Path,
    write: Callable[[Path, Rows], Path],
    name: str,
    row: str,
    bad: dict[str, Any],
    reason: str,
) -> None:
    is_known = {"question", "reward_model"} & set(bad)
    path = write(tmp_path / name, [bad])
    with pytest.raises(ConfigError) as error:
        load_problems(path, datasets.NO_NAMES if is_known else NAMED)
    assert str(error.value).startswith(f"{path}, {row} {reason}")


def test_a_long_value_is_cut_in_the_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [verl(truth=["1"] * 1000)])
    with pytest.raises(ConfigError, match=re.escape("..., expected a text or a number")) as error:
        load_problems(path)
    assert len(str(error.value)) < len(str(path)) + 200


# --------------------------------------------------------------------------- files


def test_invalid_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\xfd\n")
    with pytest.raises(ConfigError, match="line 2 is not valid JSON"):
        load_problems(path)


@pytest.mark.parametrize("columns", [datasets.NO_NAMES, NAMED])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_jsonl(tmp_path: Path, content: str, columns: ColumnsConfig) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"empty\.jsonl holds no problem"):
        load_problems(path, columns)


@pytest.mark.parametrize("columns", [datasets.NO_NAMES, NAMED])
def test_parquet_without_rows(tmp_path: Path, columns: ColumnsConfig) -> None:
    path = tmp_path / "empty.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]).slice(0, 0), path)
    with pytest.raises(ConfigError, match=r"empty\.parquet holds no problem"):
        load_problems(path, columns)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ""])
def test_missing_files_and_directories(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"d{suffix}"
    with pytest.raises(ConfigError) as missing:
        load_problems(path)
    assert_names(missing, str(path), "does not exist")
    path.mkdir()
    with pytest.raises(ConfigError) as folder:
        load_problems(path)
    assert_names(folder, str(path), "is a directory")


@pytest.mark.parametrize("name", ["d.csv", "d.jsonl.gz", "d"])
def test_unknown_suffix(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / name, [GOOD])
    with pytest.raises(ConfigError) as error:
        load_problems(path)
    assert_names(error, str(path), f"'{path.suffix}'", ".jsonl", ".json", ".parquet")


def damaged(content: bytes) -> Iterator[bytes]:
    """An empty file, one of another format, one cut anywhere, and one with a hole in its data."""
    yield from (b"", b'{"question": "q"}\n' * 10)
    yield from (content[:length] for length in range(1, len(content), 97))
    hole = b"\xff" * 400
    yield content[:4] + hole + content[4 + len(hole) :]


def test_damaged_parquet(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "answer": f"#### {n}"} for n in range(500)]
    path = write_parquet(tmp_path / "d.parquet", rows)
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ConfigError) as error:
            load_problems(path)
        assert_names(error, str(path), "can't be read as parquet")


def test_only_the_needed_columns_of_a_parquet_file_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    iter_batches = pyarrow.parquet.ParquetFile.iter_batches

    def spy(self: Any, *args: Any, columns: list[str], **others: Any) -> Any:
        asked.append(columns)
        return iter_batches(self, *args, columns=columns, **others)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", spy)
    path = write_parquet(tmp_path / "d.parquet", [verl(extra_info={"answer": "w"}, other="x" * 99)])
    assert load_problems(path)[0].solution == "w"
    assert asked == [["extra_info", "prompt", "reward_model"]]


def test_rows_are_counted_through_all_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "BATCH_ROWS", 4)
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(1, 12)]
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    assert [(p.id, p.answer) for p in load_problems(path)] == [
        (f"d-{n}", str(n)) for n in range(1, 12)
    ]
    write_parquet(path, [*rows, GOOD | {"question": ""}])
    with pytest.raises(ConfigError) as caught:
        load_problems(path)
    assert_names(caught, str(path), "row 12", "question")


# --------------------------------------------------------------------------- both formats


QUESTION = st.text(min_size=1).filter(str.strip)
CHAT = st.builds(
    lambda before, last: [*before, user(last)],
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(datasets.ROLES), "content": st.text()}),
        max_size=3,
    ),
    QUESTION,
)
# One type a table: parquet knows no other columns.
ANSWERS: list[st.SearchStrategy[Any]] = [
    st.text(min_size=1).filter(lambda text: text.rpartition("####")[2].strip()),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
]


@st.composite
def tables(draw: st.DrawFn) -> tuple[Rows, ColumnsConfig]:
    """Rows that follow one of the schemas."""
    answer = draw(st.sampled_from(ANSWERS))
    infos = st.none() | st.fixed_dictionaries({"answer": st.none() | st.text()})
    gsm8k_rows = st.builds(
        lambda question, work, n: {"question": question, "answer": f"{work}#### {n}"},
        QUESTION,
        st.text(),
        st.integers(),
    )
    verl_rows = st.builds(
        lambda chat, truth, info: verl(chat, truth, extra_info=info), CHAT, answer, infos
    )
    named_rows = st.builds(named, draw(st.sampled_from([QUESTION, CHAT])), answer, st.text())
    rows = draw(st.sampled_from([gsm8k_rows, verl_rows, named_rows]))
    columns = NAMED if rows is named_rows else datasets.NO_NAMES
    return draw(st.lists(rows, min_size=1, max_size=5)), columns


@settings(max_examples=200, deadline=None)
@given(tables())
def test_both_formats_give_equal_problems(table: tuple[Rows, ColumnsConfig]) -> None:
    rows, columns = table
    with tempfile.TemporaryDirectory() as name:  # tmp_path would be one for all examples
        jsonl = load_problems(write_jsonl(Path(name) / "d.jsonl", rows), columns)
        parquet = load_problems(write_parquet(Path(name) / "d.parquet", rows), columns)
    assert len(jsonl) == len(rows)
    assert [replace(p, id="") for p in jsonl] == [replace(p, id="") for p in parquet]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_as_text_is_the_number(value: float) -> None:
    row = datasets.Row("here", 1, {"answer": value}, ["answer"])
    text = datasets._reference(row, datasets.Schema("", "answer"))
    assert re.fullmatch(r"-?\d+(\.\d*[1-9])?", text)
    assert float(text) == value


# --------------------------------------------------------------------------- the sample dataset


STEP = re.compile(r"\$?([\d,]+) ([-+*/]) \$?([\d,]+) = \$?([\d,]+)( [a-z ]+)?")
UNSAID = {2, 60, 100}  # there and back, minutes of an hour, percent


def numbers_of(text: str) -> set[int]:
    return {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)}


def sample(split: str) -> list[Problem]:
    return load_problems(SAMPLE / f"{split}.jsonl")


@pytest.mark.parametrize(("split", "count"), [("train", 40), ("validation", 16)])
def test_sample_solutions_are_correct(split: str, count: int) -> None:
    problems = sample(split)
    assert len(problems) == count
    for problem in problems:
        *steps, last = problem.solution.split("\n")
        assert 2 <= len(steps) <= 4, problem
        known, unused = numbers_of(problem.question), set[int]()
        result = None
        for step in steps:
            match = STEP.fullmatch(step)
            assert match, step
            x, y, result = (int(match[group].replace(",", "")) for group in (1, 3, 4))
            sign = match[2]
            right = {"+": x + y, "-": x - y, "*": x * y, "/": Decimal(x) / y}[sign]
            assert right == result > 0, step
            assert {x, y} <= known | UNSAID, step  # of the question, or a result before
            unused = (unused - {x, y}) | {result}
            known.add(result)
        assert unused == {result}, problem  # every step leads to the last
        assert last == f"#### {result:,}", problem
        assert problem.answer == str(result), problem


def test_sample_splits_share_no_question() -> None:
    questions = [problem.question for split in ("train", "validation") for problem in sample(split)]
    assert len(set(questions)) == len(questions) == 56


def test_sample_has_large_answers_and_prices() -> None:
    problems = sample("train")
    assert sum("," in p.solution.split("\n")[-1] for p in problems) >= 3
    assert sum("How many dollars" in p.question for p in problems) >= 3
