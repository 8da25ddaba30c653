import pytest
import torch
from diffusers import AutoencoderTiny
from script_runs import write_videos
from transformers import ViTConfig, ViTModel


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict[str, str]:
    """A corpus of four 20-frame videos in two classes, a tiny VAE (4x), a tiny ViT/8."""
    root = tmp_path_factory.mktemp("material")
    write_videos(root / "videos", 20)
    (root / "videos" / "a" / "broken.mp4").write_bytes(b"")
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    counts = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    AutoencoderTiny(**blocks, **counts).save_pretrained(root / "vae")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(root / "teacher")
    return {"videos": str(root / "videos"), "vae": str(root / "vae"), "teacher": str(root / "teacher")}
