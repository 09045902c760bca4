"""Every rule that a configuration may name has an updater."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.distributed.topology import Axis
from proma_megatron.projection.updaters.registry import UPDATERS, make_updater

ALONE = Axis(None, size=1, rank=0)  # type: ignore[arg-type]


def test_every_rule_but_none_has_an_updater() -> None:
    rules = {*get_args(ProjectionConfig.model_fields["rule"].annotation)}
    assert set(UPDATERS) == rules - {"none"}


@pytest.mark.parametrize("rule", UPDATERS)
def test_an_updater_takes_its_rule(rule: str) -> None:
    config = ProjectionConfig.model_validate({"rule": rule})
    made = make_updater(config, ALONE, torch.float32)
    assert type(made) is UPDATERS[rule]


def test_accumulation_without_a_rule_has_no_updater() -> None:
    with pytest.raises(ValueError, match=r"projection\.rule=none has no updater"):
        make_updater(ProjectionConfig(rule="none"), ALONE, torch.float32)
