"""The training objectives of LVDM (He et al. 2022, https://arxiv.org/abs/2211.13221): denoiser and autoencoder.

Formulas follow the official code (https://github.com/YingqingHe/LVDM, `lvdm/models/ddpm3d.py` and
`lvdm/models/losses/contperceptual.py`), whose autoencoder loss is that of taming-transformers (Esser et al. 2021,
https://arxiv.org/abs/2012.09841, section 3.1; https://github.com/CompVis/taming-transformers).
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import safetensors
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file

from ..whole_model import WholeModel

# The official noise schedule of every LVDM config, endoscopy included (`linear_start`, `linear_end`): linear in the
# square roots of the betas, which diffusers calls "scaled_linear".
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0015,
    "beta_end": 0.0155,
    "beta_schedule": "scaled_linear",
}

# Latents z are trained on as `scale * (z + shift)`: `scale_factor` and `shift_factor` of the endoscopy configs, which
# kept those of the official autoencoder for sky.
LATENT_SCALE = 0.33422927
LATENT_SHIFT = 1.4606637


def make_lvdm_scheduler() -> DDPMScheduler:
    """The scheduler of training and of the official sampler, which makes 1000 steps with it."""
    return DDPMScheduler(**NOISE_SCHEDULE, clip_sample=False, variance_type="fixed_small")


def official_ddim(config: Any = None) -> DDIMScheduler:
    """The official DDIM sampler, 50 steps; its noise (`eta=1`) is an argument of the pipeline's call.

    Args:
        config: of a scheduler with the noise schedule that is wanted; None: `make_lvdm_scheduler`'s.
    """
    return DDIMScheduler.from_config(
        make_lvdm_scheduler().config if config is None else config,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="leading",
        steps_offset=1,
    )


def latent_scale_and_shift(latents: torch.Tensor) -> tuple[float, float]:
    """What makes `scale * (latents + shift)` zero in the mean and of unit variance, for an autoencoder of one's own.

    Args:
        latents: any number of latents, of any shape.

    Raises:
        ValueError: for latents that are all equal or not finite.
    """
    std = latents.double().std().item()
    if not 0 < std < float("inf"):
        raise ValueError(f"latents have a standard deviation of {std}: expected a positive number.")
    return 1 / std, -latents.double().mean().item()


def denoising_loss(
    unet: nn.Module,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    scheduler: DDPMScheduler,
    class_labels: torch.Tensor | None = None,
    given_mask: torch.Tensor | None = None,
    noise_levels: torch.Tensor | None = None,
    given_noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean distance of predicted and true noise of every sample (paper, equation 3), `(B,)` in float32.

    Args:
        unet: an `LVDMUNet3DModel`, bare or wrapped for distributed training. A bare one is fed in its own dtype, a
            wrapped one in that of `latents`.
        latents: clean, scaled latents `(B, C, F, h, w)`.
        timesteps: integers `(B,)`, 0 to `num_train_timesteps - 1`.
        noise: standard normal, of the shape of `latents`.
        scheduler: the noise schedule; it predicts "epsilon".
        class_labels: integers `(B,)`, for a model with classes.
        given_mask: booleans `(B, F)` for a model that completes given frames: True where one is given. The model
            sees latents with noise of its own there, and predicts that noise too, as in the official code.
        noise_levels: integers `(B,)`, the timesteps of that noise (conditional latent perturbation; paper, section
            3.3); needed with `given_mask`.
        given_noise: the noise, standard normal, of the shape of `latents`; needed with `given_mask`.

    Raises:
        ValueError: for shapes that do not agree, another prediction type, or one of `given_mask`, `noise_levels` and
            `given_noise` without the others.
    """
    shape = tuple(latents.shape)
    for name, tensor in {"noise": noise, "given_noise": given_noise}.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected that of latents, {shape}.")
    if timesteps.shape != (shape[0],):
        raise ValueError(f"timesteps has shape {tuple(timesteps.shape)}: expected one per sample, ({shape[0]},).")
    if scheduler.config["prediction_type"] != "epsilon":
        raise ValueError(f'prediction_type="{scheduler.config["prediction_type"]}": LVDM predicts "epsilon".')
    if not (given_mask is None) == (noise_levels is None) == (given_noise is None):
        raise ValueError("given_mask, noise_levels and given_noise: expected all of them or none.")

    # 1. Noise the latents; given frames get the noise of their own level
    dtype = getattr(unet, "dtype", latents.dtype)
    latents, target = latents.float(), noise.float()
    noisy = scheduler.add_noise(latents, target, timesteps)
    conditions: dict[str, Any] = {}
    if given_mask is not None and noise_levels is not None and given_noise is not None:
        given = scheduler.add_noise(latents, given_noise.float(), noise_levels)
        target = torch.where(given_mask[:, None, :, None, None], given_noise.float(), target)
        conditions = {"given_latents": given.to(dtype), "given_mask": given_mask, "noise_levels": noise_levels}
    prediction = unet(noisy.to(dtype), timestep=timesteps, class_labels=class_labels, **conditions).sample.float()
    if prediction.shape != target.shape:
        raise ValueError(f"the model returned {tuple(prediction.shape)} for latents {shape}: expected the same shape.")

    # 2. Score the prediction
    return (target - prediction).abs().mean(dim=(1, 2, 3, 4))


