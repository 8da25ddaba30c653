"""The baselines' pipelines at sizes for tests, with random weights."""

from typing import Any

import torch

from diffusers_endora import (
    LVDMAutoencoder,
    LVDMPipeline,
    LVDMUNet3DModel,
    MoStGANVGenerator,
    MoStGANVPipeline,
    StyleGANVGenerator,
    StyleGANVPipeline,
)
from diffusers_endora.baselines.lvdm.lvdm_loss import make_lvdm_scheduler

BASELINES = ("StyleGANVPipeline", "MoStGANVPipeline", "LVDMPipeline")

TINY_GENERATOR = {
    "resolution": 16,
    "num_frames": 4,
    "z_dim": 6,
    "w_dim": 8,
    "channel_base": 128,
    "channel_max": 8,
    "motion_z_dim": 4,
    "motion_code_dim": 5,
    "motion_z_distance": 4,
    "motion_kernel_size": 3,
    "num_frequencies": 3,
    "max_period": 32,
    "max_num_frames": 32,
}
TINY_MOTION_STYLES = {"num_motion_styles": 3, "motion_style_dim": 4}


def tiny_generator(class_name: str = "StyleGANVGenerator", **settings: Any) -> Any:
    """A generator whose every tensor counts: none is zero or one throughout."""
    torch.manual_seed(0)
    is_motion = class_name == "MoStGANVGenerator"
    settings = TINY_GENERATOR | (TINY_MOTION_STYLES if is_motion else {}) | settings
    generator = (MoStGANVGenerator if is_motion else StyleGANVGenerator)(**settings).eval()
    for name, tensor in generator.state_dict().items():
        if name.endswith("bias") or name == "mean_w":
            tensor.copy_(0.3 * torch.randn(tensor.shape))
    return generator


def tiny_pipeline(class_name: str, num_classes: int | None = None) -> Any:
    """A pipeline of clips of 4 frames of 16x16 pixels."""
    if class_name == "LVDMPipeline":
        torch.manual_seed(0)
        unet = LVDMUNet3DModel(
            model_channels=8,
            channel_multipliers=(1, 2),
            layers_per_stage=1,
            attention_stages=(1,),
            num_attention_heads=2,
            norm_num_groups=4,
            sample_size=2,
            num_frames=1,
            num_classes=num_classes,
        )
        autoencoder = LVDMAutoencoder(base_channels=4, norm_num_groups=4)
        for parameter in (*unet.parameters(), *autoencoder.parameters()):
            torch.nn.init.normal_(parameter, std=0.2)
        pipeline: Any = LVDMPipeline(autoencoder.eval(), unet.eval(), make_lvdm_scheduler(), num_inference_steps=2)
    elif class_name == "MoStGANVPipeline":
        pipeline = MoStGANVPipeline(generator=tiny_generator("MoStGANVGenerator", num_classes=num_classes))
    else:
        pipeline = StyleGANVPipeline(generator=tiny_generator(num_classes=num_classes))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
