"""Sample completions from the policy's own sharded weights, with a key-value cache.

Decoding is a batch over prompts of different lengths, padded at the left; every row has its own
positions and its own noise, so a rollout is the same in any batch. Pipeline stages pass hidden
states by hand; the last stage samples, from shards of the vocabulary, and tells the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.utils import InferenceMode

from proma_megatron.config.constants import KEPT_ROWS
from proma_megatron.model.attention import KeyValueCache
from proma_megatron.model.policy import Policy
from proma_megatron.rollout.engine import Completion, Interrupt, Interrupted, SamplingOptions
from proma_megatron.rollout.sampling import sample, sample_shard

LOOK_TOKENS = 32  # decoded between two looks at whether to give up


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    noise: torch.Tensor,
    stops: Sequence[int],
    options: SamplingOptions,
    interrupt: Interrupt | None = None,
) -> list[Completion]:
    """Generate one completion a prompt, the same on every rank of this replica.

    Args:
        noise: (prompts, max_new_tokens) uniform numbers; ignored when greedy.
        stops: tokens any of which ends a completion.
        interrupt: asked every `LOOK_TOKENS` tokens, by all ranks of this replica together, whether
            to give up; they must get the same answer.

    Raises:
        Interrupted: the answer was yes.
    """
    if not prompts:
        return []
    # Prompts of like length decode together, which saves padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: dict[int, Completion] = {}
    with policy.rollout_mode(), InferenceMode.active():
        for start in range(0, len(order), options.batch_size):
            batch = order[start : start + options.batch_size]
            decoded = _decode(
                policy, [prompts[i] for i in batch], noise[batch], stops, options, interrupt
            )
            completions.update(zip(batch, decoded, strict=True))
    return [completions[i] for i in range(len(prompts))]


def _decode(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    noise: torch.Tensor,
    stops: Sequence[int],
    options: SamplingOptions,
    interrupt: Interrupt | None,
) -> list[Completion]:
    device, count = policy.topology.device, len(prompts)
    distinct, owner = _distinct(prompts)
    longest = max(len(prompt) for prompt in distinct)
    padding = torch.tensor([longest - len(prompt) for prompt in distinct], device=device)
    cache = KeyValueCache(len(distinct), longest + options.max_new_tokens, padding)
    inputs = torch.tensor(
        [[0] * (longest - len(prompt)) + list(prompt) for prompt in distinct], device=device
    )
    noise = noise.to(device)
    ends = torch.tensor(stops, device=device)
    active = torch.arange(count, device=device)  # rows of the cache -> prompts
    done = torch.zeros(count, dtype=torch.bool, device=device)  # by row of the cache
    # What was drawn stays on the device until all is: a host that reads every token waits for each.
    tokens = torch.zeros((options.max_new_tokens, count), dtype=torch.int64, device=device)
    logprobs = torch.zeros((options.max_new_tokens, count), dtype=torch.float64, device=device)
    lengths = torch.zeros(count, dtype=torch.int64, device=device)
    finished = torch.zeros(count, dtype=torch.bool, device=device)
    for position in range(options.max_new_tokens):
        if interrupt is not None and position % LOOK_TOKENS == LOOK_TOKENS - 1 and interrupt():
            raise Interrupted
        logits = _next_logits(policy, cache, inputs, gather=options.sorts)
        if position == 0 and len(distinct) < count:
            rows = torch.tensor(owner, device=device)
            cache.keep(rows)
            logits = None if logits is None else logits[rows]
        uniform = None if options.greedy else noise[active, position]
        drawn, scores = _draw(policy, logits, uniform, options, len(active))
        tokens[position, active], logprobs[position, active] = drawn, scores
        lengths.index_add_(0, active, (~done).long())
        done |= torch.isin(drawn, ends)
        finished[active] = done
        alive = (~done).nonzero()[:, 0]
        if not len(alive):
            break
        # Finished rows decode on, and are cut below, until dropping them is worth a copy.
        if len(alive) <= KEPT_ROWS * len(active):
            cache.keep(alive)
            active, drawn, done = active[alive], drawn[alive], done[alive]
        inputs = drawn[:, None]
    return [
        Completion(tuple(found[:length]), tuple(scores[:length]), ended)
        for found, scores, length, ended in zip(
            tokens.t().tolist(),
            logprobs.t().tolist(),
            lengths.tolist(),
            finished.tolist(),
            strict=True,
        )
    ]


def _distinct(prompts: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Return each prompt once, and where each one is among these: samples share a prompt's cost."""
    places: dict[tuple[int, ...], int] = {}
    owner = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
    return list(places), owner


