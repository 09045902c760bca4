"""The projected accumulation as the paper writes it: slow, unsharded and independent of ours.

Hugging Face's own model gives the gradient of every sequence by a backward pass on that sequence
alone; vectors of the parameters' full size are then projected one after the other, as in figures 1
and 3 of arXiv:2601.10498. ISOPO transforms the advantages of the same vectors, and Intra-PROMA
takes singular vectors of what went into linear modules and came back. Nothing is packed, sharded or
put in coefficient form.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from proma_megatron.config.model import ModelConfig
from proma_megatron.config.objective import ProjectionConfig
from proma_megatron.types import TrainingSequence
from support.gradients import VOCAB, Batch, random_weights
from support.paper import complement, deflated, isopo_advantages

Gradients = dict[str, torch.Tensor]  # by Hugging Face name
Ends = dict[str, tuple[torch.Tensor, torch.Tensor]]  # of a linear weight: X (L, in) and dY (L, out)


def reference_gradients(
    model: ModelConfig, batch: Batch, projection: ProjectionConfig, seed: int, replicas: int = 1
) -> Gradients:
    """The accumulated gradient of every tensor.

    Replica r of ``replicas`` accumulates its own chain of the microbatches r, r + replicas, ...;
    the chains are added.
    """
    network = huggingface_model(model, seed)
    total = float(sum(sum(s.loss_mask[1:]) for microbatch in batch for s in microbatch))
    chains = [
        _chain(network, batch[replica::replicas], projection, total) for replica in range(replicas)
    ]
    return {name: sum(chain[name] for chain in chains) for name in chains[0]}  # type: ignore[misc]


def huggingface_model(model: ModelConfig, seed: int) -> PreTrainedModel:
    """Hugging Face's Qwen3 or Qwen2 in float64, with `random_weights`."""
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "max_position_embeddings": 64,
        "use_cache": False,
        "attn_implementation": "sdpa",  # the eager softmax rounds to float32
    }
    assert model.qk_norm != model.qkv_bias, "Qwen3 has q/k norms, Qwen2 has biases"
    if model.qk_norm:
        network: PreTrainedModel = Qwen3ForCausalLM(Qwen3Config(**options))
    else:
        assert model.head_dim * model.heads == model.hidden_size, "Qwen2 derives head_dim"
        network = Qwen2ForCausalLM(Qwen2Config(**options))
    network = in_float64(network)
    weights = random_weights(model, seed)
    parameters = dict(network.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return network


def in_float64(network: PreTrainedModel) -> PreTrainedModel:
    """Hugging Face's model with float64 weights and norms that don't round to float32."""
    for module in network.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module)
    return network


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Hugging Face's RMSNorm without its detour through float32."""
    scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + module.variance_epsilon)
    return module.weight * (x * scale)


@contextlib.contextmanager
def _watched(network: PreTrainedModel) -> Iterator[Ends]:
    """What goes into every linear module, and the gradient of what comes out, by weight."""
    inputs: Gradients = {}
    found: Ends = {}

    def forward(name: str, module: Any, arguments: Any, output: torch.Tensor) -> None:
        inputs[name] = arguments[0].detach()[0]
        output.register_hook(partial(backward, name))

    def backward(name: str, gradient: torch.Tensor) -> None:
        found[name] = (inputs[name], gradient[0])

    hooks = [
        module.register_forward_hook(partial(forward, f"{path}.weight"))
        for path, module in network.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    yield found
    for hook in hooks:
        hook.remove()


def _sequence_gradients(
    network: PreTrainedModel, sequence: TrainingSequence, total: float
) -> tuple[Gradients, Ends]:
    """Gradient of ``-(1/N) sum_t w_t log pi_t``; the advantage is not in it."""
    network.zero_grad(set_to_none=True)
    with _watched(network) as ends:
        _unit_loss(network, sequence, total).backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in network.named_parameters()
    }
    return gradients, ends


def _unit_loss(network: PreTrainedModel, sequence: TrainingSequence, total: float) -> torch.Tensor:
    tokens = torch.tensor([sequence.tokens])
    logits = network(input_ids=tokens).logits[0]
    logprobs = logits.log_softmax(dim=-1)
    weights = sequence.token_weights or (1.0,) * len(sequence.tokens)
    loss = logits.new_zeros(())
    for t in range(1, len(sequence.tokens)):
        weight = sequence.loss_mask[t] * weights[t]
        loss = loss - weight * logprobs[t - 1, sequence.tokens[t]] / total
    return loss


def _chain(
    network: PreTrainedModel, batch: Batch, projection: ProjectionConfig, total: float
) -> Gradients:
    parameters = dict(network.named_parameters())
    units = _units(list(parameters), projection)
    accumulated = {
        unit: torch.zeros(sum(parameters[name].numel() for name in names), dtype=torch.float64)
        for unit, names in units.items()
    }
    for microbatch in batch:
        if not microbatch:
            continue
        found, ends = zip(
            *(_sequence_gradients(network, sequence, total) for sequence in microbatch),
            strict=True,
        )
        advantages = torch.tensor([s.advantage for s in microbatch], dtype=torch.float64)
        for unit, names in units.items():
            sequence_gradients = torch.stack(
                [torch.cat([g[name].flatten() for name in names]) for g in found], dim=1
            )
            policy_gradient = sequence_gradients @ advantages
            if not _is_projected(names, projection):
                accumulated[unit] += policy_gradient
            elif projection.rule == "subspace":
                accumulated[unit] += _deflated(ends, names, advantages, projection)
            elif projection.rule in ("kernel", "norm"):
                accumulated[unit] += sequence_gradients @ isopo_advantages(
                    projection.rule, sequence_gradients, advantages, projection.regularization
                )
            else:
                complemented = complement(
                    accumulated[unit], sequence_gradients, policy_gradient, projection
                )
                accumulated[unit] = complemented + policy_gradient
    result: Gradients = {}
    for unit, names in units.items():
        parts = accumulated[unit].split([parameters[name].numel() for name in names])
        for name, part in zip(names, parts, strict=True):
            result[name] = part.view_as(parameters[name])
    return result


def _deflated(
    ends: Sequence[Ends],
    names: list[str],
    advantages: torch.Tensor,
    projection: ProjectionConfig,
) -> torch.Tensor:
    """What Intra-PROMA adds for one unit (d,): all tokens of a microbatch, all rows of a unit."""
    x = torch.cat([found[names[0]][0] for found in ends])
    dy = torch.cat([torch.cat([found[name][1] for name in names], dim=1) for found in ends])
    lengths = torch.tensor([len(found[names[0]][0]) for found in ends])
    return deflated(x, dy, advantages.repeat_interleave(lengths), projection).flatten()


def _units(names: list[str], projection: ProjectionConfig) -> dict[str, list[str]]:
    """Tensors that are projected as one vector: each its own, or those that Megatron fuses."""
    units: dict[str, list[str]] = {}
    for name in names:
        unit = name
        if projection.unit == "megatron":
            unit = re.sub(r"\.[qkv]_proj\.", ".qkv.", unit)
            unit = re.sub(r"\.(gate|up)_proj\.", ".gate_up.", unit)
        units.setdefault(unit, []).append(name)
    return units


def _is_projected(names: list[str], projection: ProjectionConfig) -> bool:
    if projection.rule == "none":
        return False
    if projection.parameters == "all" and projection.rule != "subspace":
        return True
    return all(re.search(r"(_proj|lm_head)\.weight$", name) for name in names)
