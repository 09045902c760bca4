"""Sequence gradients kept, streamed or looked up give the same products and updates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from proma_megatron.projection.factors import gemm as gemm_module
from proma_megatron.projection.factors.base import Factors
from proma_megatron.projection.factors.contraction import Rows
from proma_megatron.projection.factors.embedding import Lookup, LookupFactors
from proma_megatron.projection.factors.gemm import TorchGemm
from proma_megatron.projection.factors.linear import LinearFactors
from proma_megatron.projection.factors.materialization import (
    SMALL_BYTES,
    MaterializationChoice,
    Rates,
    choose_materialization,
    describe,
)
from proma_megatron.projection.factors.workspace import Workspace
from proma_megatron.types import PackedSequences

CPU = torch.device("cpu")
OUT, IN, PADDING = 12, 6, 2
# Units as in a fused QKV weight (runs of several groups), a fused gate and up, one for everything,
# and on a rank that has nothing of the second.
UNITS: dict[str, list[Rows]] = {
    "groups": [((0, 2), (6, 8)), ((2, 4), (8, 10)), ((4, 6), (10, 12))],
    "halves": [((0, 6),), ((6, 12),)],
    "whole": [((0, 12),)],
    "empty": [((0, 12),), ()],
}
LENGTHS = {"equal": (3, 3, 3, 3), "short": (3, 2, 3), "uneven": (1, 9, 2), "alone": (5,)}


def of(lengths: Sequence[int]) -> PackedSequences:
    return PackedSequences.of(tuple(lengths), sum(lengths) + PADDING, CPU)


def dense(
    x: torch.Tensor, dy: torch.Tensor, sequences: PackedSequences, lookup: Lookup | None
) -> torch.Tensor:
    """G (k, out, in), an entry after the other."""
    found = torch.zeros(sequences.count, dy.shape[1], x.shape[1], dtype=x.dtype)
    for s, (start, stop) in enumerate(pairwise(sequences.offsets)):
        for t in range(start, stop):
            found[s] += torch.outer(dy[t], x[t])
            if lookup is not None and lookup.rows[t] >= 0:
                found[s, lookup.rows[t]] += lookup.dy[t]
    return found


def check(factors: Factors, gradients: torch.Tensor, units: list[Rows]) -> None:
    """Products and one update with other coefficients in every unit, against G itself."""
    generator = torch.Generator().manual_seed(1)
    accumulated = torch.randn(gradients.shape[1:], generator=generator, dtype=torch.float64)
    found = factors.products(units, accumulated)
    before = accumulated.clone()
    parts = [
        (rows, torch.randn(len(gradients), generator=generator, dtype=torch.float64))
        for rows in units
    ]
    factors.update([(rows, values) for rows, values in parts if rows], accumulated)
    for (rows, values), products in zip(parts, found, strict=True):
        wanted = [i for start, stop in rows for i in range(start, stop)]
        mine, own = gradients[:, wanted].flatten(1), before[wanted]
        torch.testing.assert_close(products.gram, mine @ mine.T)
        torch.testing.assert_close(products.overlap, mine @ own.flatten())
        torch.testing.assert_close(products.energy, own.square().sum())
        change = torch.einsum("k,kij->ij", values, gradients[:, wanted])
        torch.testing.assert_close(accumulated[wanted], own + change)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("way", ["kept", "streamed", "streamed in small blocks", "kept, no batch"])
@pytest.mark.parametrize("tied", [False, True])
def test_products_and_updates_are_those_of_the_gradients_themselves(
    lengths: str, units: str, way: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "kept, no batch":
        monkeypatch.setattr(gemm_module, "SMALL_GEMM", 0)
    generator = torch.Generator().manual_seed(0)
    sequences = of(LENGTHS[lengths])
    tokens = len(sequences.owner)
    x, dy, looked_up = (
        torch.randn(tokens, width, generator=generator, dtype=torch.float64)
        for width in (IN, OUT, IN)
    )
    dy[sequences.offsets[-1] :] = 0  # as the loss leaves it, where nothing is a sequence's
    rows = torch.randint(-1, OUT, (tokens,), generator=generator)
    rows[sequences.offsets[-1] :] = -1
    lookup = Lookup(rows, looked_up) if tied else None
    workspace = Workspace(2 * 300 if way == "streamed in small blocks" else 2**20, CPU)
    linear = LinearFactors(x, dy, sequences, workspace, dtype=torch.float64, lookup=lookup)
    factors = linear.materialize(accumulates=True) if way.startswith("kept") else linear
    check(factors, dense(x, dy, sequences, lookup), UNITS[units])


@pytest.mark.parametrize("block", [1, 200, 2**20])
def test_a_lookup_has_only_rows_of_its_tokens(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = of((4, 3, 6))
    tokens = len(sequences.owner)
    rows = torch.randint(-1, OUT, (tokens,), generator=generator)
    dy = torch.randn(tokens, IN, generator=generator, dtype=torch.float64)
    rows[sequences.offsets[-1] :] = -1
    lookup = Lookup(rows, dy)
    nothing = torch.zeros(tokens, OUT, dtype=torch.float64)
    gradients = dense(dy, nothing, sequences, lookup)
    factors = LookupFactors(lookup, sequences, Workspace(2 * block, CPU))
    check(factors, gradients, UNITS["whole"])


# --------------------------------------------------------------------------- the workspace


def test_what_is_taken_is_nobody_elses_until_it_is_free() -> None:
    workspace = Workspace(2**20, CPU)
    for size in (10, 1000, 3, 500):  # the memory grows between groups, and never under one
        taken = [workspace.take((2, size), torch.float32) for _ in range(3)]
        for number, found in enumerate(taken):
            found.fill_(number)
        workspace.scratch((size,), torch.float64).fill_(-1)
        assert [set(found.flatten().tolist()) for found in taken] == [{0.0}, {1.0}, {2.0}]
        workspace.free()
        assert workspace.held == 0


def test_groups_take_turns_in_one_piece_of_memory() -> None:
    workspace = Workspace(2**20, CPU)
    places = set()
    for _ in range(3):
        places.add(workspace.take((1000,), torch.float32).data_ptr())
        workspace.take((500,), torch.float32)
        workspace.free()
    assert len(places) <= 2  # the first one came before the size was known


# --------------------------------------------------------------------------- the choice

RATES = Rates(gemm=1e11, memory=1e10)  # 40 tokens of float32
LARGE = SMALL_BYTES  # entries: 4 MiB of float32


@pytest.mark.parametrize(
    ("tokens", "slices", "room", "materialize"),
    [
        (8 * 41, 8, 2**40, True),
        (8 * 39, 8, 2**40, False),
        (8 * 1000, 8, 8 * 4 * LARGE, True),
        (8 * 1000, 8, 8 * 4 * LARGE - 1, False),
    ],
)
def test_what_fits_is_kept_where_forming_it_again_takes_longer(
    tokens: int, slices: int, room: int, materialize: bool
) -> None:
    found = choose_materialization(
        "auto", entries=LARGE, itemsize=4, tokens=tokens, slices=slices, room=room, rates=RATES
    )
    assert found.materialize == materialize
    assert ("ms" in found.reason) == (room == 2**40 or materialize)


def test_a_choice_that_was_made_is_kept_as_far_as_there_is_room() -> None:
    def choice(how: str, room: int) -> bool:
        return choose_materialization(
            how,  # type: ignore[arg-type]
            entries=LARGE,
            itemsize=4,
            tokens=8,
            slices=8,
            room=room,
            rates=RATES,
        ).materialize

    assert not choice("auto", 2**40)
    assert choice("materialize", 2**40)
    assert not choice("materialize", 2**20)
    assert not choice("stream", 2**40)


def test_small_weights_do_not_depend_on_what_was_measured() -> None:
    for rates in (None, Rates(1.0, 1e30), Rates(1e30, 1.0)):
        found = choose_materialization(
            "auto", entries=1000, itemsize=4, tokens=8, slices=8, room=2**30, rates=rates
        )
        assert found.materialize


def test_rates_outlive_a_process(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    assert Rates.read(path) is None
    RATES.write(path)
    assert Rates.read(path) == RATES
    path.write_text('{"gemm": 1')
    assert Rates.read(path) is None


def test_rates_are_those_of_a_machine() -> None:
    found = Rates.measure(torch.float32, CPU, TorchGemm(), torch.float32)
    assert 1e8 < found.gemm < 1e15
    assert 1e8 < found.memory < 1e14


def test_choices_are_told_by_kind_of_weight() -> None:
    choices = {
        "decoder.layers.0.mlp.linear_fc1.weight": MaterializationChoice(True, "it pays"),
        "decoder.layers.1.mlp.linear_fc1.weight": MaterializationChoice(False, "no room"),
        "output_layer.weight": MaterializationChoice(True, "small"),
    }
    assert describe(choices, RATES) == [
        "measured: 100 GFLOP/s in a weight-gradient GEMM, 10.0 GB/s to and from memory; in float32 "
        "keeping pays from 40 tokens a sequence on",
        "decoder.layers.*.mlp.linear_fc1.weight: materialize 1 of 2 (it pays)",
        "decoder.layers.*.mlp.linear_fc1.weight: stream 1 of 2 (no room)",
        "output_layer.weight: materialize 1 of 1 (small)",
    ]
