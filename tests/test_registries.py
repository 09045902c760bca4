"""Each kind of name has two tables, of facts and of functions, with the same keys."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any, get_args

import pytest

from proma_megatron.advantages.registry import ESTIMATOR_FUNCTIONS
from proma_megatron.config.choices import (
    ACCUMULATIONS,
    ALGORITHMS,
    ESTIMATORS,
    LOSSES,
    REWARDS,
    RULES,
    rules_of,
)
from proma_megatron.config.fields import Section
from proma_megatron.config.objective import AdvantageConfig, LossConfig, ProjectionConfig
from proma_megatron.config.sections import RunSections
from proma_megatron.losses.registry import LOSS_FUNCTIONS, Surrogate
from proma_megatron.rewards.registry import BUILT_IN


@pytest.mark.parametrize(
    ("facts", "functions"),
    [(LOSSES, LOSS_FUNCTIONS), (ESTIMATORS, ESTIMATOR_FUNCTIONS), (REWARDS, BUILT_IN)],
    ids=["losses", "estimators", "rewards"],
)
def test_facts_and_functions_have_the_same_names(
    facts: Mapping[str, Any], functions: Mapping[str, Any]
) -> None:
    assert list(facts) == list(functions)


@pytest.mark.parametrize(
    ("section", "key", "names"),
    [
        (RunSections, "algorithm", ALGORITHMS),
        (ProjectionConfig, "rule", RULES),
        (LossConfig, "kind", LOSSES),
        (AdvantageConfig, "estimator", ESTIMATORS),
    ],
)
def test_a_key_may_be_what_the_table_names(
    section: type[Section], key: str, names: Mapping[str, Any]
) -> None:
    annotation = section.model_fields[key].annotation
    literal, *_ = [part for part in get_args(annotation) if get_args(part)] or [annotation]
    assert get_args(literal) == tuple(names)


def test_every_rule_is_of_an_algorithm_that_has_a_default() -> None:
    assert {facts.algorithm for facts in RULES.values()} == set(ACCUMULATIONS)
    for algorithm, facts in ACCUMULATIONS.items():
        assert RULES[facts.default_rule].algorithm == algorithm
        assert rules_of(algorithm)[0] == facts.default_rule
    assert sorted(rule for name in ACCUMULATIONS for rule in rules_of(name)) == sorted(RULES)


def test_a_loss_that_knows_the_sign_of_an_advantage_is_no_likelihood() -> None:
    """Weights of a likelihood don't get the advantage; a unit loss leaves it out."""
    for name, facts in LOSSES.items():
        assert isinstance(LOSS_FUNCTIONS[name], Surrogate) or not facts.sign_dependent, name


def test_facts_are_read_without_torch() -> None:
    code = "import sys, proma_megatron.config.choices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