def draw_given_mask(
    batch_size: int,
    num_frames: int,
    predict_probability: float,
    interpolate_probability: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Which latent frames a training step gives, booleans `(B, F)` (official `random_temporal_masking`).

    A sample is interpolated (its first and last frame are given), predicted (its first frame is given) or generated
    from nothing, which unconditional guidance and the first clip of a long video need. The official prediction model
    is trained with probabilities (0.5, 0), the interpolation model with (0, 0.9).

    Raises:
        ValueError: for probabilities that are negative or add up to more than 1, or fewer than 3 frames to interpolate
            or 2 to predict.
    """
    if predict_probability < 0 or interpolate_probability < 0 or predict_probability + interpolate_probability > 1:
        raise ValueError(
            f"predict_probability={predict_probability}, interpolate_probability={interpolate_probability}: expected "
            "probabilities that add up to at most 1."
        )
    needed = 3 if interpolate_probability > 0 else 2
    if num_frames < needed:
        raise ValueError(f"num_frames={num_frames}: expected at least {needed}, of which one is not given.")
    drawn = torch.rand(batch_size, generator=generator)
    interpolates = drawn < interpolate_probability
    predicts = ~interpolates & (drawn < interpolate_probability + predict_probability)
    mask = torch.zeros(batch_size, num_frames, dtype=torch.bool)
    mask[:, 0] = interpolates | predicts
    mask[:, -1] = interpolates
    return mask


class VideoPatchDiscriminator(WholeModel, ConfigMixin):
    """A patch discriminator of clips (Isola et al. 2017, https://arxiv.org/abs/1611.07004, section 3.2.2).

    Convolutions of 4x4 pixels, which halve height and width `num_layers` times, over `temporal_kernel_size` frames.
    With `temporal_kernel_size=1` it judges frames by themselves and is the `NLayerDiscriminator` of
    taming-transformers, which the official autoencoder trains with.

    Args:
        in_channels: channels of a clip.
        base_channels: width after the first convolution; doubles with every further one up to eightfold.
        num_layers: strided convolutions.
        temporal_kernel_size: frames that a convolution sees, an odd number.

    Raises:
        ValueError: for sizes that are not positive, or an even `temporal_kernel_size`.
    """

    @register_to_config
    def __init__(
        self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3, temporal_kernel_size: int = 3
    ):
        super().__init__()
        for name in ("in_channels", "base_channels", "num_layers", "temporal_kernel_size"):
            if not isinstance(self.config[name], int) or self.config[name] < 1:
                raise ValueError(f"{name}={self.config[name]}: expected a positive integer.")
        if temporal_kernel_size % 2 == 0:
            raise ValueError(f"temporal_kernel_size={temporal_kernel_size}: expected an odd number.")
        widths = [base_channels * min(2**layer, 8) for layer in range(num_layers + 1)]

        def convolution(in_width: int, out_width: int, stride: int, bias: bool) -> nn.Conv3d:
            return nn.Conv3d(
                in_width,
                out_width,
                (temporal_kernel_size, 4, 4),
                stride=(1, stride, stride),
                padding=(temporal_kernel_size // 2, 1, 1),
                bias=bias,
            )

        layers: list[nn.Module] = [convolution(in_channels, widths[0], 2, True), nn.LeakyReLU(0.2)]
        for layer in range(1, num_layers + 1):
            stride = 2 if layer < num_layers else 1
            layers.append(convolution(widths[layer - 1], widths[layer], stride, False))  # the norm has the bias
            layers += [nn.BatchNorm3d(widths[layer]), nn.LeakyReLU(0.2)]
        layers.append(convolution(widths[-1], 1, 1, True))
        self.layers = nn.Sequential(*layers)
        for module in self.layers:  # DCGAN's initialisation, as in taming-transformers
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm3d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Clips `(B, in_channels, F, H, W)` to logits of patches `(B, 1, F, h, w)`, high for real ones.

        Raises:
            ValueError: for another number of channels or dimensions, or frames too small for a patch.
        """
        shape, halvings = tuple(clip.shape), self.config.num_layers
        if len(shape) != 5 or shape[1] != self.config.in_channels or min(shape[3:]) < 3 * 2**halvings:
            raise ValueError(
                f"clip has shape {shape}: expected (batch, {self.config.in_channels}, frames, height, width) of at "
                f"least {3 * 2**halvings} pixels a side."
            )
        return self.layers(clip)


def hinge_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Half the sum of what real logits lack to 1 and fake ones exceed -1, a scalar (taming-transformers)."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adaptive_weight(
    reconstruction_loss: torch.Tensor, adversarial_loss: torch.Tensor, last_layer: torch.Tensor
) -> torch.Tensor:
    """The gradient's norm of the reconstruction over that of the adversarial loss, a scalar without a gradient.

    Both at the weight of the decoder's last layer (Esser et al. 2021, equation 7, with their 1e-4 in the denominator
    and limit of 1e4).
    """
    of_reconstruction = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0]
    of_adversarial = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)[0]
    return (of_reconstruction.norm() / (of_adversarial.norm() + 1e-4)).clamp(0, 1e4).detach()


