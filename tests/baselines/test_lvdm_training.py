"""The stages of LVDM's training on tiny networks: exactness, statistics, labels, what learns from what."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

from diffusers_endora.baselines.lvdm.autoencoder_lvdm import LVDMAutoencoder
from diffusers_endora.baselines.lvdm.autoencoder_trainer import AutoencoderTrainer, peak_signal_to_noise_ratio
from diffusers_endora.baselines.lvdm.denoiser_trainer import Completion, DenoiserTrainer
from diffusers_endora.baselines.lvdm.kernel_muon import KernelMuon
from diffusers_endora.baselines.lvdm.latent_clips import EncodedClips, LatentClips, latent_shape, latents_of
from diffusers_endora.baselines.lvdm.lvdm_arguments import make_parser, parse_lvdm_arguments
from diffusers_endora.baselines.lvdm.lvdm_loss import latent_scale_and_shift, official_ddim
from diffusers_endora.baselines.lvdm.pipeline_lvdm import LVDMPipeline
from diffusers_endora.baselines.lvdm.stage_networks import completing_unet, with_weights
from diffusers_endora.baselines.lvdm.unet_lvdm import LVDMUNet3DModel
from diffusers_endora.data.video_io import write_video
from diffusers_endora.training.arguments import recorded
from diffusers_endora.training.muon import MuonWithAdamW
from diffusers_endora.training.setup import load_clips, make_accelerator
from diffusers_endora.training.training_run import BadStep

SHAPE = (4, 2, 2, 2)  # latents of 8 frames of 16x16


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Four videos of 16x16 in two classes: four squares that brighten frame by frame."""
    root = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for index in range(4):
        start = rng.integers(0, 150, size=(1, 2, 2, 3)).repeat(8, axis=1).repeat(8, axis=2)
        path = root / ("a", "b")[index % 2] / f"{index}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, (start + 5 * np.arange(12).reshape(-1, 1, 1, 1)).astype(np.uint8), fps=8)
    return root


@pytest.fixture(scope="module")
def autoencoder() -> LVDMAutoencoder:
    torch.manual_seed(0)
    return LVDMAutoencoder(base_channels=4, norm_num_groups=4)


def arguments(videos: Path, output_dir: Path, **changes):
    options = {
        "preset": "demo",
        "train_data_dir": videos,
        "output_dir": output_dir,
        "resolution": 16,
        "num_frames": 8,
        "window": 8,
        "autoencoder_steps": 4,
        "autoencoder_batch_size": 2,
        "max_train_steps": 4,
        "train_batch_size": 2,
        "checkpointing_steps": 2,
        "validation_steps": 99,
        "num_validation_clips": 1,
        "validation_inference_steps": 2,
        "validation_loss_clips": 3,
        "num_cached_clips": 0,
        "lr_warmup_steps": 0,
        "dataloader_num_workers": 0,
        **changes,
    }
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
    return parse_lvdm_arguments(make_parser(""), flags)


