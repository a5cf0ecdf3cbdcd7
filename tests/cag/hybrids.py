"""Tiny random models with recurrent layers: the families that people run, shrunk to some layers of a few channels."""

from transformers import (
    BambaConfig,
    FalconH1Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    KimiLinearConfig,
    Lfm2Config,
    Mamba2Config,
    NemotronHConfig,
    OlmoHybridConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Zamba2Config,
)

SHARED = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "eos_token_id": 257,
    "bos_token_id": 256,
    "pad_token_id": 257,
}
DELTA_NET = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}
MAMBA2 = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}


def hybrid_config(family: str):
    """The configuration of a family of `FAMILIES`."""
    return FAMILIES[family]()


FAMILIES = {
    "qwen3_5_text": lambda: Qwen3_5TextConfig(**SHARED | DELTA_NET),
    "qwen3_next": lambda: Qwen3NextConfig(
        **SHARED | DELTA_NET,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "lfm2": lambda: Lfm2Config(
        **SHARED, layer_types=["conv", "conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False
    ),
    "granitemoehybrid": lambda: GraniteMoeHybridConfig(
        **SHARED | MAMBA2,
        layer_types=["mamba", "mamba", "attention", "mamba"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
    ),
    "falcon_h1": lambda: FalconH1Config(**SHARED | MAMBA2, mamba_d_ssm=64, head_dim=16),
    "bamba": lambda: BambaConfig(**SHARED | MAMBA2, attn_layer_indices=[2]),
    "nemotron_h": lambda: NemotronHConfig(
        **{key: value for key, value in SHARED.items() if key != "num_hidden_layers"},
        layers_block_type=["mamba", "moe", "attention", "mamba", "moe"],
        head_dim=16,
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        chunk_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
    "zamba2": lambda: Zamba2Config(
        **SHARED,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_ngroups=1,
        chunk_size=16,
        num_mem_blocks=1,
        use_shared_attention_adapter=False,
    ),
    "kimi_linear": lambda: KimiLinearConfig(  # whose attention is latent, with keys wider than values
        **SHARED | {"num_key_value_heads": 4},
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        linear_num_heads=2,
        linear_head_dim=8,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        num_experts=4,
        num_experts_per_token=2,
        num_shared_experts=1,
        moe_intermediate_size=16,
    ),
    "olmo_hybrid": lambda: OlmoHybridConfig(
        **SHARED,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=16,
    ),
}
REFUSED = {
    "jamba": (
        lambda: JambaConfig(
            **SHARED,
            attn_layer_period=4,
            attn_layer_offset=2,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
            mamba_d_state=8,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        "jamba answers a text in pieces otherwise than at once",
    ),
    "mamba2": (
        lambda: Mamba2Config(
            vocab_size=258,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=1,
            chunk_size=16,
        ),
        "mamba2 has no layer with keys and values",
    ),
}
"""Families that are refused, and how."""