def _next_logits(
    policy: Policy, cache: KeyValueCache, inputs: torch.Tensor, *, gather: bool
) -> torch.Tensor | None:
    """Return logits of the next token on the last stage, None on the others.

    Args:
        gather: (b, V) on every tensor rank; otherwise this rank's columns, without padding.
    """
    topology = policy.topology
    batch, count = inputs.shape
    positions, mask = cache.positions(count), cache.mask(count)
    shape = (count, batch, policy.config.hidden_size)
    output: torch.Tensor | None = None
    stages = topology.pipeline
    for stage, module in enumerate(policy.modules):
        first = stage == 0 and topology.is_first_stage
        last = stage == len(policy.modules) - 1 and topology.is_last_stage
        if not first:
            hidden = torch.empty(shape, dtype=policy.config.params_dtype, device=topology.device)
            dist.recv(hidden, group=stages.group, group_src=(stages.rank - 1) % stages.size)
            module.set_input_tensor(hidden)
        output = module(
            inputs,
            positions,
            mask,
            inference_context=cache,
            runtime_gather_output=True,  # Megatron insists; `_own_logits` goes around it
            output_processor=None if gather else _own_logits,
        )
        if not last:
            assert output is not None
            dist.send(
                output.contiguous(),
                group=stages.group,
                group_dst=(stages.rank + 1) % stages.size,
            )
            output = None
    cache.length += count
    if output is None:
        return None
    first = 0 if gather else policy.first_token
    return output[:, -1, : max(0, policy.vocab_size - first)]


def _own_logits(
    hidden_states: torch.Tensor, output_layer: Any, output_weight: torch.Tensor | None, **_: Any
) -> torch.Tensor:
    """Return (b, 1, V/tp) of the last token, from hidden states (s, b, h): Megatron's processor."""
    logits, _ = output_layer(hidden_states[-1:], weight=output_weight, runtime_gather_output=False)
    return logits.transpose(0, 1)


def _draw(
    policy: Policy,
    logits: torch.Tensor | None,
    uniform: torch.Tensor | None,
    options: SamplingOptions,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw tokens (b,) with log-probabilities (b,), equal on every rank of the replica.

    A rank draws from its own columns of the vocabulary, and the sum over all ranks is what the one
    that holds the draw has found. If rows have to be sorted, all tensor ranks of the last stage
    hold the same gathered logits, and the first of them tells the others.
    """
    topology = policy.topology
    packed = torch.zeros((2, count), dtype=torch.float64, device=topology.device)
    sharded = topology.tensor.size > 1 and not options.sorts
    if logits is not None and sharded:
        packed[0], packed[1] = sample_shard(
            logits,
            policy.first_token,
            uniform,
            options.temperature,
            options.top_k,
            topology.tensor,
        )
    elif logits is not None:
        packed[0], packed[1] = sample(
            logits, uniform, options.temperature, options.top_k, options.top_p
        )
    if sharded:
        dist.all_reduce(packed, group=topology.model.group)
    elif topology.model.size > 1:
        source = topology.model.global_rank(topology.model.size - topology.tensor.size)
        dist.broadcast(packed, src=source, group=topology.model.group)
    return packed[0].long(), packed[1]