class AutoencoderLoss(NamedTuple):
    """
    Args:
        total: what the autoencoder minimises, a scalar.
        pixel: mean absolute error of a value of a clip; unweighted, without a gradient, like all that follow.
        perceptual: mean perceptual distance of a frame; 0 where there is none.
        kl: mean over clips of the divergence of their latents from the standard normal.
        adversarial: minus the mean logit of the reconstruction.
        adversarial_weight: by which `adversarial` is in `total`; 0 before `discriminator_start`.
    """

    total: torch.Tensor
    pixel: torch.Tensor
    perceptual: torch.Tensor
    kl: torch.Tensor
    adversarial: torch.Tensor
    adversarial_weight: torch.Tensor


class LVDMAutoencoderLoss(nn.Module):
    """The autoencoder's objective, with the settings of `configs/videoae/sky.yaml` and Endora's `col.yaml`.

    For a clip x of F frames, its reconstruction y and latents' distribution q:

        sum(|x - y| + w_p d(x, y)) / (B F) / exp(s) + s per value + w_kl KL(q) / B + w_d lambda * adversarial

    The sum is over all values of a clip, to each of which the perceptual distance of its frame is added, and lambda is
    `adaptive_weight`. The logarithm s of the output's variance is a parameter, as in the official code, which never
    gives it to an optimizer: there it stays 0. Give `parameters()` to one to learn it.

    Args:
        perceptual: distance of two batches of frames `(N, 3, H, W)` in [-1, 1], `(N,)`, such as `load_lpips` returns;
            None for no such term. It is on the device of the clips.
        perceptual_weight: w_p.
        kl_weight: w_kl; 0 in the official configs, which train on samples of q all the same.
        discriminator_weight: w_d.
        discriminator_start: optimizer step from which the adversarial term and the discriminator count.

    Raises:
        ValueError: for a negative weight or step.
    """

    def __init__(
        self,
        perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        perceptual_weight: float = 1.0,
        kl_weight: float = 0.0,
        discriminator_weight: float = 0.5,
        discriminator_start: int = 50001,
    ):
        super().__init__()
        weights = {"perceptual_weight": perceptual_weight, "kl_weight": kl_weight}
        weights |= {"discriminator_weight": discriminator_weight, "discriminator_start": discriminator_start}
        for name, value in weights.items():
            if not value >= 0:
                raise ValueError(f"{name}={value}: expected 0 or more.")
        # in a tuple it is no submodule, whose weights would be saved with the loss
        self.perceptual = (perceptual,)
        self.perceptual_weight = perceptual_weight
        self.kl_weight = kl_weight
        self.discriminator_weight = discriminator_weight
        self.discriminator_start = discriminator_start
        self.logvar = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        clip: torch.Tensor,
        reconstruction: torch.Tensor,
        latent_dist: DiagonalGaussianDistribution,
        step: int,
        discriminator: nn.Module | None = None,
        last_layer: torch.Tensor | None = None,
    ) -> AutoencoderLoss:
        """The autoencoder's loss; that of the discriminator is `hinge_discriminator_loss`.

        Args:
            clip: `(B, 3, F, H, W)` in [-1, 1].
            reconstruction: of the same shape.
            latent_dist: an `LVDMAutoencoder`'s distribution of the clip's latents.
            step: optimizer steps made so far.
            discriminator: a `VideoPatchDiscriminator`; None for no adversarial term. It is called from
                `discriminator_start` on, and its parameters get gradients, to be zeroed before its own step.
            last_layer: `LVDMAutoencoder.last_layer`; needed with a discriminator.

        Raises:
            ValueError: for shapes that do not agree, or a discriminator without `last_layer`.
        """
        if clip.ndim != 5 or clip.shape != reconstruction.shape:
            raise ValueError(
                f"clip has shape {tuple(clip.shape)} and reconstruction {tuple(reconstruction.shape)}: expected "
                "(batch, channels, frames, height, width) twice."
            )
        if discriminator is not None and last_layer is None:
            raise ValueError("last_layer=None with a discriminator: expected the autoencoder's last_layer.")
        batch_size, _, num_frames = clip.shape[:3]
        clip, reconstruction = clip.float(), reconstruction.float()

        # 1. Reconstruction, frame by frame: (B F, 3, H, W)
        real, fake = (frames.transpose(1, 2).flatten(0, 1) for frames in (clip, reconstruction))
        error = (real - fake).abs()
        pixel = error.mean()
        perceptual = pixel.new_zeros(())
        perceptual_distance = self.perceptual[0]
        if perceptual_distance is not None and self.perceptual_weight > 0:
            distance = perceptual_distance(real, fake)
            error = error + self.perceptual_weight * distance[:, None, None, None]
            perceptual = distance.mean()
        likelihood = (error / self.logvar.exp() + self.logvar).sum() / (batch_size * num_frames)

        # 2. Latents and discriminator
        kl = latent_dist.kl().float().sum() / batch_size
        total = likelihood + self.kl_weight * kl
        adversarial, weight = pixel.new_zeros(()), pixel.new_zeros(())
        if discriminator is not None and last_layer is not None and step >= self.discriminator_start:
            adversarial = -discriminator(reconstruction).float().mean()
            if torch.is_grad_enabled():  # in validation there are no gradients to weigh by, and it counts nothing
                weight = self.discriminator_weight * adaptive_weight(likelihood, adversarial, last_layer)
                total = total + weight * adversarial
        parts = (part.detach() for part in (pixel, perceptual, kl, adversarial, weight))
        return AutoencoderLoss(total, *parts)