def autoencoder_trainer(args) -> AutoencoderTrainer:
    AcceleratorState._reset_state(True)
    torch.manual_seed(args.seed)
    autoencoder = LVDMAutoencoder(base_channels=4, norm_num_groups=4)
    accelerator = make_accelerator(args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return AutoencoderTrainer(args, accelerator, load_clips(args)[0], None, autoencoder)


def tiny_unet(num_classes: int | None = None, **changes) -> LVDMUNet3DModel:
    torch.manual_seed(0)
    sizes = {"model_channels": 8, "channel_multipliers": (1, 2), "layers_per_stage": 1, "attention_stages": (1,)}
    sizes |= {"num_attention_heads": 2, "norm_num_groups": 4, "sample_size": 2, "num_frames": 2}
    return LVDMUNet3DModel(**sizes, num_classes=num_classes, **changes)


def denoiser_trainer(args, autoencoder, unet=None, statistics=None, completion=None) -> DenoiserTrainer:
    AcceleratorState._reset_state(True)
    dataset, held_out = load_clips(args)
    unet = tiny_unet(dataset.num_classes) if unet is None else unet

    def assemble(weights, scale, shift):
        options = {"latent_scale": scale, "latent_shift": shift}
        return LVDMPipeline(autoencoder, with_weights(unet, weights), official_ddim(), **options)

    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    accelerator = make_accelerator(args)
    return DenoiserTrainer(args, accelerator, dataset, held_out, autoencoder, unet, assemble, statistics, completion)


def assert_same_training(one: Path, other: Path, checkpoint: str) -> None:
    """Bit for bit: weights, average, optimisers, schedules and the losses of every step."""
    files = sorted(path.name for path in (one / checkpoint).iterdir())
    assert files == sorted(path.name for path in (other / checkpoint).iterdir())
    for name in files:
        if name.endswith(".safetensors"):
            first, second = load_file(one / checkpoint / name), load_file(other / checkpoint / name)
            assert all(torch.equal(first[key], second[key]) for key in first), name
        elif name.endswith((".bin", ".pkl")) and "random" not in name:
            first, second = (torch.load(run / checkpoint / name, weights_only=False) for run in (one, other))
            leaves = zip(*(tree_flatten(state)[0] for state in (first, second)), strict=True)
            assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in leaves), name
    logs = [(run / "training_log.jsonl").read_text() for run in (one, other)]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [1, 2, 3, 4]


# --- a killed training goes on exactly -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"resolution": 24, "disc_weight": 0.5, "disc_start": 1}, {"optimizer": "muon"}])
def test_a_resumed_autoencoder_is_the_uninterrupted_one_bit_for_bit(videos, tmp_path, options):
    options = {"optimizer": "adamw", "num_frames": 4, "autoencoder_batch_size": 1, **options}
    options |= {"gradient_accumulation_steps": 2}
    autoencoder_trainer(arguments(videos, tmp_path / "straight", **options)).fit()
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    shutil.copy(tmp_path / "straight" / "training_log.jsonl", tmp_path / "killed")  # of steps that are made again
    trainer = autoencoder_trainer(arguments(videos, tmp_path / "killed", **options))
    trainer.resume(tmp_path / "killed" / "checkpoint-2")
    trainer.fit()
    assert_same_training(tmp_path / "straight", tmp_path / "killed", "checkpoint-4")
    assert trainer.results()["seconds"] > 0


@pytest.mark.parametrize("options", [{"optimizer": "adamw"}, {"optimizer": "muon", "num_cached_clips": 3}])
def test_a_resumed_denoiser_is_the_uninterrupted_one_bit_for_bit(videos, autoencoder, tmp_path, options):
    options |= {"class_conditional": True, "gradient_accumulation_steps": 2, "train_batch_size": 1}
    denoiser_trainer(arguments(videos, tmp_path / "straight", **options), autoencoder).fit()
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    shutil.copy(tmp_path / "straight" / "training_log.jsonl", tmp_path / "killed")
    trainer = denoiser_trainer(arguments(videos, tmp_path / "killed", **options), autoencoder)
    trainer.resume(tmp_path / "killed" / "checkpoint-2")
    trainer.fit()
    assert_same_training(tmp_path / "straight", tmp_path / "killed", "checkpoint-4")
    average = load_file(tmp_path / "killed" / "checkpoint-4" / "ema.safetensors")
    sampling = trainer.pipeline().unet.state_dict()
    assert all(torch.equal(sampling[name], average[name]) for name in average)
    assert any(not torch.equal(average[name], weight) for name, weight in trainer.unet.state_dict().items())


def test_a_checkpoint_of_another_training_is_refused(videos, autoencoder, tmp_path):
    denoiser_trainer(arguments(videos, tmp_path / "one"), autoencoder).fit()
    other = denoiser_trainer(arguments(videos, tmp_path / "two", seed=1, ema_decay=0.5), autoencoder)
    with pytest.raises(ValueError, match=r"another training: seed was 0 and is 1, ema_decay was 0.995 and is 0.5\.$"):
        other.resume(tmp_path / "one" / "checkpoint-4")
    shorter = denoiser_trainer(arguments(videos, tmp_path / "two", max_train_steps=3), autoencoder)
    with pytest.raises(ValueError, match="max_train_steps was 4 and is 3"):  # the rate falls with it
        shorter.resume(tmp_path / "one" / "checkpoint-4")


