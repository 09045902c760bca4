"""The fullest moments of a rollout on one rank: a decoding batch of full-length sequences.

The key-value cache is exact. What decoding holds besides follows from the generator's and the
sampler's operators; temporaries inside kernels are not counted, and on a GPU nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterator

from proma_megatron.config.constants import KEPT_ROWS
from proma_megatron.config.run import RunConfig
from proma_megatron.planning.counts import Counts
from proma_megatron.planning.shapes import Stage
from proma_megatron.planning.sizes import Sizes
from proma_megatron.planning.training import Moment


def cache_bytes(stage: Stage, sizes: Sizes, sequences: int, length: int) -> int:
    """Return bytes of keys and values of this rank's layers and KV heads, prompt and completion."""
    return 2 * stage.layers * sequences * length * sizes.key * sizes.precision.compute


def rollout_moments(
    config: RunConfig, stage: Stage, sizes: Sizes, counts: Counts
) -> tuple[Moment, ...]:
    """Return the candidates for this stage's peak while completions are sampled."""
    return tuple(_moments(config, stage, sizes, counts))


def _moments(config: RunConfig, stage: Stage, sizes: Sizes, counts: Counts) -> Iterator[Moment]:
    rollout, e = config.rollout, sizes.precision.compute
    batch, prompt, length = counts.decoded_together, rollout.max_prompt_tokens, counts.longest
    cache = cache_bytes(stage, sizes, batch, length)
    tokens = batch * prompt
    repeated = 2 * sizes.query if sizes.query > sizes.key else 0
    # The stream, a norm's output, and an MLP or an attention with all of its intermediates.
    mlp = 5 * sizes.ffn
    # Where ranks share KV heads, the projection is gathered along tokens first, then along heads.
    projected = sizes.qkv if sizes.qkv_kept == sizes.qkv else sizes.qkv + 2 * sizes.qkv_kept
    attention = max(projected, sizes.qkv_kept + 4 * sizes.query + repeated)
    masks = batch * prompt * prompt * (2 + e)  # allowed, forbidden, and as numbers to add
    layer = tokens * (2 * sizes.hidden + max(mlp, attention)) * e
    yield Moment("prompts", activations=layer + masks, kv_cache=cache)
    # One token's queries attend in groups, to keys and values as they are cached.
    scores = 2 * length * (sizes.query // config.model.head_dim) * sizes.precision.wide
    step = batch * ((2 * sizes.hidden + max(mlp, attention)) * e + scores)
    yield Moment("decoding", activations=step, kv_cache=cache)
    logits = 0
    if stage.last:
        gathered = sizes.tensor > 1 and sorts(config)
        vocabulary = sizes.vocab * sizes.tensor if gathered else sizes.vocab
        local = sizes.logits // sizes.tokens if gathered else 0
        logits = batch * (local + vocabulary * (e + _sampling(config, sizes)))
        yield Moment("sampling", logits=logits, kv_cache=cache)
        logits = batch * vocabulary * e
    # Rows that are still decoding are copied out of a layer before its old cache goes.
    copied = int(KEPT_ROWS * cache / stage.layers)
    yield Moment("dropping rows", logits=logits, kv_cache=cache + copied)


def sorts(config: RunConfig) -> bool:
    """Tell whether drawing a token puts the vocabulary in order, for which it is gathered."""
    evaluation = config.evaluation
    greedy = evaluation.temperature == 0 or (
        evaluation.temperature is None and evaluation.samples == 1
    )
    return config.rollout.top_p < 1 or (evaluation.top_p < 1 and not greedy)


def _sampling(config: RunConfig, sizes: Sizes) -> int:
    """Return the bytes a vocabulary entry that sampling holds at its worst, beside the logits."""
    wide = sizes.precision.wide
    if sizes.tensor > 1 and not sorts(config):
        return wide + 8 + 4 + 8  # float64 weights, and a count of those that are not 0
    copy = wide if wide > sizes.precision.compute else 0
    # Log-probabilities, float64 probabilities, their sum, and a count of those that are not 0.
    plain = copy + wide + 8 + 8 + 4 + 8
    if sorts(config):
        # Sorted values with their order, what precedes each, the mask, and the order's inverse.
        return max(plain, copy + wide + 8 + 8 + 8 + 8 + 1 + 8 + 8)
    return plain
