"""Sampling inverts the cumulative distribution; truncation decides what is drawn, not its score."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.generation import draws_from_shards
from support.pool import WorkerPool
from support.slow import all_but

from proma_megatron.config.model import ParallelConfig
from proma_megatron.rollout.sampling import noise, sample

GRID = 4000
ALMOST_ONE = math.nextafter(1.0, 0.0)


def random_logits(vocabulary: int = 17, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    """(1, V) float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn((1, vocabulary), generator=generator, dtype=torch.float64)


def on_grid(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each token is drawn for u = (i + 0.5) / GRID, and each draw's log-probability."""
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    tokens, logprobs = sample(logits.expand(GRID, -1), uniform, temperature, top_k, top_p)
    counts = torch.bincount(tokens, minlength=logits.shape[1])
    scores = torch.full((logits.shape[1],), torch.nan, dtype=logprobs.dtype)
    scores[tokens] = logprobs
    return counts, scores


def drawn(counts: torch.Tensor) -> set[int]:
    return set(counts.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_even_grid_of_noise_draws_every_token_as_often_as_it_is_likely(
    temperature: float, seed: int
) -> None:
    logits = random_logits(seed=seed)
    counts, _ = on_grid(logits, temperature)
    expected = GRID * (logits[0] / temperature).softmax(dim=0)
    assert bool(((counts - expected).abs() <= 1).all()), (counts, expected)


@pytest.mark.parametrize("top_k", [1, 3, 16])
def test_top_k_draws_the_k_likeliest_in_proportion(top_k: int) -> None:
    logits = random_logits(scale=1.0)
    counts, _ = on_grid(logits, top_k=top_k)
    kept = logits[0].argsort(descending=True)[:top_k]
    assert drawn(counts) == set(kept.tolist())
    expected = GRID * logits[0, kept].softmax(dim=0)
    assert bool(((counts[kept] - expected).abs() <= 1).all())


@pytest.mark.parametrize("top_k", [0, 17, 100])
def test_top_k_of_zero_or_the_whole_vocabulary_is_off(top_k: int) -> None:
    logits = random_logits(scale=1.0)
    assert torch.equal(on_grid(logits, top_k=top_k)[0], on_grid(logits)[0])
    assert len(drawn(on_grid(logits)[0])) == 17


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.72, 0.99])
def test_top_p_draws_from_the_smallest_set_that_holds_p(top_p: float) -> None:
    logits = random_logits(scale=1.0)
    probabilities = logits[0].softmax(dim=0)
    order = probabilities.argsort(descending=True).tolist()
    size = next(n for n in range(1, 18) if float(probabilities[order[:n]].sum()) >= top_p)
    counts, _ = on_grid(logits, top_p=top_p)
    assert drawn(counts) == set(order[:size])
    kept = torch.tensor(order[:size])
    expected = GRID * probabilities[kept] / probabilities[kept].sum()
    assert bool(((counts[kept] - expected).abs() <= 1).all())


def test_top_p_counts_what_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    # Of the three that top-k keeps, the first two hold 0.7 / 0.9 = 0.78.
    assert drawn(on_grid(logits, top_k=3, top_p=0.75)[0]) == {0, 1}
    assert drawn(on_grid(logits, top_k=3, top_p=0.79)[0]) == {0, 1, 2}


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (2, 1.0), (0, 0.6), (4, 0.6)])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_scores_are_of_the_untruncated_softmax_at_this_temperature(
    top_k: int, top_p: float, temperature: float
) -> None:
    logits = random_logits(scale=0.5)
    _, scores = on_grid(logits, temperature, top_k, top_p)
    expected = (logits[0] / temperature).log_softmax(dim=0)
    seen = ~scores.isnan()
    assert int(seen.sum()) >= 2
    torch.testing.assert_close(scores[seen], expected[seen], rtol=0, atol=1e-14)


def test_greedy_takes_the_likeliest_token_of_each_row() -> None:
    logits = torch.cat([random_logits(seed=seed) for seed in range(5)])
    tokens, logprobs = sample(logits, None, 0.7, top_k=3, top_p=0.5)
    assert tokens.tolist() == logits.argmax(dim=1).tolist()
    expected = (logits / 0.7).log_softmax(dim=1).amax(dim=1)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-14)


def test_each_row_uses_its_own_logits_and_noise() -> None:
    logits = torch.cat([random_logits(seed=seed) for seed in range(6)])
    uniform = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together, _ = sample(logits, uniform, 1.0, 5, 0.9)
    alone = [sample(logits[i : i + 1], uniform[i : i + 1], 1.0, 5, 0.9)[0] for i in range(6)]
    assert together.tolist() == torch.cat(alone).tolist()