# Convolutions of torchvision's `vgg16().features` by index, with their channels; each stage ends at a ReLU that LPIPS
# compares, and each but the last is followed by a max pooling.
VGG16_STAGES: list[dict[int, tuple[int, int]]] = [
    {0: (3, 64), 2: (64, 64)},
    {5: (64, 128), 7: (128, 128)},
    {10: (128, 256), 12: (256, 256), 14: (256, 256)},
    {17: (256, 512), 19: (512, 512), 21: (512, 512)},
    {24: (512, 512), 26: (512, 512), 28: (512, 512)},
]


class PerceptualDistance(nn.Module):
    """LPIPS with VGG16 (Zhang et al. 2018, https://arxiv.org/abs/1801.03924, equation 1), without its weights.

    `load_lpips` makes one with weights. It stays in eval mode and is not trained.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self):
        super().__init__()
        self.features = nn.ModuleDict(
            {
                str(index): nn.Conv2d(*channels, 3, padding=1)
                for stage in VGG16_STAGES
                for index, channels in stage.items()
            }
        )
        self.heads = nn.ModuleList(
            [nn.Conv2d(list(stage.values())[-1][1], 1, 1, bias=False) for stage in VGG16_STAGES]
        )
        # ImageNet's mean and deviation for images in [-1, 1], rounded as in LPIPS
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.requires_grad_(False)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The distances `(N,)` of two batches of frames `(N, 3, H, W)` in [-1, 1], of at least 16 pixels a side.

        Raises:
            ValueError: for other shapes.
        """
        if first.shape != second.shape or first.ndim != 4 or first.shape[1] != 3 or min(first.shape[2:]) < 16:
            raise ValueError(
                f"frames have shapes {tuple(first.shape)} and {tuple(second.shape)}: expected (frames, 3, height, "
                "width) twice, of at least 16 pixels a side."
            )
        hidden_states = (torch.cat([first, second]) - self.shift) / self.scale
        distance = first.new_zeros(first.shape[0])
        for number, (stage, head) in enumerate(zip(VGG16_STAGES, self.heads, strict=True)):
            if number > 0:
                hidden_states = F.max_pool2d(hidden_states, 2)
            for index in stage:
                hidden_states = F.relu(self.features[str(index)](hidden_states))
            norm = hidden_states.square().sum(1, keepdim=True).sqrt()
            of_first, of_second = (hidden_states / (norm + 1e-10)).chunk(2)
            distance = distance + head((of_first - of_second).square()).mean(dim=(1, 2, 3))
        return distance


