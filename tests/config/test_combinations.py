"""What goes together: every combination either has a meaning, or is refused with what to use."""

from __future__ import annotations

from typing import Any

import pytest
from support.messages import assert_names

from proma_megatron.config.choices import ACCUMULATIONS, ALGORITHMS, LOSSES
from proma_megatron.config.loading import apply_overrides, validate_config
from proma_megatron.config.run import RunConfig
from proma_megatron.config.sections import loss_kind, normalizes_std
from proma_megatron.errors import ConfigError
from proma_megatron.losses.options import aggregation, loss_options


def config(*overrides: str, **tree: Any) -> RunConfig:
    return validate_config(apply_overrides({"name": "run", **tree}, overrides), training=True)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    return str(caught.value)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_runs_with_its_defaults(algorithm: str) -> None:
    found = config(f"algorithm={algorithm}")
    assert found.projects is (algorithm in ACCUMULATIONS)
    if algorithm in ACCUMULATIONS:
        assert found.projection.rule == ACCUMULATIONS[algorithm].default_rule
        assert loss_options(found).kind == "reinforce"
    else:
        assert loss_options(found).kind == algorithm
    assert loss_options(found).unit is found.projects
    assert loss_options(found).entropy == loss_options(found).kl == 0
    assert normalizes_std(found) is False


def test_resolved_defaults_are_those_of_the_papers() -> None:
    def clips(algorithm: str) -> tuple[float | None, float | None]:
        options = loss_options(config(f"algorithm={algorithm}"))
        return options.clip_low, options.clip_high

    assert clips("ppo") == clips("grpo") == clips("dr_grpo") == (0.2, 0.2)
    assert clips("gspo") == (3e-4, 4e-4)
    assert clips("cispo") == (1.0, 0.2)
    modes = {name: aggregation(config(f"algorithm={name}"))[0] for name in ALGORITHMS}
    assert modes.pop("gspo") == "sequence_mean"
    assert modes.pop("dr_grpo") == "sequence_sum"
    assert set(modes.values()) == {"token_mean"}
    assert aggregation(config("rollout.max_new_tokens=32"))[1] == 32
    assert normalizes_std(config("advantage.estimator=reinforce_plus_plus"))
    chosen = loss_options(config("algorithm=gspo", "loss.clip_high=0.01"))
    assert (chosen.clip_low, chosen.clip_high) == (3e-4, 0.01)


