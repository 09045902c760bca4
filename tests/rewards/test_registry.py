"""The gsm8k reward compares numbers and the math reward expressions; faults become sentences."""

from __future__ import annotations

import math
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proma_megatron.config.rollout import RewardConfig
from proma_megatron.config.run import RunConfig
from proma_megatron.data.arithmetic import generate_problems
from proma_megatron.errors import ConfigError
from proma_megatron.rewards.gsm8k import gsm8k
from proma_megatron.rewards.judge import Judge, Verdict, load_judge
from proma_megatron.rewards.math_verify import last_box, math_answer
from proma_megatron.rewards.registry import check_reference, check_reward, load_reward

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


# --------------------------------------------------------------------------- math


@pytest.mark.parametrize(
    ("reference", "completion"),
    [
        (r"\frac{1}{2}", r"so \boxed{\frac12}"),
        (r"\frac{1}{2}", "The answer is 0.5."),
        ("1/2", r"\boxed{0.5}"),
        (r"\boxed{\frac{1}{2}}", r"it is $\frac{2}{4}$"),
        (r"Hence the sum is $\boxed{7}$, not 8.", r"\boxed{7}"),
        (r"$x=3$ or $x=4$", r"\boxed{4, 3}"),
        (r"\(\sqrt{8}\)", r"\boxed{2\sqrt2}"),
        ("3,000", "#### 3000"),
        ("3,000", r"\[\boxed{3{,}000}\]"),
        ("7", r"$x = 7$"),
        ("7", r"\boxed{x=7}"),
        ("x = 7", r"\boxed{7}"),
        ("$5", r"\boxed{\$5}"),
        (r"50\%", r"\boxed{50\%}"),
        ("(x+1)^2", r"\boxed{x^2+2x+1}"),
        ("(1,2)", r"\boxed{\left(1, 2\right)}"),
        (r"\text{even}", r"\boxed{even}"),
        ("12", "\\boxed{\n12\\text{ cm}\n}"),
        ("-3", r"\boxed{-3}"),
    ],
)
def test_equal_expressions_earn_one_in_whatever_notation(reference: str, completion: str) -> None:
    assert math_answer("", completion, reference) == 1.0


@pytest.mark.parametrize(
    ("reference", "completion"),
    [
        ("7", ""),
        ("7", "I have no idea"),
        ("7", r"\boxed{}"),
        ("7", r"\boxed{8}"),
        ("7", r"the sum is 7, so \boxed{8}"),
        ("7", "first 7, then 8"),
        ("(1,2)", r"\boxed{[1,2]}"),
        ("1, 2", r"\boxed{2}"),
        (r"2\pi", r"\boxed{2}"),
        (r"3\frac{1}{2}", r"\boxed{\frac{1}{2}}"),
        (r"\frac13", r"\boxed{0.33}"),
        (r"\text{even}", r"\boxed{\text{odd}}"),
        ("x^2+1", r"\boxed{x^2}"),
    ],
)
def test_other_expressions_and_no_answer_earn_nothing(reference: str, completion: str) -> None:
    assert math_answer("", completion, reference) == 0.0


def test_the_last_box_counts() -> None:
    assert math_answer("", r"\boxed{3}, no: \boxed{7}", "7") == 1.0
    assert math_answer("", r"\boxed{7}, no: \boxed{3}", "7") == 0.0
    assert math_answer("", r"\boxed{7}, and so \boxed{\frac{1", "7") == 1.0  # cut off


@pytest.mark.parametrize("reference", ["", "  ", "$ $", r"\boxed{}"])
def test_math_refuses_a_reference_without_an_answer(reference: str) -> None:
    with pytest.raises(ValueError, match="expected an answer in text or LaTeX"):
        math_answer("", r"\boxed{}", reference)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{7}", "7"),
        (r"a \boxed{\frac{1}{2}} b}", r"\frac{1}{2}"),
        (r"{\boxed {x}", "x"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} \boxed{2}", "2"),
        (r"\boxed{\boxed{7}}", r"\boxed{7}"),
        (r"\boxed{1} \boxed{{2}", "1"),
        (r"\boxed{}", ""),
        (r"boxed{7} \boxed 7 \\boxed{7}", None),
        ("", None),
    ],
)
def test_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


@given(st.lists(st.sampled_from(["\\boxed{", "\\", "{", "}", "x", "\n"]), max_size=30))
def test_the_content_of_a_box_has_no_brace_to_spare(parts: list[str]) -> None:
    box = last_box("".join(parts))
    assert box is None or f"\\boxed{{{box}}}" in "".join(parts)
    assert last_box("".join(parts) + "}" * 31 + r"\boxed{y}") in ("y", None)  # "\" hides a brace


