"""Hugging Face's names of a dense Qwen's tensors, beside Megatron-Core's parameters."""

from __future__ import annotations

from proma_megatron.weights.shards import Fusion, Row, Share

# Hugging Face's lm_head shares the embedding's tensor where they are tied, and Megatron's last
# pipeline stage holds a copy of it; it counts as no Linear then.
TIED_HEAD = Row(("model.embed_tokens.weight",))


MODEL = {
    "embedding.word_embeddings.weight": Row(("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": Row(("model.norm.weight",), share=Share.TOKENS),
    "output_layer.weight": Row(("lm_head.weight",), linear=True),
}


# Names on both sides go on from "decoder.layers.N." and "model.layers.N.".
LAYER = {
    "input_layernorm.weight": Row(("input_layernorm.weight",), share=Share.TOKENS),
    "self_attention.linear_qkv.weight": Row(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        fusion=Fusion.KV_GROUP,
        linear=True,
    ),
    "self_attention.linear_qkv.bias": Row(
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        fusion=Fusion.KV_GROUP,
    ),
    "self_attention.q_layernorm.weight": Row(("self_attn.q_norm.weight",), share=Share.HEADS),
    "self_attention.k_layernorm.weight": Row(("self_attn.k_norm.weight",), share=Share.HEADS),
    "self_attention.linear_proj.weight": Row(("self_attn.o_proj.weight",), axis=1, linear=True),
    "pre_mlp_layernorm.weight": Row(("post_attention_layernorm.weight",), share=Share.TOKENS),
    "mlp.linear_fc1.weight": Row(
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"), fusion=Fusion.RANK, linear=True
    ),
    "mlp.linear_fc2.weight": Row(("mlp.down_proj.weight",), axis=1, linear=True),
}
