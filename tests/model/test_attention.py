"""Packed attention is each sequence on its own; nothing leaks between them or back in time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.gradients import TINY, random_batch
from support.pool import WorkerPool
from support.training import Forward, packed_forwards

from proma_megatron.model import attention
from proma_megatron.model.attention import CoreAttention, KeyValueCache, PackedLayout

CPU = torch.device("cpu")
LENGTHS = (5, 1, 8, 3)
HEADS, DIM = 4, 6

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_qkv(total: int, groups: int, seed: int = 0) -> QKV:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        x = torch.randn((total, heads, DIM), generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    return draw(HEADS), draw(groups), draw(groups)


def packed(qkv: QKV, lengths: tuple[int, ...]) -> torch.Tensor:
    """(T, heads * dim) of the layer under test."""
    layout = PackedLayout.of(lengths, len(qkv[0]), CPU)
    return CoreAttention(SimpleNamespace())(*qkv, None, packed_seq_params=layout)


def one_at_a_time(qkv: QKV, lengths: tuple[int, ...]) -> torch.Tensor:
    """Causal softmax attention written out, query by query and head by head."""
    query, key, value = qkv
    share = HEADS // key.shape[1]
    rows, start = [], 0
    for length in lengths:
        for t in range(start, start + length):
            heads = []
            for head in range(HEADS):
                seen = slice(start, t + 1)
                scores = key[seen, head // share] @ query[t, head] / DIM**0.5
                heads.append(scores.softmax(dim=0) @ value[seen, head // share])
            rows.append(torch.cat(heads))
        start += length
    return torch.stack(rows)


@pytest.mark.parametrize(("groups", "short"), [(1, 128), (2, 128), (4, 128), (2, 4)])
def test_packed_attention_equals_one_sequence_at_a_time(
    monkeypatch: pytest.MonkeyPatch, groups: int, short: int
) -> None:
    monkeypatch.setattr(attention, "SHORT", short)
    blocks = [(b.rows, b.longest) for b in PackedLayout.of(LENGTHS, sum(LENGTHS), CPU).blocks]
    assert blocks == ([(4, 8)] if short == 128 else [(1, 8), (1, 5), (2, 3)])
    qkv = random_qkv(sum(LENGTHS), groups)
    fast, slow = packed(qkv, LENGTHS), one_at_a_time(qkv, LENGTHS)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-13)
    upstream = random_qkv(sum(LENGTHS), groups, seed=1)[0].detach().flatten(1)
    fast_grads = torch.autograd.grad((fast * upstream).sum(), qkv)
    slow_grads = torch.autograd.grad((slow * upstream).sum(), qkv)
    for name, x, y in zip(("query", "key", "value"), fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_a_token_sees_itself_and_its_past_and_nothing_else() -> None:
    qkv = random_qkv(sum(LENGTHS), groups=2)
    out = packed(qkv, LENGTHS)
    owner = [s for s, length in enumerate(LENGTHS) for _ in range(length)]
    for t in range(len(out)):
        expected = [owner[j] == owner[t] and j <= t for j in range(len(out))]
        _, _, value = torch.autograd.grad(out[t].abs().sum(), qkv, retain_graph=True)
        assert (value.abs().sum(dim=(1, 2)) > 0).tolist() == expected, f"token {t}"


@pytest.mark.parametrize("lengths", [(700, 90, 300, 128, 1), (700, 600, 500), (900, 600, 500, 9)])
def test_no_long_sequence_is_padded_to_much_more(lengths: tuple[int, ...]) -> None:
    layout = PackedLayout.of(lengths, sum(lengths), CPU)
    padded = sum(block.rows * block.longest**2 for block in layout.blocks)
    assert padded <= 2 * sum(length**2 for length in lengths) + len(lengths) * attention.SHORT**2
    assert sum(block.rows for block in layout.blocks) == len(lengths)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_token_decoded_alone_attends_as_the_last_of_several(groups: int) -> None:
    rows = [random_qkv(6, groups, seed) for seed in range(3)]
    query, key, value = (torch.stack(x, dim=1).detach() for x in zip(*rows, strict=True))
    cache = KeyValueCache(3, 6, torch.tensor([0, 2, 4]))
    several = CoreAttention(SimpleNamespace())(query, key, value, cache.mask(6))
    cache.length = 5
    alone = CoreAttention(SimpleNamespace())(query[-1:], key, value, cache.mask(1))
    torch.testing.assert_close(alone, several[-1:], rtol=0, atol=1e-13)


def test_padding_changes_neither_values_nor_gradients() -> None:
    tight = random_qkv(sum(LENGTHS), groups=2)
    tail = random_qkv(7, groups=2, seed=2)
    loose: QKV = tuple(  # type: ignore[assignment]
        torch.cat([x.detach(), 1e3 * y.detach()]).requires_grad_()
        for x, y in zip(tight, tail, strict=True)
    )
    count = sum(LENGTHS)
    expected, found = packed(tight, LENGTHS), packed(loose, LENGTHS)[:count]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    expected_grads = torch.autograd.grad(expected.square().sum(), tight)
    found_grads = torch.autograd.grad(found.square().sum(), loose)
    for x, y in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(x[:count], y, rtol=0, atol=1e-13)
        assert torch.equal(x[count:], torch.zeros_like(x[count:]))


def test_a_microbatch_of_padding_alone_is_finite() -> None:
    out = packed(random_qkv(4, groups=2), ())
    assert out.shape == (4, HEADS * DIM)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize(("filled", "count"), [(0, 5), (5, 1), (5, 3)])
def test_cache_hides_padding_and_the_future(filled: int, count: int) -> None:
    padding = torch.tensor([0, 2, 4])
    cache = KeyValueCache(3, 16, padding)
    cache.length = filled
    mask, positions = cache.mask(count), cache.positions(count)
    for row, unused in enumerate(padding.tolist()):
        for query in range(filled, filled + count):
            if query < unused:
                continue  # nobody reads what a padding slot computes
            allowed = [unused <= key <= query for key in range(filled + count)]
            assert (~mask[row, 0, query - filled]).tolist() == allowed, (row, query)
            assert int(positions[row, query - filled]) == query - unused
    assert bool((~mask).any(dim=-1).all()), "a softmax over nothing is not a number"


def test_kept_rows_of_the_cache_keep_their_keys_values_and_positions() -> None:
    cache = KeyValueCache(3, 8, torch.tensor([0, 1, 2]))
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn((2, 4, 3, 2, DIM), generator=generator)
    cache.append(1, key, value)
    cache.length = 4
    cache.keep(torch.tensor([0, 2]))
    assert cache.positions(1).tolist() == [[4], [2]]
    new_key, new_value = torch.randn((2, 1, 2, 2, DIM), generator=generator)
    keys, values = cache.append(1, new_key, new_value)
    assert torch.equal(keys, torch.cat([key[:, [0, 2]], new_key]))
    assert torch.equal(values, torch.cat([value[:, [0, 2]], new_value]))


# --------------------------------------------------------------------------- the whole model

SEQUENCES = random_batch(5, [4])[0]


@pytest.fixture(scope="module")
def forwards(workers: WorkerPool) -> dict[str, Forward]:
    """The model on the sequences packed, padded, in reverse order, and each on its own."""
    names = ["packed", "padded", "reversed", *(str(i) for i in range(len(SEQUENCES)))]
    alone = [([sequence], 1) for sequence in SEQUENCES]
    cases = [(SEQUENCES, 1), (SEQUENCES, 64), (SEQUENCES[::-1], 1), *alone]
    (found,) = workers.run(1, packed_forwards, model=TINY, cases=cases)
    return dict(zip(names, found, strict=True))


def test_packed_forward_equals_each_sequence_alone(forwards: dict[str, Forward]) -> None:
    start = 0
    for index, sequence in enumerate(SEQUENCES):
        length = len(sequence.tokens)
        alone, together = forwards[str(index)], forwards["packed"]
        rows = slice(start, start + length)
        torch.testing.assert_close(together.logits[rows], alone.logits, rtol=0, atol=1e-12)
        # What the last position "predicts" is padding in both.
        torch.testing.assert_close(together.logprobs[rows], alone.logprobs, rtol=0, atol=1e-12)
        start += length
    assert start == len(forwards["packed"].logits)


def test_more_sequences_in_a_microbatch_take_no_more_operations(
    forwards: dict[str, Forward],
) -> None:
    """Small ones, launched sequence by sequence, once took half of a step."""
    assert forwards["reversed"].operations <= forwards["0"].operations


def test_order_of_sequences_in_a_microbatch_changes_no_logits(
    forwards: dict[str, Forward],
) -> None:
    lengths = [len(sequence.tokens) for sequence in SEQUENCES]
    pieces = forwards["reversed"].logits.split(lengths[::-1])
    torch.testing.assert_close(
        torch.cat(pieces[::-1]), forwards["packed"].logits, rtol=0, atol=1e-12
    )


def test_padding_to_a_multiple_changes_no_log_probability(forwards: dict[str, Forward]) -> None:
    tight, padded = forwards["packed"], forwards["padded"]
    assert len(padded.logprobs) == 64 > len(tight.logprobs)
    torch.testing.assert_close(
        padded.logprobs[: len(tight.logprobs)], tight.logprobs, rtol=0, atol=1e-12
    )
    assert bool(padded.logits.isfinite().all())