def test_the_rewards_load_neither_torch_nor_math_verify() -> None:
    code = (
        "import sys, proma_megatron.rewards.registry, proma_megatron.rewards.pool\n"
        "print([name for name in ('torch', 'math_verify', 'sympy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout == "[]\n"


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
    assert load_reward("math") is math_answer
    assert load_reward("reward_of_test:by_length")("p", "cc", "rrr") == 321.0


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("gsm", "expected 'gsm8k', 'math' or 'package.module:function'"),
        (":f", "expected 'gsm8k', 'math' or 'package.module:function'"),
        ("reward_of_test:", "expected 'gsm8k', 'math' or 'package.module:function'"),
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


# --------------------------------------------------------------------------- checks


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"function": "reward_of_test:absent"}, ["has no 'absent'"]),
        (
            {"function": "reward_of_test:by_length", "format_bonus": 0.1},
            ["reward.format_bonus is 0.1", "set reward.format_pattern"],
        ),
        (
            {"overlong_buffer": 65},
            ["reward.overlong_buffer is 65", "at most rollout.max_new_tokens=64"],
        ),
    ],
)
def test_check_reward_names_the_value_and_the_fix(
    values: dict[str, object], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        check_reward(RewardConfig.model_validate(values), max_new_tokens=64)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.usefixtures("on_path")
def test_check_reward_lets_pass_what_can_run() -> None:
    own = "reward_of_test:by_length"
    check_reward(RewardConfig(format_bonus=0.1, overlong_buffer=64), 64)
    check_reward(RewardConfig(function="math", format_bonus=0.1), 64)
    check_reward(RewardConfig(function=own), 64)
    check_reward(RewardConfig(function=own, format_bonus=0.1, format_pattern="x"), 64)


def test_the_config_takes_math_and_no_broken_pattern() -> None:
    RunConfig(name="a", reward=RewardConfig(function="math", format_pattern="x+"))
    with pytest.raises(ValueError, match=r"reward.format_pattern is 'x\('.*regular expression"):
        RunConfig(name="a", reward=RewardConfig(format_pattern="x("))


@pytest.mark.parametrize(
    ("function", "reference", "problem"),
    [
        ("gsm8k", "1,000", None),
        ("gsm8k", "many", "expected a number"),
        ("gsm8k", "", "expected a number"),
        ("math", r"\frac{1}{2}", None),
        ("math", "many", None),
        ("math", " ", "expected an answer"),
        ("math", r"\boxed{ }", "expected an answer"),
        ("module:function", "", None),
    ],
)
def test_check_reference(function: str, reference: str, problem: str | None) -> None:
    found = check_reference(function, reference)
    assert found == problem if problem is None else problem in str(found)


# --------------------------------------------------------------------------- judges


def judge(value: object) -> Verdict:
    return Judge(lambda *_: value, bool)("the prompt", "text", "11")  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("value", [True, 1, np.float32(1), Fraction(1)])
def test_real_numbers_of_any_type_become_floats(value: object) -> None:
    assert judge(value) == Verdict(1.0, in_form=True)
    assert type(judge(value).score) is float


@pytest.mark.parametrize(
    "value",
    [
        *(None, "1", math.nan, math.inf, -math.inf, 1j, [1.0], Decimal(1)),
        pytest.param(10**400, id="beyond-float"),
    ],
)
def test_what_is_no_finite_number_is_a_fault(value: object) -> None:
    verdict = judge(value)
    assert verdict.fault.startswith(("returned ", "raised OverflowError"))
    assert verdict.score == 0.0


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (KeyError("missing\nkey"), "raised KeyError: 'missing\\nkey'"),
        (ValueError("two\nlines"), "raised ValueError: two lines"),
        (SystemExit(), "raised SystemExit"),
    ],
)
def test_an_exception_is_a_fault_of_one_line(error: BaseException, fault: str) -> None:
    def fails(prompt: str, completion: str, reference: str) -> float:
        raise error

    assert Judge(fails, bool)("", "", "") == Verdict(fault=fault)


def test_a_fault_is_short_whatever_the_function_says() -> None:
    assert len(judge("x" * 100_000).fault) < 1000


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize(
    ("function", "pattern", "completion", "in_form"),
    [
        ("gsm8k", None, "#### 3", True),
        ("gsm8k", None, "#### many", False),
        ("math", None, r"\boxed{3}", True),
        ("math", None, r"\boxed{} 3", False),
        ("math", None, "$3$", False),
        ("math", "^<a>.*</a>$", "<a>1\n2</a>", True),
        ("math", "^<a>.*</a>$", "<a>1\n2</a> 3", False),
        ("gsm8k", "b", "abc #### x", True),
        ("reward_of_test:by_length", None, "#### 3", False),
        ("reward_of_test:by_length", "[0-9]$", "#### 3", True),
    ],
)
def test_the_form_is_the_functions_own_or_the_patterns(
    function: str, pattern: str | None, completion: str, in_form: bool
) -> None:
    assert load_judge(function, pattern)("", completion, "11").in_form is in_form