@pytest.mark.parametrize("algorithm", ACCUMULATIONS)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_is_projected_exactly_or_refused_by_name(algorithm: str, kind: str) -> None:
    chosen = (f"algorithm={algorithm}", f"loss.kind={kind}")
    if kind in ("reinforce", "cispo"):
        assert loss_kind(config(*chosen)) == kind
        return
    fixes = ("loss.kind=cispo or reinforce", "loss.clip=false")
    assert_names(refusal(*chosen), f"loss.kind is {kind}", *fixes)
    unclipped = loss_options(config(*chosen, "loss.clip=false"))
    assert (unclipped.unit, unclipped.clip_low, unclipped.clip_high) == (True, None, None)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["algorithm=isopo", "projection.rule=exact"], ["exact", "use kernel or norm", "=proma"]),
        (["algorithm=proma", "projection.rule=norm"], ["exact, iterative, ridge", "=isopo"]),
        (["algorithm=intra_proma", "projection.rule=none"], ["none", "use subspace"]),
        (["algorithm=intra_proma", "projection.rank=64"], ["rank is 64", "smaller rank"]),
        (["algorithm=gspo", "loss.ratio=token"], ["gspo", "token", "use ppo or grpo"]),
        (["algorithm=grpo", "loss.ratio=sequence"], ["single tokens", "use gspo"]),
        (["algorithm=gspo", "loss.dual_clip=3"], ["dual_clip is 3.0", "use ppo"]),
        (["algorithm=ppo", "loss.dual_clip=3", "loss.clip=false"], ["loss.clip=false"]),
        (["algorithm=ppo", "loss.dual_clip=0.5"], ["loss.dual_clip", "greater than 1"]),
        (["algorithm=grpo", "loss.kind=ppo"], ["use algorithm=ppo"]),
        (["algorithm=proma", "loss.entropy=0.01"], ["loss.entropy is 0.01", "reinforce"]),
        (["algorithm=isopo", "loss.kl.coefficient=0.1"], ["0.1", "loss.kl.place=reward"]),
        (
            ["algorithm=ppo", "loss.kl={coefficient: 1, place: reward, reference: rollout}"],
            ["always 0", "reference=initial"],
        ),
        (["algorithm=grpo", "loss.kl={coefficient: 1, estimator: k1}"], ["k1", "use k2 or k3"]),
        (["algorithm=ppo", "loss.kl.target=0.01"], ["loss.kl.target is 0.01", "such as 1"]),
        (["rollout.samples_per_prompt=1"], ["samples_per_prompt is 1", "at least 2"]),
        (["algorithm=grpo", "rollout.samples_per_prompt=1"], ["samples_per_prompt is 1"]),
        (
            [
                "rollout.samples_per_prompt=2",
                "advantage={estimator: leave_one_out, normalize_std: true}",
            ],
            ["samples_per_prompt is 2", "at least 3"],
        ),
        (["advantage={estimator: rloo, normalize_std: true}"], ["rloo", "use leave_one_out"]),
        (["algorithm=dr_grpo", "advantage.normalize_std=true"], ["dr_grpo", "use grpo"]),
        (
            ["algorithm=dr_grpo", "advantage.estimator=reinforce_plus_plus"],
            ["estimator is reinforce_plus_plus", "normalize_std=false"],
        ),
        (["algorithm=reinforce", "projection.rule=kernel"], ["kernel", "use algorithm=isopo"]),
        (["algorithm=grpo", "projection.rule=subspace"], ["use algorithm=intra_proma"]),
        (
            ["algorithm=ppo", "loss.kl={coefficient: 1, reference: rollout}"],
            ["minibatches=1", "at least 2 minibatches"],
        ),
        (
            ["algorithm=reinforce", "loss.entropy=0.1", "batching.zero_advantage=drop"],
            ["zero_advantage is drop", "use keep"],
        ),
        (
            ["algorithm=grpo", "loss.kl.coefficient=0.1", "batching.zero_advantage=drop"],
            ["zero_advantage is drop", "use keep"],
        ),
        (["algorithm=[proma]"], ["algorithm is ['proma']"]),
        (["algorithm=gspoo"], ["'gspoo'", "'gspo'"]),
        (["advantage.estimator=gae"], ["'gae'", "'rloo'"]),
        (["loss.kl.estimator=k4"], ["loss.kl.estimator", "'k3'"]),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_to_use(
    overrides: list[str], parts: list[str]
) -> None:
    assert_names(refusal(*overrides), *parts)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm=proma", "loss.kl={coefficient: 0.1, place: reward}"],
        ["algorithm=proma", "loss.mismatch=token"],
        [
            "algorithm=ppo",
            "loss.clip=false",
            "loss.kl={coefficient: 1, reference: rollout, target: 0.01}",
            "batching.minibatches=2",
        ],
        ["algorithm=grpo", "loss.entropy=0.01", "loss.kl.coefficient=0.001"],
        # Files whose runs differ in the algorithm alone name PROMA's rule for all of them.
        ["algorithm=reinforce", "projection.rule=iterative"],
        ["algorithm=grpo", "batching.zero_advantage=drop"],
    ],
)
def test_what_makes_sense_is_accepted(overrides: list[str]) -> None:
    assert config(*overrides)


def test_a_penalty_in_the_reward_is_not_in_the_loss() -> None:
    kl = "loss.kl={coefficient: 0.1, place: reward}"
    assert loss_options(config("algorithm=grpo", kl)).kl == 0
