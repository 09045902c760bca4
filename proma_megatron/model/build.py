"""Build the sharded policy: Megatron-Core's configuration, GPTModel, optimizer's buffers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig

from proma_megatron.config.fp8 import RECIPES
from proma_megatron.config.model import ModelConfig
from proma_megatron.distributed.devices import Backend, choose_backend
from proma_megatron.distributed.topology import Topology
from proma_megatron.model.capture import CapturedColumnLinear, CapturedEmbedding
from proma_megatron.model.policy import DTYPES, Frozen, Policy, PolicyModel
from proma_megatron.model.specs import block_spec
from proma_megatron.weights.filling import initialize


def build_policy(
    model: ModelConfig,
    vocab_size: int,
    max_sequence_length: int,
    topology: Topology,
    *,
    seed: int | None,
    distributed_optimizer: bool = False,
    frozen: bool = False,
) -> Policy:
    """Build the policy of this rank, initialized from ``seed`` alike in every layout.

    Args:
        seed: None leaves the weights as they come from memory, for a caller that fills them.
        frozen: without gradients and their buffers, for a policy that is never trained.
        vocab_size: tokens of the tokenizer; the sharded tables are padded to a multiple of TP.
        max_sequence_length: longest sequence that is trained on or generated.
    """
    backend = choose_backend(model, topology.device.type)
    config = transformer_config(model, topology, backend)
    padded = -(-vocab_size // topology.tensor.size) * topology.tensor.size
    virtual = topology.virtual_pipeline
    chunks = []
    with topology.megatron_calls():
        for stage in range(virtual):
            vp_stage = stage if virtual > 1 else None
            chunk = PolicyModel(
                config=config,
                transformer_layer_spec=block_spec(config, model, vp_stage, backend),  # type: ignore[arg-type]
                vocab_size=padded,
                max_sequence_length=max_sequence_length,
                pre_process=topology.is_first_stage and stage == 0,
                post_process=topology.is_last_stage and stage == virtual - 1,
                parallel_output=True,
                share_embeddings_and_output_weights=model.tie_embeddings,
                position_embedding_type="rope",
                rotary_base=model.rope_base,  # type: ignore[arg-type]
                vp_stage=vp_stage,
            )
            _capture_ends(chunk)
            if seed is not None:
                initialize(chunk, model, vocab_size, topology, seed)
            chunks.append(chunk.to(topology.device))
        if frozen:
            return Policy([Frozen(c) for c in chunks], config, model, vocab_size, topology, backend)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=model.dtype == "bfloat16",
            overlap_grad_reduce=False,
            use_distributed_optimizer=distributed_optimizer,
        )
        wrapped = [
            DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(chunks)
        ]
    return Policy(wrapped, config, model, vocab_size, topology, backend)


def transformer_config(
    model: ModelConfig, topology: Topology, backend: Backend = "torch"
) -> TransformerConfig:
    """Return Megatron's configuration of this model in this layout; no fusion that needs a GPU."""
    dtype = DTYPES[model.dtype]
    rules = RECIPES[model.fp8] if model.fp8 != "none" else None
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        qk_layernorm=model.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=topology.tensor.size,
        pipeline_model_parallel_size=topology.pipeline.size,
        virtual_pipeline_model_parallel_size=(
            topology.virtual_pipeline if topology.virtual_pipeline > 1 else None
        ),
        sequence_parallel=topology.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # no experts; the default refuses variable lengths
        # The loss arrives divided by N already, and N is global: DDP must add, not average.
        calculate_per_token_loss=True,
        recompute_granularity="full" if model.recompute == "full" else None,
        recompute_method="uniform" if model.recompute == "full" else None,
        recompute_num_layers=1 if model.recompute == "full" else None,
        # In host memory Megatron would make each of TE's weights whole, on every rank.
        use_cpu_initialization=backend == "torch",
        perform_initialization=False,  # see parameters.initialize
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        cross_entropy_loss_fusion=False,
        # Interleaved over two stages, both neighbours are one rank: batched messages would mix.
        overlap_p2p_comm=topology.virtual_pipeline > 1,
        batch_p2p_comm=topology.device.type == "cuda" and topology.virtual_pipeline == 1,
        deallocate_pipeline_outputs=False,  # outputs are views behind the backward mark
        fp8=rules.format if rules is not None else None,
        fp8_recipe=rules.megatron if rules is not None else "delayed",  # Megatron's default
        first_last_layers_bf16=rules is not None and model.fp8_skipped > 0,
        num_layers_at_start_in_bf16=model.fp8_skip_first,
        num_layers_at_end_in_bf16=model.fp8_skip_last,
        # Delayed scaling. Maxima are reduced in every pass, and replicas may make unlike numbers of
        # them (nonfinite.py); a long history outlives passes over padding alone.
        tp_only_amax_red=True,
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
    )


def _capture_ends(chunk: Any) -> None:
    """Give the embedding and the head, whose classes GPTModel hard-codes, our forward.

    Changing the class keeps the modules' parameters, hooks and checkpoint names as they are.
    """
    if hasattr(chunk, "embedding"):
        chunk.embedding.word_embeddings.__class__ = CapturedEmbedding
    if hasattr(chunk, "output_layer"):
        chunk.output_layer.__class__ = CapturedColumnLinear
