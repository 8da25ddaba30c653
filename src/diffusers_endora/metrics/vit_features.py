"""Features of vision transformers, by way of `transformers`: VideoMAE of clips, DINO and DINOv2 of frames."""

import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoModel, PreTrainedModel, VideoMAEForVideoClassification, VideoMAEModel

from .feature_extractors import FeatureExtractor, hash_weights

SIDE = 224
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DINO_MODEL_TYPES = ("vit", "dinov2", "dinov2_with_registers")


class VideoMAEFeatures(FeatureExtractor):
    """The features of content-debiased FVD (Ge et al., https://arxiv.org/abs/2404.12391): mean of a VideoMAE's tokens.

    A fine-tuned model's tokens are averaged and normalised as for its classifier, the classifier left out. The paper's
    network is VideoMAE-v2 ViT-g fine-tuned on Something-Something-v2, which `transformers` has no class for; numbers
    of another network, such as "MCG-NJU/videomae-base-finetuned-ssv2", do not compare with the paper's.

    Args:
        model: a folder or the id of a Hub repository. There is no default.
        device: where the network runs.

    Raises:
        ValueError: no model is given, or it is not a VideoMAE.
    """

    network: Any  # a VideoMAEModel or a VideoMAEForVideoClassification
    name = "videomae"
    per_frame = False
    preprocessing = (
        "bilinear resize of the whole frame to 224x224 without antialias (half-pixel centres), x / 255, no "
        "normalisation; as cd-fvd"
    )

    def __init__(self, model: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"):
        if model is None:
            raise ValueError(
                "CD-FVD needs --videomae_model: a folder or Hub id of a VideoMAE, such as "
                '"MCG-NJU/videomae-base-finetuned-ssv2" (the paper\'s own is a ViT-g that transformers does not have)'
            )
        network = load_transformer(model, "VideoMAE", ("videomae",), SIDE)
        self.num_frames = self.min_frames = network.config.num_frames
        self.outputs = {"features": network.config.hidden_size}
        self.weights = os.fspath(model)
        self.weights_hash = hash_weights(network)
        super().__init__(network, device, units_per_forward=1 if torch.device(device).type == "cpu" else 8)

    def forward(self, units: torch.Tensor) -> dict[str, torch.Tensor]:
        if units.shape[1] != self.num_frames:
            raise ValueError(f"clips of {units.shape[1]} frames: {self.weights} takes exactly {self.num_frames}")
        frames = units.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        pixels = F.interpolate(frames, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        pixels = pixels.unflatten(0, units.shape[:2])
        if isinstance(self.network, VideoMAEModel):
            return {"features": self.network(pixels).last_hidden_state.mean(1)}
        tokens = self.network.videomae(pixels).last_hidden_state.mean(1)
        return {"features": tokens if self.network.fc_norm is None else self.network.fc_norm(tokens)}


class DinoFeatures(FeatureExtractor):
    """The features of FDD, the Frechet distance in DINO space (Stein et al., https://arxiv.org/abs/2306.04675).

    The [CLS] token after the last norm, per frame. The paper's network is DINOv2 ViT-L/14, "facebook/dinov2-large".

    Args:
        model: a folder or the id of a Hub repository of a DINO or DINOv2. There is no default.
        device: where the network runs.

    Raises:
        ValueError: no model is given, or it is neither.
    """

    network: Any  # a ViTModel or a Dinov2Model
    name = "dino"
    per_frame = True
    preprocessing = "Pillow's bicubic resize of the whole frame to 224x224, ImageNet mean and deviation; as dgm-eval"

    def __init__(self, model: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"):
        if model is None:
            raise ValueError(
                "FDD needs --dino_model: a folder or Hub id of a DINO or DINOv2, such as the paper's \"facebook/"
                'dinov2-large"'
            )
        network = load_transformer(model, "DINO", DINO_MODEL_TYPES)
        self.outputs = {"features": network.config.hidden_size}
        self.weights = os.fspath(model)
        self.weights_hash = hash_weights(network)
        super().__init__(network, device, units_per_forward=8 if torch.device(device).type == "cpu" else 64)

    def forward(self, units: torch.Tensor) -> dict[str, torch.Tensor]:
        resized = [
            np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            for frame in units.cpu().numpy()
        ]
        pixels = torch.from_numpy(np.stack(resized)).to(self.device).permute(0, 3, 1, 2).float() / 255
        pixels = (pixels - pixels.new_tensor(IMAGENET_MEAN)[:, None, None]) / pixels.new_tensor(IMAGENET_STD)[
            :, None, None
        ]
        is_vit = self.network.config.model_type == "vit"  # the others always interpolate their positions
        options = {"interpolate_pos_encoding": True} if is_vit else {}
        return {"features": self.network(pixels, **options).last_hidden_state[:, 0]}


def load_transformer(
    model: str | os.PathLike[str], kind: str, model_types: tuple[str, ...], image_size: int | None = None
) -> PreTrainedModel:
    """Loads a model whose `model_type` is one of `model_types`, complete with all its weights.

    Args:
        kind: how the error names what is expected.
        image_size: the only one that the model may be made for; None for any.

    Raises:
        ValueError: it does not load, lacks weights or is something else.
    """
    options: dict[str, Any] = {}
    try:
        config = AutoConfig.from_pretrained(model)
        if config.model_type not in model_types:
            raise ValueError(f'its model_type is "{config.model_type}"')
        if image_size is not None and config.image_size != image_size:
            raise ValueError(f"it takes pictures of {config.image_size} pixels, not {image_size}")
        if config.model_type == "vit":
            options["add_pooling_layer"] = False  # DINO has none
        is_classifier = "VideoMAEForVideoClassification" in (config.architectures or ())
        model_class = VideoMAEForVideoClassification if is_classifier else AutoModel
        network, loading = model_class.from_pretrained(model, config=config, output_loading_info=True, **options)
        if loading["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(loading['missing_keys'])[0]}")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(f"{model}: does not load as a {kind} ({reason})") from error
    return network
