"""Dominant subspaces and what lies in them, against dense singular value decompositions."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paper import deflated, dominant_projector

from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.projection import sizes
from proma_megatron.projection.rules.intra_proma import (
    Sides,
    Subspace,
    TokenMatrix,
    dominant,
    removal,
)
from proma_megatron.projection.sizes import ITERATIONS, sketch_width

SIDES: list[Sides] = ["both", "input", "output"]
BIG = 2**20


@pytest.fixture
def iterating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "DIRECT_TOKENS", 0)


def alone(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    raise AssertionError("one rank has nothing to add up")


def whole(matrix: torch.Tensor, block_bytes: int = BIG, tokens: int | None = None) -> TokenMatrix:
    return TokenMatrix(
        matrix,
        len(matrix) if tokens is None else tokens,
        [(0, matrix.shape[1])],
        sharded=False,
        block_bytes=block_bytes,
    )


def normal(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def decaying(seed: int, tokens: int, width: int, power: float, rank: int = 10**6) -> torch.Tensor:
    """Singular values i^-power, 0 beyond ``rank``."""
    count = min(tokens, width)
    left, _ = torch.linalg.qr(normal(seed, tokens, count))
    right, _ = torch.linalg.qr(normal(seed + 1, width, count))
    sizes = torch.arange(1, count + 1, dtype=torch.float64) ** -power
    sizes[rank:] = 0
    return left * sizes @ right.T


def projector(found: Subspace) -> torch.Tensor:
    return found.basis @ found.basis.T


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 30),
    width=st.integers(1, 30),
    true_rank=st.integers(0, 30),
    rank=st.integers(1, 40),
    block_bytes=st.sampled_from([1, 300, BIG]),
)
def test_a_short_matrix_has_its_singular_vectors(
    seed: int, tokens: int, width: int, true_rank: int, rank: int, block_bytes: int
) -> None:
    matrix = 1e-3 * decaying(seed, tokens, width, 1.0, true_rank)
    (found,) = dominant([whole(matrix, block_bytes)], rank, alone)
    expected = dominant_projector(matrix, rank)
    assert (projector(found) - expected).norm() < 1e-9
    assert (found.image - matrix @ found.basis).norm() < 1e-12 * (1 + matrix.norm())
    missing = found.basis.norm(dim=0) == 0
    assert int((~missing).sum()) == min(rank, tokens, width, true_rank)
    assert not found.image[:, missing].any()


@pytest.mark.usefixtures("iterating")
@pytest.mark.parametrize(("power", "error"), [(1.0, 2e-4), (1.5, 1e-6), (3.0, 1e-9)])
def test_an_iteration_finds_what_dominates(power: float, error: float) -> None:
    matrix = decaying(8, 150, 100, power)
    (found,) = dominant([whole(matrix)], 8, alone)
    distance = torch.linalg.matrix_norm(projector(found) - dominant_projector(matrix, 8), 2)
    print(f"singular values i^-{power}: {distance:.1e}")
    assert distance < error
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(8).double())
    assert (found.image - matrix @ found.basis).norm() < 1e-12


@pytest.mark.usefixtures("iterating")
@pytest.mark.parametrize("true_rank", [0, 1, 5, 16])
def test_an_iteration_is_exact_where_the_sketch_holds_the_rank(true_rank: int) -> None:
    matrix = decaying(1, 60, 40, 0.5, true_rank)
    (found,) = dominant([whole(matrix)], 8, alone)
    assert (projector(found) - dominant_projector(matrix, 8)).norm() < 1e-9
    assert int((found.basis.norm(dim=0) > 0).sum()) == min(8, true_rank)


@pytest.mark.usefixtures("iterating")
def test_a_flat_spectrum_still_gives_an_orthonormal_basis() -> None:
    matrix = normal(0, 100, 80)
    (found,) = dominant([whole(matrix, 1000)], 8, alone)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(8).double())
    torch.testing.assert_close(found.image, matrix @ found.basis)


@pytest.mark.usefixtures("iterating")
def test_padding_is_not_read() -> None:
    matrix = normal(0, 40, 20)
    padded = torch.cat([matrix, torch.full((24, 20), torch.nan).double()])
    (found,) = dominant([whole(padded, tokens=40)], 3, alone)
    (expected,) = dominant([whole(matrix)], 3, alone)
    assert torch.equal(found.basis, expected.basis)


@pytest.mark.parametrize("direct", [True, False])
def test_ranks_find_the_subspace_of_the_whole_matrix(
    direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ranks as threads: two hold columns, one none; the second matrix all hold."""
    monkeypatch.setattr(sizes, "DIRECT_TOKENS", 256 if direct else 0)
    cut, shared = decaying(0, 50, 30, 2.0), decaying(5, 50, 12, 2.0)
    columns = [[(0, 4), (20, 30)], [(4, 20)], []]
    barrier = threading.Barrier(len(columns))
    board: dict[int, list[torch.Tensor]] = {}
    calls: list[int] = []

    def rank(at: int, found: dict[int, list[Subspace]]) -> None:
        def reduce(parts: list[torch.Tensor]) -> list[torch.Tensor]:
            board[at] = parts
            calls.append(at)
            barrier.wait()
            summed = [sum(board[r][i] for r in range(3)) for i in range(len(parts))]
            barrier.wait()
            return summed  # type: ignore[return-value]

        mine = TokenMatrix(cut, 50, columns[at], sharded=True, block_bytes=500)
        found[at] = dominant([mine, whole(shared)], 4, reduce)

    found: dict[int, list[Subspace]] = {}
    threads = [threading.Thread(target=rank, args=(at, found)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == [0, 1, 2]
    basis = torch.zeros((30, 4), dtype=torch.float64)
    for at, own in enumerate(columns):
        rows = iter(found[at][0].basis.split([high - low for low, high in own]))
        for low, high in own:
            basis[low:high] = next(rows)
        torch.testing.assert_close(found[at][0].image, found[0][0].image)
    error = (basis @ basis.T - dominant_projector(cut, 4)).norm()
    assert error < (1e-12 if direct else 1e-9)
    torch.testing.assert_close(found[0][0].image, cut @ basis)
    assert len(calls) == 3 * (1 if direct else ITERATIONS + 1)


@pytest.mark.parametrize("sides", SIDES)
@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(2, 20),
    rank=st.integers(1, 25),
    silent=st.booleans(),
)
def test_what_is_removed_is_the_formulas(
    sides: Sides, seed: int, tokens: int, rank: int, silent: bool
) -> None:
    x, dy = decaying(seed, tokens, 12, 1.0), decaying(seed + 7, tokens, 17, 1.0)
    if silent:
        dy[:] = 0
    per_token = normal(seed + 20, tokens)
    mx, mdy = whole(x), whole(dy, 200)
    inside, outside = dominant([mx, mdy], rank, alone)
    found = removal(sides, mx, mdy, inside, outside, per_token)
    gradient = dy.T @ (per_token[:, None] * x)
    config = ProjectionConfig(rule="subspace", sides=sides, rank=rank, bound=None)
    expected = gradient - deflated(x, dy, per_token, config)
    size = (x.norm() * dy.norm() * per_token.abs().max()).clamp(min=1e-300)
    assert (found.left @ found.right - expected).norm() <= 1e-10 * size
    assert abs(found.square.sqrt() - expected.norm()) <= 1e-10 * size
    assert not found.partial


def test_of_a_one_sided_part_a_rank_knows_its_own_entries() -> None:
    """The other factor is whole on every rank, and so is a core between two subspaces."""
    x, dy = normal(0, 10, 6), normal(1, 10, 8)
    per_token = normal(2, 10)
    (inside,), (outside,) = dominant([whole(x)], 2, alone), dominant([whole(dy)], 2, alone)
    upper = TokenMatrix(dy, 10, [(0, 5)], sharded=True, block_bytes=BIG)
    left = TokenMatrix(x, 10, [(0, 3)], sharded=True, block_bytes=BIG)
    gradient = dy.T @ (per_token[:, None] * x)
    rows = removal("input", whole(x), upper, inside, None, per_token)
    torch.testing.assert_close(rows.square, (gradient[:5] @ inside.basis).square().sum())
    columns = removal("output", left, whole(dy), None, outside, per_token)
    torch.testing.assert_close(columns.square, (outside.basis.T @ gradient[:, :3]).square().sum())
    assert rows.partial
    assert columns.partial
    assert not removal("input", left, whole(dy), inside, None, per_token).partial
    assert not removal("output", whole(x), upper, None, outside, per_token).partial


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_matrix_that_is_not_finite_is_said_to_be_so(
    direct: bool, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "DIRECT_TOKENS", 256 if direct else 0)
    good, poisoned = normal(0, 30, 10), normal(0, 30, 10)
    poisoned[3, 2] = bad
    found = dominant([whole(poisoned), whole(good)], 2, alone)
    assert [bool(intra_proma.finite) for intra_proma in found] == [False, True]
    (expected,) = dominant([whole(good)], 2, alone)
    assert torch.equal(found[1].basis, expected.basis)
    assert torch.equal(found[1].image, expected.image)


def test_the_sketch_grows_with_the_rank() -> None:
    assert [sketch_width(rank) for rank in (1, 8, 32)] == [9, 16, 64]