def test_a_step_that_is_not_finite_is_left_out_and_stops_the_training(videos, autoencoder, tmp_path):
    options = {"train_data_dir": videos, "lr_scheduler": "constant"}
    trainer = denoiser_trainer(arguments(videos, tmp_path, **options), autoencoder)
    healthy = trainer.losses
    kept = {}

    def broken(unet, batch, timesteps):
        losses = healthy(unet, batch, timesteps)
        if trainer.step == 2:
            kept.update({name: weight.clone() for name, weight in trainer.unet.state_dict().items()})
            losses = losses * float("nan")
        return losses

    trainer.losses = broken
    with pytest.raises(
        BadStep, match=r"^step 3: loss, grad_norm not finite\. Its clips: .*/\d\.mp4 from .* in .*checkpoint-3\. --res"
    ):
        trainer.fit()
    assert all(torch.equal(weight, kept[name]) for name, weight in trainer.unet.state_dict().items())
    line = json.loads((tmp_path / "training_log.jsonl").read_text().splitlines()[2])
    assert line["loss"] is None
    resumed = denoiser_trainer(arguments(videos, tmp_path, **options), autoencoder)
    resumed.resume(tmp_path / "checkpoint-3")
    resumed.fit()
    assert resumed.results()["skipped_steps"] == 1
    assert resumed.results()["averaged_steps"] == 3


# --- latents ---------------------------------------------------------------------------------------------------------


def test_scale_and_shift_are_those_of_the_trainings_latents(videos, autoencoder, tmp_path):
    args = arguments(videos, tmp_path)
    trainer = denoiser_trainer(args, autoencoder)
    scale, shift = trainer.latent_statistics()
    latents = []
    for place in range(len(trainer.clips)):
        item = trainer.clips[place]
        posterior = autoencoder.encode(item["video"].transpose(0, 1)[None]).latent_dist
        latents.append(posterior.mean + posterior.std * item["posterior_noise"])
    normalised = scale * (torch.cat(latents) + shift)
    assert normalised.mean().item() == pytest.approx(0, abs=1e-5)
    assert normalised.std().item() == pytest.approx(1, abs=1e-5)
    assert trainer.pipeline().config.latent_scale == scale
    assert trainer.pipeline().config.latent_shift == shift
    trainer.fit()
    assert json.loads((tmp_path / "checkpoint-4" / "latents.json").read_text())["scale"] == scale


