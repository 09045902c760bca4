"""Built-in problems are correct, distinct and split without overlap; answers are numbers."""

from __future__ import annotations

import re
from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.messages import assert_names

from proma_megatron.data import arithmetic
from proma_megatron.data.answers import final_answer, parse_number
from proma_megatron.data.arithmetic import TEMPLATES, generate_problems
from proma_megatron.types import Problem

STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


def every_template(per_template: int) -> list[Problem]:
    return [
        template.problem(index)
        for template in TEMPLATES
        for index in range(0, template.size, max(1, template.size // per_template))
    ]


def test_solution_arithmetic_is_correct_and_ends_in_the_answer() -> None:
    for problem in every_template(1000):
        *steps, last = problem.solution.split("\n")
        result = None
        for step in steps:
            match = STEP.fullmatch(step)
            assert match, problem
            x, sign, y, result = int(match[1]), match[2], int(match[3]), int(match[4])
            assert {"+": x + y, "-": x - y, "*": x * y}[sign] == result >= 0, problem
        assert last == f"#### {result}", problem
        assert problem.answer == str(result), problem


def test_every_number_of_the_question_is_used_once_and_nothing_else_is() -> None:
    for problem in every_template(1000):
        known = Counter(re.findall(r"\d+", problem.question))
        for step in problem.solution.split("\n")[:-1]:
            match = STEP.fullmatch(step)
            assert match
            known.subtract((match[1], match[3]))
            known[match[4]] += 1
        assert +known == Counter([problem.answer]), problem
        assert not -known, problem


def test_questions_are_short() -> None:
    assert max(len(problem.question.split()) for problem in every_template(1000)) <= 30


def test_a_template_makes_as_many_questions_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fewer values keep this exhaustive: the index arithmetic is the same.
    monkeypatch.setattr(arithmetic, "NAMES", arithmetic.NAMES[:3])
    monkeypatch.setattr(arithmetic, "ITEMS", arithmetic.ITEMS[:2])
    for template in TEMPLATES:
        questions = {template.problem(index).question for index in range(template.size)}
        assert len(questions) == template.size, template.name


def test_splits_share_no_question_whatever_the_seeds() -> None:
    train = {p.question for seed in (0, 1, 7) for p in generate_problems("train", 20_000, seed)}
    held_out = {p.question for seed in (0, 3) for p in generate_problems("validation", 4_000, seed)}
    assert len(train) > 20_000  # the seeds do give different problems
    assert not train & held_out


@pytest.mark.parametrize("split", ["train", "validation"])
def test_problems_are_distinct_and_a_smaller_count_is_a_prefix(split: arithmetic.Split) -> None:
    problems = generate_problems(split, 5_000, seed=4)
    assert len(problems) == 5_000
    assert len({p.question for p in problems}) == len({p.id for p in problems}) == 5_000
    assert generate_problems(split, 1_234, seed=4) == problems[:1_234]


def test_all_templates_have_the_same_share() -> None:
    problems = generate_problems("train", 100 * len(TEMPLATES), seed=0)
    counts = Counter(problem.id.rsplit("-", 1)[0] for problem in problems)
    assert counts == {template.name: 100 for template in TEMPLATES}


def test_splits_together_are_everything_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    small = next(template for template in TEMPLATES if template.name == "boxes")
    monkeypatch.setattr(arithmetic, "TEMPLATES", (small,))
    everything = {small.problem(index).question for index in range(small.size)}
    owned = Counter(arithmetic.split_of(question) for question in everything)
    assert 0.05 < owned["validation"] / small.size < 0.2
    train = generate_problems("train", owned["train"], seed=1)
    held_out = generate_problems("validation", owned["validation"], seed=2)
    assert {p.question for p in train} | {p.question for p in held_out} == everything
    with pytest.raises(ValueError, match=rf"has only {owned['train']:,} different"):
        generate_problems("train", owned["train"] + 1, seed=1)


def test_a_count_beyond_all_templates_fails_at_once() -> None:
    with pytest.raises(ValueError, match="lower") as caught:
        generate_problems("validation", 10**9, seed=0)
    assert_names(caught, "1,000,000,000 validation problems", "lower data.")


@given(st.integers(1, 200), st.integers())
def test_shuffled_is_a_permutation(size: int, seed: int) -> None:
    order = list(arithmetic._shuffled(size, arithmetic.random.Random(seed)))
    assert sorted(order) == list(range(size))


@pytest.mark.parametrize(("largest", "steps"), [(9, 1), (9, 2), (12, 1), (20, 2)])
def test_difficulty_bounds_numbers_and_steps(largest: int, steps: int) -> None:
    problems = generate_problems("train", 500, 0, largest=largest, steps=steps)
    for problem in problems:
        numbers = [int(n) for n in re.findall(r"\d+", problem.question)]
        assert max(numbers) <= largest
        assert len(problem.solution.splitlines()) - 1 <= steps
    assert max(len(p.solution.splitlines()) - 1 for p in problems) == steps


def test_difficulty_leaves_ids_their_meaning() -> None:
    easy = {p.id: p.question for p in generate_problems("train", 2000, 0, largest=9, steps=1)}
    hard = {p.id: p.question for p in generate_problems("train", 100_000, 0)}
    assert set(easy) & set(hard)
    assert all(hard[key] == easy[key] for key in set(easy) & set(hard))


# --------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 11", "11"),
        ("####11", "11"),
        ("#### 3\n#### 4", "4"),
        ("#### $1,234.50", "1234.5"),
        ("#### 7.", "7"),
        ("#### -3 apples\nmore", "-3"),
        ("#### -$5", "-5"),
        ("#### .5", "0.5"),
    ],
)
def test_final_answer(text: str, number: str) -> None:
    assert final_answer(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    ["11", "### 11", "####", "#### ", "####\n11", "#### 1\n####", "#### x", "#### 3x", "#### 1e3"],
)
def test_no_final_answer(text: str) -> None:
    assert final_answer(text) is None


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3))
def test_thousands_separators_do_not_matter(number: Decimal) -> None:
    assert parse_number(f"{number:,f}") == number


@given(st.text())
def test_any_text_has_a_final_answer_or_none(text: str) -> None:
    answer = final_answer("####" + text)
    assert answer is None or answer.is_finite()
