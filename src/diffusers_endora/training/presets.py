"""Model sizes by name, for training from scratch."""

from typing import Any

# Widths, heads and depths of DiT (Peebles & Xie 2023, table 1), which Endora keeps; depth counts single blocks, and
# half of them are spatial. "demo" is for trying things out on a CPU.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "xl-2": {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 14, "patch_size": 2},
    "l-2": {"num_attention_heads": 16, "attention_head_dim": 64, "num_layers": 12, "patch_size": 2},
    "b-2": {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 6, "patch_size": 2},
    "s-2": {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 6, "patch_size": 2},
    "demo": {"num_attention_heads": 6, "attention_head_dim": 32, "num_layers": 4, "patch_size": 2},
}

# 1e-4 is the paper's; a small model on a small corpus learns faster
LEARNING_RATES = {"xl-2": 1e-4, "l-2": 1e-4, "b-2": 1e-4, "s-2": 1e-4, "demo": 1e-3}
