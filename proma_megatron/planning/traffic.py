"""Bytes that a rank sends in one RL step, by purpose.

Collectives are counted as rings: over n ranks an all-reduce of B bytes sends 2 (n - 1) / n B a
rank, and an all-gather or a reduce-scatter of B bytes in all (n - 1) / n B. Every microbatch has
its full size and every completion its full length. Left out: the warm start, evaluation,
checkpoints, metrics and other scalars.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from proma_megatron.config.run import RunConfig
from proma_megatron.planning.counts import Counts
from proma_megatron.planning.resident import Resident
from proma_megatron.planning.shapes import EMBEDDING, HEAD, Local, Stage
from proma_megatron.planning.sizes import Sizes
from proma_megatron.planning.workspace import is_projected
from proma_megatron.projection.sizes import ITERATIONS, is_direct, sketch_width
from proma_megatron.weights.shards import Share


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by one rank of a stage in one RL step."""

    tensor: int  # activations and their gradients, over TP, in training
    pipeline: int  # the same between stages
    data: int  # gradients over replicas, and weights of a distributed optimizer
    tied: int  # gradients of a table that first and last stage share
    small_gradients: int  # norms that every tensor rank holds, added over TP
    projection: int  # what the rule needs over TP: K, c and short vectors, or subspaces
    tied_projection: int  # per-token gradients of a tied embedding, first to last stage
    looks: int  # forward passes that only look: KL to other policies, their log-probabilities
    rollout: int  # hidden states and logits while completions are sampled

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def traffic(
    config: RunConfig, stage: Stage, sizes: Sizes, counts: Counts, resident: Resident
) -> Traffic:
    """Return what a rank of this stage sends, in bytes a step."""
    microbatches, steps = counts.microbatches, counts.minibatches
    ends = _Ends(config, stage)
    forward, backward = _tensor(config, stage, sizes)
    recomputed = 2 if config.model.recompute == "full" else 1
    backward += (recomputed - 1) * _layers_forward(config, stage, sizes)
    passes = microbatches * steps
    looks = (forward + sizes.stream * ends.sent_forward) * passes * _looks(config)
    return Traffic(
        tensor=(forward + backward) * passes,
        pipeline=sizes.stream * (ends.sent_forward + ends.sent_backward) * passes,
        data=_data(config, resident) * steps,
        tied=_tied(config, stage, sizes) * steps,
        small_gradients=_small(config, stage, sizes) * steps,
        projection=_projection(config, stage, sizes) * _acting(config, microbatches) * steps,
        tied_projection=_tied_projection(config, stage, sizes) * passes,
        looks=int(looks),
        rollout=_rollout(config, stage, sizes, counts),
    )


def _looks(config: RunConfig) -> Fraction:
    """Return forward passes a step over all of its sequences, beside training's own."""
    trainer, loss = config.trainer, config.loss
    looks = Fraction(0)
    every_step = loss.kl.target is not None and loss.kl.reference == "rollout"
    step_every = 1 if every_step else trainer.kl_step_every
    penalty = bool(loss.kl.coefficient) and loss.kl.reference == "initial"
    # A penalty's reference says the divergence from the initial policy, too.
    for every in (0 if penalty else trainer.kl_every, step_every, trainer.kl_lagged_every):
        if every:
            looks += Fraction(1, every)
    if loss.mismatch != "off":
        looks += 1
    if penalty:
        looks += 1
    return looks


def all_reduce(size: int, ranks: int) -> int:
    """Return the bytes that a rank sends to add up ``size`` bytes over a ring."""
    return 2 * (ranks - 1) * size // ranks


def gather(size: int, ranks: int) -> int:
    """Return bytes that a rank sends to gather, or to reduce and scatter, ``size`` bytes in all."""
    return (ranks - 1) * size // ranks


class _Ends:
    """How many times a stage sends hidden states on, and gradients back, for one microbatch."""

    def __init__(self, config: RunConfig, stage: Stage) -> None:
        chunks = len(stage.chunks) if config.parallel.pipeline > 1 else 0
        self.sent_forward = chunks - (1 if chunks and stage.last else 0)
        self.sent_backward = chunks - (1 if chunks and stage.first else 0)


def _layers_forward(config: RunConfig, stage: Stage, sizes: Sizes) -> int:
    """Return bytes of a microbatch through all layers of a stage: two row-parallel sums a layer.

    Under sequence parallelism each is a reduce-scatter, with a gather before the next linear layer,
    which is the same number of bytes.
    """
    n = sizes.tensor
    layer = 2 * all_reduce(sizes.gathered, n)
    if config.model.kv_heads < n:
        layer += gather(sizes.tokens * sizes.qkv_kept * sizes.precision.compute, n)
    return stage.layers * layer


def _tensor(config: RunConfig, stage: Stage, sizes: Sizes) -> tuple[int, int]:
    """Return what forward and backward of one microbatch send."""
    n, hidden = sizes.tensor, sizes.gathered
    forward = backward = _layers_forward(config, stage, sizes)
    if config.parallel.sequence:
        # Backward gathers the inputs of the two column-parallel layers once more.
        backward += stage.layers * 2 * gather(hidden, n)
    if stage.first:
        sharded = config.parallel.sequence
        forward += gather(hidden, n) if sharded else all_reduce(hidden, n)
        backward += gather(hidden, n) if sharded else 0
    if stage.last:
        if config.parallel.sequence:
            forward += gather(hidden, n)
            backward += 2 * gather(hidden, n)
        else:
            backward += all_reduce(hidden, n)
        # The largest logit, the normalizer, the label's logit and the entropy's sum of each token.
        forward += all_reduce(4 * sizes.tokens * sizes.precision.wide, n)
    return forward, backward


