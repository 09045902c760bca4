"""Log-probabilities and entropy of sharded logits are those of the gathered, unpadded ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.pool import WorkerPool
from support.vocabulary import Scored, score

from proma_megatron.distributed.topology import Topology
from proma_megatron.model import logprobs as module
from proma_megatron.model.logprobs import vocab_parallel_logprobs

VOCAB = 251
TOKENS = 23
TEMPERATURE = 0.7


def inputs(
    padded: int, vocab: int = VOCAB, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (T, padded), labels (T,) that visit both ends of the vocabulary, upstream (T,)."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn((TOKENS, padded), generator=generator, dtype=torch.float64)
    logits[:, vocab:] = 1e4  # would take all probability if it counted
    labels = torch.linspace(0, vocab - 1, TOKENS).round().long()
    upstream = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    return logits.to(dtype), labels, upstream


def reference(
    logits: torch.Tensor, labels: torch.Tensor, upstream: torch.Tensor, vocab: int = VOCAB
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, entropy and gradient in float64; padding columns have gradient 0."""
    full = logits.double().clone().requires_grad_()
    log_softmax = torch.log_softmax(full[:, :vocab] / TEMPERATURE, dim=1)
    logprobs = log_softmax[torch.arange(len(labels)), labels]
    (grad,) = torch.autograd.grad((logprobs * upstream).sum(), full)
    entropy = -(log_softmax.exp() * log_softmax).sum(dim=1)
    return logprobs.detach(), entropy.detach(), grad


def run(
    workers: WorkerPool,
    tensor: int,
    logits: torch.Tensor,
    labels: torch.Tensor,
    upstream: torch.Tensor,
    vocab: int = VOCAB,
    chunk: int = 5,
    upstream_entropy: torch.Tensor | None = None,
) -> list[Scored]:
    return workers.run(
        tensor,
        score,
        tensor=tensor,
        logits=logits,
        labels=labels,
        upstream=upstream,
        upstream_entropy=upstream_entropy,
        vocab_size=vocab,
        temperature=TEMPERATURE,
        chunk=chunk,
    )


@pytest.mark.parametrize(
    ("tensor", "padded", "vocab"),
    [
        (1, 251, 251),
        (2, 252, 251),
        (4, 252, 251),
        (4, 336, 251),  # the last rank holds nothing but padding
        (4, 8, 3),  # the last two do
    ],
)
def test_values_and_gradients_equal_log_softmax_of_the_full_logits(
    workers: WorkerPool, tensor: int, padded: int, vocab: int
) -> None:
    logits, labels, upstream = inputs(padded, vocab)
    logprobs, entropy, grad = reference(logits, labels, upstream, vocab)
    ranks = run(workers, tensor, logits, labels, upstream, vocab)
    for found in ranks:
        torch.testing.assert_close(found.logprobs, logprobs, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.entropy, entropy, rtol=0, atol=1e-12)
        assert found.logits_untouched
    columns = torch.cat([found.grad for found in ranks], dim=1)
    torch.testing.assert_close(columns, grad, rtol=0, atol=1e-12)
    assert torch.equal(columns[:, vocab:], torch.zeros(TOKENS, padded - vocab).double())


@pytest.mark.parametrize("chunk", [1, TOKENS - 1, TOKENS, TOKENS + 1])
def test_where_chunks_end_does_not_matter(workers: WorkerPool, chunk: int) -> None:
    logits, labels, upstream = inputs(252)
    logprobs, entropy, grad = reference(logits, labels, upstream)
    ranks = run(workers, 2, logits, labels, upstream, chunk=chunk)
    torch.testing.assert_close(ranks[0].logprobs, logprobs, rtol=0, atol=1e-12)
    torch.testing.assert_close(ranks[0].entropy, entropy, rtol=0, atol=1e-12)
    columns = torch.cat([found.grad for found in ranks], dim=1)
    torch.testing.assert_close(columns, grad, rtol=0, atol=1e-12)