def test_encoded_clips_are_the_trainings_first_clips(videos, autoencoder, tmp_path):
    dataset = load_clips(arguments(videos, tmp_path, class_conditional=True))[0]
    encoded = EncodedClips(dataset, autoencoder, SHAPE, 6, seed=3, shows_progress=False)
    direct = LatentClips(dataset, SHAPE, seed=3, stop=6)
    assert len(encoded) == 6
    for place in range(6):
        item, expected = encoded.item(5, place), direct[place]
        posterior = autoencoder.encode(expected["video"].transpose(0, 1)[None]).latent_dist
        torch.testing.assert_close(item["moments"], posterior.parameters[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(item["class_labels"], expected["class_labels"])
        assert torch.equal(item["frame_ids"], expected["frame_ids"])
    clips = LatentClips(encoded, SHAPE, seed=3, stop=12)
    of_epochs = [{clips.place(k)[1] for k in range(6 * epoch, 6 * epoch + 6)} for epoch in range(2)]
    assert of_epochs == [set(range(6))] * 2
    assert "from frame" in clips.describe(7)
    both = [latents_of(LatentClips(source, SHAPE, 3, 6), autoencoder, 99) for source in (encoded, dataset)]
    assert latent_scale_and_shift(both[0]) == pytest.approx(latent_scale_and_shift(both[1]), rel=0.5)


def test_sizes_that_the_autoencoder_does_not_divide_are_refused(autoencoder):
    with pytest.raises(ValueError, match="--num_frames 6: expected a multiple of the autoencoder's 4"):
        latent_shape(autoencoder, 6, 16)
    with pytest.raises(ValueError, match="--resolution 20: expected a multiple of the autoencoder's 8"):
        latent_shape(autoencoder, 8, 20)


# --- what is learnt from what ----------------------------------------------------------------------------------------


def test_labels_are_dropped_by_what_is_drawn_for_each_clip(videos, autoencoder, tmp_path):
    args = arguments(videos, tmp_path, class_conditional=True, class_dropout_prob=0.4, max_train_steps=40)
    trainer = denoiser_trainer(args, autoencoder, tiny_unet(2, class_dropout_prob=0.4))
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, hidden_states, timestep, class_labels):
            seen.append(class_labels.tolist())
            return trainer.unet(hidden_states, timestep, class_labels)

    items = [trainer.clips[place] for place in range(80)]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    trainer.losses(Spy(), batch, torch.zeros(80, dtype=torch.long))
    is_dropped = [uniform < 0.4 for uniform in batch["label_uniform"].tolist()]
    assert 20 <= sum(is_dropped) <= 44
    assert seen[0] == [2 if d else label for d, label in zip(is_dropped, batch["class_labels"].tolist(), strict=True)]
    assert set(batch["class_labels"].tolist()) == {0, 1}


def test_the_adversarial_loss_begins_when_it_is_told_and_each_network_learns_from_its_own(videos, tmp_path):
    args = arguments(videos, tmp_path, resolution=24, num_frames=4, disc_weight=0.5, disc_start=2, optimizer="adamw")
    trainer = autoencoder_trainer(args)
    before = {name: weight.clone() for name, weight in trainer.models["discriminator"].named_parameters()}
    update, gradients = trainer._update, []

    def spy(losses):
        gradients.append({name: [p.grad for p in model.parameters()] for name, model in trainer.models.items()})
        unchanged = all(torch.equal(w, before[n]) for n, w in trainer.models["discriminator"].named_parameters())
        assert unchanged == (trainer.step <= 2)
        update(losses)

    trainer._update = spy
    trainer.fit()
    assert all(all(grad is not None for grad in step["autoencoder"]) for step in gradients)
    assert [all(grad is None for grad in step["discriminator"]) for step in gradients] == [True, True, False, False]
    lines = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [line["adversarial_weight"] > 0 for line in lines] == [False, False, True, True]
    assert [line["discriminator"] > 0 for line in lines] == [False, False, True, True]


@pytest.mark.slow
def test_an_autoencoder_learns_a_corpus_by_heart(videos, tmp_path):
    options = {"optimizer": "adamw", "num_frames": 4, "autoencoder_learning_rate": 1e-3, "autoencoder_steps": 40}
    trainer = autoencoder_trainer(arguments(videos, tmp_path, **options))
    untrained = trainer.measure()
    trainer.fit()
    trained = trainer.measure()
    assert trained["train_l1"] < 0.7 * untrained["train_l1"]
    assert trained["train_psnr_db"] > untrained["train_psnr_db"] + 3
    assert (tmp_path / "validation" / "step-40" / "reconstructions.png").stat().st_size > 100
    assert trainer.results()["train_psnr_db"] == trained["train_psnr_db"]


def test_a_denoiser_learns_and_its_held_out_loss_falls(videos, autoencoder, tmp_path):
    options = {"validation_fraction": 0.25, "max_train_steps": 60, "learning_rate": 1e-2, "num_cached_clips": 8}
    options |= {"train_batch_size": 8, "ema_decay": 0.9, "optimizer": "adamw"}
    trainer = denoiser_trainer(arguments(videos, tmp_path, **options), autoencoder)
    untrained = trainer.measure()["held_out_loss"]
    trainer.fit()
    assert untrained == pytest.approx((2 / torch.pi) ** 0.5, rel=0.1)  # of a UNet that predicts 0
    assert trainer.measure()["held_out_loss"] < 0.8 * untrained
    clips = sorted(path.name for path in (tmp_path / "validation" / "step-60").iterdir())
    assert clips == ["clip_0.mp4", "contact_sheet.png"]


def test_flags_are_recorded_as_json_has_them(videos, tmp_path):
    text = json.dumps(recorded(arguments(videos, tmp_path, max_grad_norm="inf")))
    assert json.loads(text, parse_constant=pytest.fail)["max_grad_norm"] == "inf"  # JSON has no infinity


def test_psnr_is_that_of_eight_bit_pixels():
    error = torch.full((1, 2, 3, 4, 4), 2 * 5 / 255)  # five grey levels
    assert peak_signal_to_noise_ratio(error).flatten().tolist() == pytest.approx([20 * np.log10(255 / 5)] * 2)


def test_muon_takes_kernels_as_matrices_in_the_same_memory():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Conv3d(4, 2, 1))
    kernel, last = model[0].weight, model[2].weight
    matrix = torch.nn.Parameter(kernel.detach().clone().flatten(1))
    others = [torch.nn.Parameter(p.detach().clone()) for p in (last, *(q for q in model.parameters() if q.ndim == 1))]
    reference = MuonWithAdamW([matrix], others, lr=0.1)
    optimizer = KernelMuon(model, last, lr=0.1)
    model(torch.randn(2, 2, 4, 4, 4)).square().sum().backward()
    matrix.grad = kernel.grad.flatten(1)
    for copied, parameter in zip(others, (last, *(q for q in model.parameters() if q.ndim == 1)), strict=True):
        copied.grad = parameter.grad
    optimizer.step()
    reference.step()
    assert torch.equal(kernel.flatten(1), matrix)
    assert torch.equal(last, others[0])