def _data(config: RunConfig, resident: Resident) -> int:
    replicas = config.parallel.data or 1
    if config.optimizer.distributed:
        return gather(resident.main_gradients, replicas) + gather(resident.weights, replicas)
    return all_reduce(resident.main_gradients, replicas)


def _tied(config: RunConfig, stage: Stage, sizes: Sizes) -> int:
    shared = [found for found in stage.parameters if found.shared]
    return sum(all_reduce(found.count * sizes.precision.gradient, 2) for found in shared)


def _small(config: RunConfig, stage: Stage, sizes: Sizes) -> int:
    entries = sum(p.count for p in stage.parameters if _partial(config, p))
    return all_reduce(entries * sizes.precision.gradient, sizes.tensor)


def _partial(config: RunConfig, parameter: Local) -> bool:
    """Tell whether Megatron adds this gradient up over TP: `Reduction.PARTIAL`."""
    share = parameter.row.share
    return share is Share.HEADS or (share is Share.TOKENS and config.parallel.sequence)


def projection_numbers(config: RunConfig, stage: Stage, sizes: Sizes) -> int:
    """Count float64 numbers that one microbatch's solves add up over TP on a rank.

    PROMA: of a weight half of the symmetric K (k, k), c (k,) and |A|^2 for every unit; of a norm or
    bias, G (k, n) and A (n,). ISOPO: half of K, and G of norms. Intra-PROMA: see
    `_subspace_numbers`.
    """
    if sizes.tensor == 1:
        return 0
    k, total = sizes.sequences, 0
    half = k * (k + 1) // 2
    alone = config.projection.acts_alone
    separate = config.projection.unit == "huggingface"
    tied = config.model.tie_embeddings
    for parameter in stage.parameters:
        if not is_projected(parameter, config):
            continue
        if parameter.name == EMBEDDING and tied and config.parallel.pipeline > 1:
            continue  # accumulated on the last stage
        units = len(parameter.row.tensors) if separate else 1
        if config.projection.by_subspaces:
            total += _subspace_numbers(config, parameter, units, sizes)
        elif alone and not _partial(config, parameter):
            total += units * half if parameter.row.share is Share.ENTRIES else 0
        elif alone:
            total += k * parameter.count
        elif len(parameter.shape) == 2:
            total += units * (half + k + 1)
        elif parameter.row.share is Share.ENTRIES:
            total += units * (k + 1) * parameter.count * sizes.tensor
        elif _partial(config, parameter):
            total += (k + 1) * parameter.count
    return total


def _subspace_numbers(config: RunConfig, weight: Local, units: int, sizes: Sizes) -> int:
    """Count numbers of the sharded one of X and dY, and two squared norms a unit."""
    tokens, rank = sizes.tokens, config.projection.rank
    each = tokens * tokens
    if not is_direct(tokens, rank):
        each = (ITERATIONS + 1) * tokens * sketch_width(rank)
    cut_outputs = weight.row.axis == 0
    sought = config.projection.sides != ("input" if cut_outputs else "output")
    return (units if cut_outputs else 1) * each * sought + 2 * units


def _acting(config: RunConfig, microbatches: int) -> int:
    """Count the microbatches that the rule acts on."""
    return microbatches if config.projection.acts_alone else max(0, microbatches - 1)


def _projection(config: RunConfig, stage: Stage, sizes: Sizes) -> int:
    if not config.projects:
        return 0
    return all_reduce(8 * projection_numbers(config, stage, sizes), sizes.tensor)


def _tied_projection(config: RunConfig, stage: Stage, sizes: Sizes) -> int:
    over_stages = config.parallel.pipeline > 1 and stage.find(HEAD) is None and stage.first
    tied = config.model.tie_embeddings and config.projects
    return sizes.gathered if tied and over_stages else 0


def _rollout(config: RunConfig, stage: Stage, sizes: Sizes, counts: Counts) -> int:
    """Return what a rollout sends: prompts, then token by token; without sequence parallelism."""
    n, e = sizes.tensor, sizes.precision.compute
    sequences = counts.sequences // (config.parallel.data or 1)
    new = config.rollout.max_new_tokens
    drawn = sequences * new
    tokens = sequences * (config.rollout.max_prompt_tokens + new - 1)
    hidden = tokens * sizes.hidden * e
    sums = 2 * stage.layers + (1 if stage.first else 0)
    total = sums * all_reduce(hidden, n)
    if config.model.kv_heads < n:
        total += stage.layers * gather(tokens * sizes.qkv_kept * e, n)
    total += hidden * _Ends(config, stage).sent_forward
    if stage.last:
        if config.rollout.top_p < 1:
            total += gather(drawn * sizes.vocab * n * e, n)
        else:  # of each shard its largest logit and two masses, and with a top-k so many logits
            total += gather(drawn * n * (24 + config.rollout.top_k * sizes.precision.wide), n)
    # Token and probability: a sum over all ranks, or what the last stage tells the others.
    if n > 1 and config.rollout.top_p == 1:
        total += all_reduce(16 * drawn, config.parallel.model_size)
    elif stage.last and config.parallel.model_size > 1:
        total += 16 * drawn
    return total