@settings(deadline=None)  # torch's first call of anything is slow
@given(
    st.lists(st.sampled_from([-math.inf, -1e4, -1.0, 0.0, 1.0]), min_size=1, max_size=12).filter(
        lambda row: max(row) > -1e4
    ),
    st.sampled_from([0.0, 1e-300, 0.25, 0.5, 0.75, 1 - 1e-12, ALMOST_ONE]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([0, 2]),
    st.sampled_from([1.0, 0.8]),
)
def test_no_noise_draws_a_token_of_probability_zero(
    row: list[float], uniform: float, dtype: torch.dtype, top_k: int, top_p: float
) -> None:
    logits = torch.tensor([row], dtype=dtype)
    token, logprob = sample(logits, torch.tensor([uniform], dtype=torch.float64), 1.0, top_k, top_p)
    assert row[int(token)] > -1e4
    assert math.isfinite(float(logprob))


def test_noise_just_below_one_stays_inside_a_large_vocabulary() -> None:
    logits = torch.cat([random_logits(4096, seed) for seed in range(8)])
    logits[:, -96:] = -torch.inf
    tokens, _ = sample(logits, torch.full((8,), ALMOST_ONE, dtype=torch.float64), 1.0, 0, 1.0)
    assert bool((tokens < 4000).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_logits_are_scored_in_float32(dtype: torch.dtype) -> None:
    logits = random_logits().to(dtype)
    _, logprob = sample(logits, torch.tensor([0.5], dtype=torch.float64), 0.7, 0, 1.0)
    assert logprob.dtype == torch.float32


# --------------------------------------------------------------------------- shards


def shards(workers: WorkerPool, ranks: int, **arguments: Any) -> list[torch.Tensor]:
    """Tokens and log-probabilities, which all ranks agree on."""
    found = workers.run(
        ranks, draws_from_shards, parallel=ParallelConfig(tensor=ranks), **arguments
    )
    for other in found:
        for mine, first in zip(other, found[0], strict=True):
            torch.testing.assert_close(mine, first, rtol=0, atol=0, equal_nan=True)
    return found[0]


@pytest.mark.parametrize(
    ("ranks", "vocabulary"),  # 5 on 4 ranks: 2, 2, 1 and no columns
    all_but([(2, 5), (2, 17), (4, 5), (4, 17)], [(2, 5), (4, 17)]),
)
@pytest.mark.parametrize("top_k", [None, 0, 1, 3, 100])
def test_shards_draw_what_the_whole_vocabulary_does(
    workers: WorkerPool, ranks: int, vocabulary: int, top_k: int | None
) -> None:
    """None: greedy. Even and extreme noise; logits of every size, some of them -inf."""
    logits = torch.cat([random_logits(vocabulary, seed, 3.0) for seed in range(200)])
    logits[:40, 1] = -torch.inf
    logits[20:60, vocabulary // 2 :] -= 1e4
    logits[60:80, : vocabulary // 2] -= 1e4
    order = torch.randperm(200, generator=torch.Generator().manual_seed(9))
    uniform = (order.double() + 0.5) / 200
    uniform[::20], uniform[1::20] = 0.0, ALMOST_ONE
    given_noise = None if top_k is None else uniform
    tokens, logprobs = shards(
        workers,
        ranks,
        logits=logits,
        uniform=given_noise,
        temperature=0.7,
        top_k=top_k or 0,
    )
    whole = sample(logits, given_noise, 0.7, top_k or 0, 1.0)
    assert tokens.tolist() == whole[0].tolist()
    torch.testing.assert_close(logprobs, whole[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("top_k", [None, 0, 3])
def test_shards_draw_some_token_of_a_row_that_is_not_finite(
    workers: WorkerPool, bad: float, top_k: int | None
) -> None:
    logits = random_logits().repeat(3, 1)
    logits[1, 12] = bad
    uniform = None if top_k is None else torch.full((3,), 0.4, dtype=torch.float64)
    tokens, scores = shards(
        workers, 2, logits=logits, uniform=uniform, temperature=1.0, top_k=top_k or 0
    )
    assert bool(((tokens >= 0) & (tokens < 17)).all())
    assert scores.isfinite().tolist() == [True, False, True]
    assert tokens[0] == tokens[2]


# --------------------------------------------------------------------------- noise


def test_noise_depends_on_every_argument() -> None:
    rows = [
        tuple(noise(seed, step, prompt, index, 5).tolist())
        for seed, step, prompt, index in itertools.product((1, 11), (1, 2), (1, 111), (0, 1))
    ]
    assert len(set(rows)) == len(rows) == 16


def test_noise_depends_on_nothing_else_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    first = noise(3, 4, 9, 5, 6)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(noise(3, 4, 9, 5, 6), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_uniform_on_the_half_open_unit_interval() -> None:
    values = torch.cat([noise(0, 0, 7, index, 50) for index in range(200)])
    assert values.dtype == torch.float64
    assert bool(((values >= 0) & (values < 1)).all())
    counts = torch.histc(values, bins=10, min=0, max=1)
    # 10,000 draws in 10 bins: 1000 +- 30 each; 5 standard deviations.
    assert bool(((counts - 1000).abs() < 150).all()), counts


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_a_row_that_is_not_finite_draws_some_token(bad: float, truncation: dict) -> None:
    """A policy that broke goes on to the update that is skipped, instead of ending a rank."""
    logits = random_logits().repeat(3, 1)
    logits[1, 4] = bad
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **truncation}
    for uniform in (torch.full((3,), ALMOST_ONE, dtype=torch.float64), None):
        tokens, scores = sample(logits, uniform, **options)
        assert bool(((tokens >= 0) & (tokens < 17)).all())
        assert scores.isfinite().tolist() == [True, False, True]
        alone, _ = sample(logits[:1], None if uniform is None else uniform[:1], **options)
        assert tokens[0] == tokens[2] == alone[0]
