"""KL estimates: expected values and gradients by summing over every outcome, not by sampling."""

from __future__ import annotations

import pytest
import torch

from proma_megatron.losses.kl import adapted, estimate, penalty

ESTIMATORS = ("k1", "k2", "k3")


@pytest.fixture
def logits() -> torch.Tensor:
    """Of the policy, over 6 outcomes."""
    values = torch.tensor([0.3, -1.0, 0.8, 0.0, -0.4, 1.1], dtype=torch.float64)
    return values.requires_grad_()


@pytest.fixture
def reference() -> torch.Tensor:
    """log-probabilities of the reference."""
    values = torch.tensor([1.0, 0.2, -0.5, 0.4, -1.3, 0.6], dtype=torch.float64)
    return values.log_softmax(0)


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p, q) of log-probabilities."""
    return (p.exp() * (p - q)).sum()


def expected(
    estimator: str, policy: torch.Tensor, reference: torch.Tensor, kind: str
) -> torch.Tensor:
    """The mean over outcomes; as for a backward pass, what was sampled has no gradient."""
    sampler = policy if kind == "initial" else reference
    return (sampler.detach().exp() * penalty(estimator, policy, reference, kind)).sum()


def gradient(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(left, right, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["initial", "rollout"])
def test_k1_and_k3_are_unbiased_and_k2_is_not(
    logits: torch.Tensor, reference: torch.Tensor, kind: str
) -> None:
    policy = logits.log_softmax(0)
    exact = divergence(policy, reference) if kind == "initial" else divergence(reference, policy)
    unbiased = {e: close(expected(e, policy, reference, kind), exact) for e in ESTIMATORS}
    assert unbiased == {"k1": True, "k2": False, "k3": True}


def test_gradients_with_samples_of_the_policy(
    logits: torch.Tensor, reference: torch.Tensor
) -> None:
    policy = logits.log_softmax(0)
    found = {e: gradient(expected(e, policy, reference, "initial"), logits) for e in ESTIMATORS}
    forward = gradient(divergence(policy, reference), logits)
    backward = gradient(divergence(reference, policy), logits)
    assert not close(forward, backward)
    assert close(found["k1"], torch.zeros_like(forward))
    assert close(found["k2"], forward)
    assert close(found["k3"], backward)


def test_gradients_with_samples_of_the_reference(
    logits: torch.Tensor, reference: torch.Tensor
) -> None:
    policy = logits.log_softmax(0)
    exact = gradient(divergence(reference, policy), logits)
    right = {
        e: close(gradient(expected(e, policy, reference, "rollout"), logits), exact)
        for e in ESTIMATORS
    }
    assert right == {"k1": True, "k2": False, "k3": True}


def test_estimates_of_one_token_by_hand() -> None:
    """q / p = 2: log 2 = 0.6931."""
    p, q = torch.tensor([0.25]).double().log(), torch.tensor([0.5]).double().log()
    found = [float(estimate(e, sampled=p, other=q)) for e in ESTIMATORS]
    assert found == pytest.approx([-0.69314718056, 0.24022650696, 0.30685281944], abs=1e-11)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_they_are_zero_only_where_the_policies_agree(estimator: str) -> None:
    p = torch.tensor([-0.5, -2.0, -1.0, -1e-9], dtype=torch.float64)
    q = torch.tensor([-0.5, -1.0, -2.0, -2e-9], dtype=torch.float64)
    found = estimate(estimator, p, q)
    assert found[0] == 0
    assert bool((found[1:3] > 0).all())
    assert float(found[3]) == pytest.approx(5e-19, rel=1e-3, abs=0)


def test_unknown_names_are_refused() -> None:
    nothing = torch.zeros(1)
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'"):
        estimate("k4", nothing, nothing)
    with pytest.raises(ValueError, match="unknown KL reference 'last'"):
        penalty("k3", nothing, nothing, "last")


@pytest.mark.parametrize(
    ("measured", "coefficient"),
    [(0.0, 0.1), (0.99, 0.1), (1.0, 0.2), (1.5, 0.2), (2.25, 0.2), (2.26, 0.4), (9.0, 0.4)],
)
def test_the_coefficient_follows_a_divergence_that_is_off_target(
    measured: float, coefficient: float
) -> None:
    assert adapted(0.2, measured, target=1.5) == pytest.approx(coefficient)