def load_lpips(path: str | os.PathLike) -> PerceptualDistance:
    """LPIPS from a safetensors file, in eval mode and without gradients of its own.

    The file holds, by the names of torchvision and of the `lpips` package, `features.{i}.weight` and
    `features.{i}.bias` of VGG16's convolutions i = 0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28 (`state_dict()` of
    torchvision's `vgg16`), and `lin{k}.model.1.weight`, the linear heads k = 0 to 4 (`lpips/weights/v0.1/vgg.pth` of
    https://github.com/richzhang/PerceptualSimilarity). Other names, such as VGG16's classifier, are ignored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no safetensors file, or lacks tensors or has them in other shapes (all are named).
    """
    try:
        stored = load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{os.fspath(path)}: is damaged, or not a safetensors file.") from error
    distance = PerceptualDistance()
    expected = distance.state_dict()
    official = {name: name.replace("heads.", "lin").replace(".weight", ".model.1.weight") for name in expected}
    official |= {name: name for name in expected if name.startswith("features.")}
    wrong = [
        official[name]
        for name, tensor in expected.items()
        if official[name] not in stored or stored[official[name]].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(
            f"{os.fspath(path)}: lacks {', '.join(wrong)}, or has another shape: expected VGG16's convolutions and "
            "the linear heads of LPIPS."
        )
    distance.load_state_dict({name: stored[official[name]].float() for name in expected})
    return distance.eval()