def test_large_logits_neither_overflow_nor_lose_the_likely_token(workers: WorkerPool) -> None:
    logits, labels, upstream = inputs(252)
    logits[:, :VOCAB] += 2000.0
    logits[torch.arange(TOKENS), labels] += 500.0
    logprobs, entropy, grad = reference(logits, labels, upstream)
    ranks = run(workers, 2, logits, labels, upstream)
    torch.testing.assert_close(ranks[1].logprobs, logprobs, rtol=0, atol=1e-10)
    torch.testing.assert_close(ranks[1].entropy, entropy, rtol=0, atol=1e-10)
    columns = torch.cat([found.grad for found in ranks], dim=1)
    torch.testing.assert_close(columns, grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "value_error", "grad_error"),
    [(torch.float32, 1e-5, 1e-6), (torch.bfloat16, 1e-5, 0.01)],
)
def test_lower_precision_logits_are_reduced_in_float32(
    workers: WorkerPool, dtype: torch.dtype, value_error: float, grad_error: float
) -> None:
    logits, labels, upstream = inputs(252, dtype=dtype)
    logprobs, entropy, grad = reference(logits, labels, upstream)
    ranks = run(workers, 2, logits, labels, upstream)
    for found in ranks:
        assert found.logprobs.dtype == found.entropy.dtype == torch.float32
        assert found.grad.dtype == dtype
        torch.testing.assert_close(found.logprobs.double(), logprobs, rtol=0, atol=value_error)
        torch.testing.assert_close(found.entropy.double(), entropy, rtol=0, atol=value_error)
    columns = torch.cat([found.grad for found in ranks], dim=1).double()
    torch.testing.assert_close(columns, grad, rtol=0.01, atol=grad_error)


# --------------------------------------------------------------------------- entropy's gradient


def alone(
    logits: torch.Tensor, labels: torch.Tensor, vocab: int = VOCAB, temperature: float = TEMPERATURE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropy in this process, which has all columns."""
    topology = cast(Topology, SimpleNamespace(tensor=SimpleNamespace(rank=0, size=1, group=None)))
    return vocab_parallel_logprobs(logits, labels, vocab, topology, temperature)


def dense(
    logits: torch.Tensor, labels: torch.Tensor, vocab: int = VOCAB, temperature: float = TEMPERATURE
) -> tuple[torch.Tensor, torch.Tensor]:
    log_softmax = torch.log_softmax(logits[:, :vocab] / temperature, dim=1)
    entropy = -(log_softmax.exp() * log_softmax).sum(dim=1)
    return log_softmax[torch.arange(len(labels)), labels], entropy


@pytest.mark.parametrize(("of_logprobs", "of_entropy"), [(0, 1), (1, 1), (1, 0)])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("padded", [251, 256])
def test_gradients_of_both_outputs_are_those_of_the_dense_softmax(
    monkeypatch: pytest.MonkeyPatch,
    of_logprobs: int,
    of_entropy: int,
    temperature: float,
    padded: int,
) -> None:
    monkeypatch.setattr(module, "CHUNK", 5)
    logits, labels, upstream = inputs(padded)
    logits.requires_grad_()
    other = upstream.flip(0)

    def grad(outputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        terms = ((outputs[0] * upstream).sum(), (outputs[1] * other).sum())
        chosen = [t for t, on in zip(terms, (of_logprobs, of_entropy), strict=True) if on]
        return torch.autograd.grad(torch.stack(chosen).sum(), logits)[0]

    found = grad(alone(logits, labels, temperature=temperature))
    wanted = grad(dense(logits, labels, temperature=temperature))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    assert torch.equal(found[:, VOCAB:], torch.zeros(TOKENS, padded - VOCAB).double())
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_of_certain_tokens_has_a_finite_gradient(dtype: torch.dtype) -> None:
    """Probabilities that underflow, and upstreams that would take -inf to NaN with them."""
    logits, labels, _ = inputs(256)
    logits[:, :VOCAB] *= 2000
    logits = logits.to(dtype).requires_grad_()
    for scale in (1.0, 1e3):
        logprobs, entropy = alone(logits, labels)
        (grad,) = torch.autograd.grad((entropy.sum() + 0 * logprobs.sum()) * scale, logits)
        assert bool(grad.isfinite().all())
        assert not grad[:, VOCAB:].any()


def test_entropy_over_shards_has_the_gradient_of_the_whole(workers: WorkerPool) -> None:
    logits, labels, upstream = inputs(336)  # half of the second rank is padding
    other = upstream.flip(0)
    ranks = run(workers, 2, logits, labels, upstream, upstream_entropy=other)
    full = logits.clone().requires_grad_()
    logprobs, entropy = dense(full, labels)
    (wanted,) = torch.autograd.grad((logprobs * upstream + entropy * other).sum(), full)
    columns = torch.cat([found.grad for found in ranks], dim=1)
    torch.testing.assert_close(columns, wanted, rtol=0, atol=1e-12)


def test_backward_without_entropy_does_not_compute_its_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any) -> torch.Tensor:
        raise AssertionError("entropy has no gradient here")

    monkeypatch.setattr(module, "_entropy_gradient", fail)
    logits, labels, upstream = inputs(252)
    logits.requires_grad_()
    logprobs, entropy = alone(logits, labels)
    (logprobs * upstream).sum().backward()
    with pytest.raises(AssertionError, match="no gradient here"):
        alone(logits, labels)[1].sum().backward()
    assert entropy.requires_grad