# --- long videos -----------------------------------------------------------------------------------------------------


def test_a_completing_unet_begins_as_the_unet_it_is_made_of():
    unet = tiny_unet(3)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    completing = completing_unet(unet, Completion("interpolation_unet", (0.0, 0.9), 1, 5)).eval()
    assert completing.config.num_frames == 5
    noisy, timestep, labels = torch.randn(2, 4, 2, 2, 2), torch.tensor([5, 900]), torch.tensor([0, 3])
    with torch.no_grad():
        expected = unet.eval()(noisy, timestep, labels).sample
        given = {"given_latents": torch.zeros_like(noisy), "given_mask": torch.zeros(2, 2, dtype=torch.bool)}
        actual = completing(noisy, timestep, labels, **given, noise_levels=torch.tensor([0, 249])).sample
        told = completing(noisy, timestep, labels, given["given_latents"], ~given["given_mask"]).sample
    assert torch.equal(actual, expected)
    assert not torch.equal(told, expected)


def test_prediction_sees_every_nth_latent_frame_and_the_noised_first_one(videos, autoencoder, tmp_path):
    args = arguments(videos, tmp_path, train_batch_size=3)
    args.num_frames = 12
    args.window = 12
    completion = Completion("prediction_unet", (1.0, 0.0), 2, 2)
    assert completion.num_encoded_frames == 3
    unet = completing_unet(tiny_unet(), completion)
    trainer = denoiser_trainer(args, autoencoder, unet, (0.5, 0.1), completion)
    items = [trainer.clips[place] for place in range(3)]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, hidden_states, timestep, class_labels, **given):
            seen.update(given)
            return unet(hidden_states, timestep, class_labels, **given)

    trainer.losses(Spy(), batch, torch.zeros(3, dtype=torch.long))
    posterior = autoencoder.encode(batch["video"].transpose(1, 2)).latent_dist
    mean, std = posterior.mean[:, :, ::2], posterior.std[:, :, ::2]
    clean = 0.5 * (mean + std * batch["posterior_noise"] + 0.1)
    levels = (batch["noise_level_uniform"] * 250).long()
    kept = trainer.scheduler.alphas_cumprod[levels].reshape(-1, 1, 1, 1, 1)
    expected = kept.sqrt() * clean + (1 - kept).sqrt() * batch["given_noise"]
    torch.testing.assert_close(seen["given_latents"], expected)
    assert torch.equal(seen["noise_levels"], levels)
    assert seen["given_mask"].tolist() == [[True, False]] * 3
