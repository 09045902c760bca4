"""Groups that teach something are chosen; others fill up."""

from __future__ import annotations

import pytest

from proma_megatron.rollout.selection import choose, informative
from proma_megatron.types import Problem, Prompt, Rollout, RolloutGroup, ScoredRollout


def group(name: str, *rewards: float) -> RolloutGroup:
    prompt = Prompt(Problem(name, "q", "", "1"), "q", (1,))
    return RolloutGroup(
        prompt,
        tuple(
            ScoredRollout(Rollout(prompt, at, (2,), (-1.0,), "a", True), reward, reward)
            for at, reward in enumerate(rewards)
        ),
    )


GROUPS = [group("a", 1, 1), group("b", 0, 1), group("c", 0, 0), group("d", 1, 0), group("e", 2, 1)]


def names(groups: list[RolloutGroup]) -> str:
    return "".join(found.prompt.problem.id for found in groups)


def test_informative_groups_are_those_with_different_rewards() -> None:
    assert names(informative(GROUPS)) == "bde"


@pytest.mark.parametrize(("wanted", "chosen"), [(2, "bd"), (3, "bde"), (4, "abde"), (5, "abcde")])
def test_informative_groups_are_chosen_first_and_none_is_moved(wanted: int, chosen: str) -> None:
    assert names(choose(GROUPS, wanted)) == chosen
