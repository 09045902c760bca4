"""The gsm8k reward compares numbers; a reward function's faults name the rollout concerned."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proma_megatron.config import ConfigError
from proma_megatron.records import Problem, Prompt, Rollout
from proma_megatron.rollout.rewards import RewardError, gsm8k, load_reward, score
from proma_megatron.rollout.tasks import generate_problems


def rollout(completion: str, reference: str = "11", sample: int = 0) -> Rollout:
    prompt = Prompt(Problem("apples-7", "How many?", "#### 11", reference), "the prompt", (5, 6))
    return Rollout(prompt, sample, (7,), (-0.5,), completion, finished=True)


# --------------------------------------------------------------------------- gsm8k


def test_reference_solutions_earn_one_and_wrong_numbers_nothing() -> None:
    for problem in generate_problems("train", 1000, seed=0):
        wrong = str(int(problem.answer) + 1)
        assert gsm8k("", problem.solution, problem.answer) == 1.0
        assert gsm8k("", problem.solution, wrong) == 0.0
        assert gsm8k("", f"{problem.solution}\n#### {wrong}", problem.answer) == 0.0
        assert gsm8k("", problem.solution.split("#")[0], problem.answer) == 0.0


@pytest.mark.parametrize("written", ["11", "11.0", "$11", "11.", "11.00.", "+11", "011", "11 pens"])
def test_notations_of_the_same_number_are_equal(written: str) -> None:
    assert gsm8k("", f"so #### {written}", "11") == 1.0


@pytest.mark.parametrize("written", ["-11", "1", "111", "1 1", "11x", "11/2", "1e1", "", "x", "٢"])
def test_other_numbers_and_no_numbers_are_not(written: str) -> None:
    assert gsm8k("", f"11\n#### {written}", "11") == 0.0


@given(st.integers(), st.integers())
def test_reward_is_equality_of_numbers(written: int, reference: int) -> None:
    assert gsm8k("", f"#### {written:,}", f"{reference}.0") == float(written == reference)


@given(st.text(), st.integers())
def test_no_text_makes_gsm8k_fail(completion: str, reference: int) -> None:
    assert gsm8k("", completion, str(reference)) in (0.0, 1.0)


# --------------------------------------------------------------------------- load_reward


MODULE = """
constant = 3
def by_length(prompt, completion, reference):
    return float(len(prompt) + 10 * len(completion) + 100 * len(reference))
"""


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reward_of_test.py").write_text(MODULE)
    (tmp_path / "broken_reward_of_test.py").write_text("raise RuntimeError('boom')")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("on_path")
def test_load_reward_finds_the_function() -> None:
    assert load_reward("gsm8k") is gsm8k
    assert load_reward("reward_of_test:by_length")("p", "cc", "rrr") == 321.0


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("gsm", "expected 'gsm8k' or 'package.module:function'"),
        (":f", "expected 'gsm8k' or 'package.module:function'"),
        ("reward_of_test:", "expected 'gsm8k' or 'package.module:function'"),
        ("no_such_module_at_all:f", "ModuleNotFoundError"),
        ("broken_reward_of_test:f", "RuntimeError: boom"),
        ("reward_of_test:absent", "module 'reward_of_test' has no 'absent'"),
        ("reward_of_test:constant", "'constant' is int, expected a function"),
    ],
)
def test_load_reward_explains_what_is_wrong(spec: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_reward(spec)
    assert f"reward.function is '{spec}'" in str(error.value)
    assert reason in str(error.value)


# --------------------------------------------------------------------------- score


def test_score_keeps_order_and_passes_prompt_completion_and_reference() -> None:
    calls = []

    def by_length(prompt: str, completion: str, reference: str) -> float:
        calls.append((prompt, completion, reference))
        return float(len(completion))

    rollouts = [rollout("a" * n, sample=n) for n in (3, 1, 2)]
    scored = score(rollouts, by_length)
    assert [item.rollout for item in scored] == rollouts
    assert [item.reward for item in scored] == [3.0, 1.0, 2.0]
    assert calls[0] == ("the prompt", "aaa", "11")


@pytest.mark.parametrize("value", [True, 1, np.float32(1), Fraction(1)])
def test_real_numbers_of_any_type_become_floats(value: float) -> None:
    (scored,) = score([rollout("")], lambda *_: value)
    assert type(scored.reward) is float
    assert scored.reward == 1.0


@pytest.mark.parametrize(
    "value",
    [
        *(None, "1", math.nan, math.inf, -math.inf, 1j, [1.0], Decimal(1)),
        pytest.param(10**400, id="beyond-float"),
    ],
)
def test_what_is_no_finite_number_is_refused(value: float) -> None:
    with pytest.raises(RewardError, match=r"'apples-7', sample 3, expected a finite number$"):
        score([rollout("", sample=3)], lambda *_: value)


def test_an_exception_of_the_reward_function_names_the_rollout_and_is_attached() -> None:
    def fails_on_second(prompt: str, completion: str, reference: str) -> float:
        if completion == "second":
            raise KeyError("missing\nkey")
        return 0.0

    rollouts = [rollout("first"), rollout("second", sample=1), rollout("third", sample=2)]
    with pytest.raises(RewardError, match=r"KeyError.* on problem 'apples-7', sample 1,") as error:
        score(rollouts, fails_on_second)
    assert isinstance(error.value.__cause__, KeyError)
    assert "\n" not in str(error.value)


def test_a_reference_that_is_no_number_is_a_reward_error() -> None:
    with pytest.raises(RewardError, match="the reference is 'many', expected a number"):
        score([rollout("#### 1", reference="many")], gsm8k)
