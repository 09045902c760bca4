"""How a step's sequences are cut into microbatches when all of them are as long as they may be."""

from __future__ import annotations

from dataclasses import dataclass

from proma_megatron.config.run import RunConfig


@dataclass(frozen=True)
class Counts:
    """Sequences and tokens of one RL step, at full length."""

    sequences: int  # of all replicas in an RL step
    tokens: int  # of all replicas in an RL step, prompts included
    minibatches: int  # optimizer steps in an RL step
    sequences_per_minibatch: int  # of all replicas
    microbatches: int  # of one replica in a minibatch
    sequences_per_microbatch: int  # k of the largest
    tokens_per_microbatch: int  # T of the largest that lengths below the maximum allow
    longest: int  # tokens of a sequence
    decoded_together: int  # sequences in one decoding batch of a replica

    @property
    def rows(self) -> int:
        """Rows of ``longest`` tokens that attention unpacks a full microbatch into."""
        return -(-self.tokens_per_microbatch // self.longest)


def count(config: RunConfig) -> Counts:
    """Count what an RL step is made of.

    With a token budget, microbatches are as few as full-length sequences allow, and equal in
    number on every replica. Shorter sequences fill one up to the budget, so its tokens are the
    budget, or all tokens of a replica's minibatch where those are fewer.
    """
    rollout, batching, parallel = config.rollout, config.batching, config.parallel
    replicas = parallel.data or 1
    longest = config.max_sequence_length
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt
    minibatch = sequences // batching.minibatches
    mine = minibatch // replicas
    multiple = parallel.pipeline if parallel.virtual_pipeline else 1
    fixed = batching.sequences_per_microbatch
    if fixed is not None:
        together = min(fixed, mine)
        tokens = together * longest
    else:
        together = min(max(1, batching.tokens_per_microbatch // longest), mine)
        tokens = min(batching.tokens_per_microbatch, mine * longest)
    microbatches = _up(-(-mine // together), multiple)
    if parallel.sequence:
        tokens = _up(tokens, parallel.tensor)
    samples = max(
        rollout.prompts_per_step // replicas * rollout.samples_per_prompt, _validated(config)
    )
    return Counts(
        sequences=sequences,
        tokens=sequences * longest,
        minibatches=batching.minibatches,
        sequences_per_minibatch=minibatch,
        microbatches=microbatches,
        sequences_per_microbatch=-(-tokens // longest),
        tokens_per_microbatch=tokens,
        longest=longest,
        decoded_together=min(rollout.batch_size, samples),
    )


def _validated(config: RunConfig) -> int:
    """Count the sequences that a validation decodes together; of a file, as many as have room."""
    portion = config.rollout.batch_size
    if config.data.validation_file is not None:
        return portion
    each = -(-config.data.validation_problems // (config.parallel.data or 1))
    return min(portion, each * config.evaluation.samples)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
