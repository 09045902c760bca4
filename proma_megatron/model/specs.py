"""Megatron's transformer layer out of our linears, norms and attention, for either backend.

Both specs build the same parameters under the same names. Norms stay modules of their own: in a
fused norm + linear the norm's gradient can't be captured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from proma_megatron.config.model import ModelConfig
from proma_megatron.distributed.devices import Backend
from proma_megatron.model.attention import CachedSelfAttention, CoreAttention
from proma_megatron.model.capture import CapturedColumnLinear, CapturedRowLinear, RMSNorm


@dataclass(frozen=True)
class Kernels:
    """The modules that a backend has its own of."""

    column: Any
    row: Any
    attention: Any


def kernels(backend: Backend) -> Kernels:
    if backend == "torch":
        return Kernels(CapturedColumnLinear, CapturedRowLinear, CoreAttention)
    # Only here: without Transformer Engine the module can't be imported.
    from proma_megatron.model import te_capture

    return Kernels(
        te_capture.CapturedTEColumnLinear,
        te_capture.CapturedTERowLinear,
        te_capture.TECoreAttention,
    )


def block_spec(
    config: TransformerConfig, model: ModelConfig, vp_stage: int | None, backend: Backend
) -> TransformerBlockSubmodules:
    """Specify the layers of one model chunk, and the final norm."""
    own = kernels(backend)
    norm = RMSNorm if model.qk_norm else None
    bias_dropout_add: Any = get_bias_dropout_add
    attention = SelfAttentionSubmodules(
        linear_qkv=own.column,
        core_attention=own.attention,
        linear_proj=own.row,
        q_layernorm=norm,
        k_layernorm=norm,
    )
    layer = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=CachedSelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=attention,
        ),
        self_attn_bda=bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=partial(
            MLP.as_mlp_submodule,
            submodules=MLPSubmodules(linear_fc1=own.column, linear_fc2=own.row),
        ),
        mlp_bda=bias_dropout_add,
        # The names that checkpoints of the fused Transformer Engine layers have.
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=RMSNorm)
