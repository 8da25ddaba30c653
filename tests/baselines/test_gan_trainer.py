"""The training of the GANs: times, updates, averages, augmentation, and that a kill changes nothing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from diffusers_endora.baselines import gan_trainer
from diffusers_endora.baselines.gan_arguments import parse_gan_arguments
from diffusers_endora.baselines.gan_recipes import STYLEGAN_V
from diffusers_endora.baselines.gan_trainer import GANTrainer, build_networks, draw_times
from diffusers_endora.training.training_run import BadStep


class BrighteningClips:
    """Stands for a `ClipDataset`: two videos of one colour each, which brighten, in two classes."""

    num_frames_of_videos = [20, 20]
    num_videos, num_broken = 2, 0

    def __len__(self) -> int:
        return 40

    def item(self, epoch: int, index: int) -> dict[str, torch.Tensor]:
        frames = torch.linspace(-0.5, 0.5, 16)[:, None, None, None] + 0.1 * (index % 5 - 2)
        frames = frames.repeat(1, 3, 32, 32)
        frames[:, index % 2] -= 0.4
        return {"video": frames, "frame_ids": torch.arange(16), "class_labels": torch.tensor(index % 2)}


def flags(output_dir: Path, *more: str) -> list[str]:
    tiny = ["--resolution=32", "--channel_base=64", "--channel_max=4", "--code_dim=8", "--train_batch_size=2"]
    run = ["--train_data_dir=VIDEOS", f"--output_dir={output_dir}", "--dataloader_num_workers=0"]
    return [*tiny, *run, "--max_train_steps=6", "--checkpointing_steps=3", "--class_conditional", *more]


def make_trainer(output_dir: Path, *more: str, precision: str = "no") -> GANTrainer:
    args = parse_gan_arguments(STYLEGAN_V, flags(output_dir, *more))
    networks = build_networks(args, STYLEGAN_V, 2)
    return GANTrainer(
        args, Accelerator(cpu=True, mixed_precision=precision), STYLEGAN_V, *networks, BrighteningClips()
    )


def test_frames_begin_with_the_contrast_that_was_asked_for(tmp_path):
    full, tenth = (make_trainer(tmp_path, f"--initial_contrast={factor}") for factor in (1, 0.1))
    assert full.discriminator.state_dict().keys() == tenth.discriminator.state_dict().keys()
    for name, value in full.discriminator.state_dict().items():
        torch.testing.assert_close(tenth.discriminator.state_dict()[name], value, rtol=0, atol=0)
    z, times, labels = torch.randn(2, 8), torch.tensor([[0.0, 5], [0, 9]]), torch.tensor([0, 1])
    noise = full.generator.draw_motion_noise(2, 15, torch.Generator().manual_seed(0))
    with torch.no_grad():
        frames, duller = (of.generator.eval()(z, times, labels, noise).sample for of in (full, tenth))
    torch.testing.assert_close(duller, 0.1 * frames)


def one_batch(trainer: GANTrainer) -> list[dict[str, torch.Tensor]]:
    return [next(trainer._batches())]


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def are_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(autouse=True)
def often_r1(monkeypatch):
    """R1 in every second step, so that few steps have all that a step can have."""
    monkeypatch.setattr(gan_trainer, "R1_INTERVAL", 2)


# --- times -----------------------------------------------------------------------------------------------------------


def test_real_times_are_whole_and_spread_over_the_clip():
    rng = np.random.default_rng(0)
    times = np.stack([draw_times(16, True, rng) for _ in range(6000)])
    assert np.array_equal(times, times.round())
    assert (np.diff(times) >= 1).all()
    assert (times.min(), times.max()) == (0, 15)
    distances, counts = np.unique(times[:, 2] - times[:, 0], return_counts=True)
    assert distances.tolist() == [2, 4, 8]
    assert counts / 6000 == pytest.approx(1 / 3, abs=0.03)
    middle = (times[:, 1] - times[:, 0])[times[:, 2] - times[:, 0] == 4]
    assert np.unique(middle).tolist() == [1, 2, 3]


def test_generated_times_begin_anywhere():
    rng = np.random.default_rng(0)
    times = np.stack([draw_times(16, False, rng) for _ in range(2000)])
    assert (times[:, 0] % 1 != 0).mean() > 0.99
    assert times.min() >= 0
    assert times.max() <= 15
    assert np.allclose(np.diff(times), np.diff(times).round())


def test_the_shortest_clip_is_shown_whole():
    assert draw_times(3, True, np.random.default_rng(0)).tolist() == [0, 1, 2]


def test_the_discriminator_gets_the_frames_of_its_times(tmp_path):
    clip = make_trainer(tmp_path).clips[3]
    whole = BrighteningClips().item(*make_trainer(tmp_path).clips.place(3))
    assert torch.equal(clip["video"], whole["video"][clip["times"].long()])
    assert clip["class_labels"] == whole["class_labels"]


# --- updates ---------------------------------------------------------------------------------------------------------


def test_adam_has_the_official_rates_with_lazy_correction(tmp_path, monkeypatch):
    monkeypatch.setattr(gan_trainer, "R1_INTERVAL", 16)
    trainer = make_trainer(tmp_path)
    (generator,), (discriminator,) = (trainer.optimizers[name].param_groups for name in ("generator", "discriminator"))
    assert generator["lr"] == pytest.approx(0.002)  # 0.0025 x 4/5
    assert generator["betas"] == (0, pytest.approx(0.99**0.8))
    assert discriminator["lr"] == pytest.approx(0.0025 * 16 / 17)
    assert discriminator["betas"] == (0, pytest.approx(0.99 ** (16 / 17)))
    assert generator["eps"] == discriminator["eps"] == 1e-8
    assert trainer.r1_gamma == pytest.approx(0.0002 * 32**2 / 2)


@pytest.mark.parametrize("phase", [gan_trainer.GENERATOR_PHASE, gan_trainer.DISCRIMINATOR_PHASE, gan_trainer.R1_PHASE])
def test_an_update_changes_its_network_alone(tmp_path, phase):
    trainer = make_trainer(tmp_path)
    trainer.generator.eval()  # else its mean code follows
    before = weights(trainer.generator), weights(trainer.discriminator)
    losses = (trainer._generator_loss, trainer._discriminator_loss, trainer._r1_loss)
    trainer._update(phase, one_batch(trainer), losses[phase])
    assert are_same(before[0], weights(trainer.generator)) == (phase != gan_trainer.GENERATOR_PHASE)
    assert are_same(before[1], weights(trainer.discriminator)) == (phase == gan_trainer.GENERATOR_PHASE)


def test_r1_is_of_the_frames_before_augmentation(tmp_path):
    trainer = make_trainer(tmp_path, "--r1_gamma=3")
    trainer.augment.probability.fill_(1)
    trainer.discriminator = BySum()
    (batch,) = one_batch(trainer)
    losses, measured = trainer._r1_loss(batch, trainer._draw(gan_trainer.R1_PHASE, 0, 2))
    # the logit is the mean of the changed frames' values; by hand, the derivative by a picture of it
    frames = batch["video"].clone().requires_grad_()
    changed = trainer.augment(frames, trainer._draw(gan_trainer.R1_PHASE, 0, 2).generator)
    (gradient,) = torch.autograd.grad(changed.mean((1, 2, 3, 4)).sum(), frames)
    assert torch.allclose(measured["r1"], gradient.square().sum((2, 3, 4)).mean(1))
    assert torch.allclose(losses, 2 * 3 / 2 * measured["r1"])  # interval x gamma / 2
    assert measured["r1"].std() > 0  # augmentation was another for each clip


def test_augmentation_is_adapted_by_the_signs_of_real_clips(tmp_path):
    trainer = make_trainer(tmp_path, "--augmentation_clips=100", "--max_train_steps=8")
    trainer.discriminator = BySum()
    trainer.optimizers["discriminator"] = torch.optim.SGD(trainer.discriminator.parameters(), lr=0.0)
    probabilities = []
    for bias in (5.0, -5.0):
        trainer.discriminator.bias.data.fill_(bias)
        for _ in range(4):
            trainer.take_step(one_batch(trainer))
            trainer.step += 1
            probabilities.append(trainer.augment.probability.item())
    assert probabilities == pytest.approx([0, 0, 0, 0.08, 0.08, 0.08, 0.08, 0])  # by 4 steps of 2 clips


class BySum(nn.Module):
    """A discriminator whose logit is the mean of what it sees, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, frames: torch.Tensor, times: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        return frames.mean((1, 2, 3, 4)) + self.bias


def test_the_average_keeps_half_within_312_steps(tmp_path):
    trainer = make_trainer(tmp_path)
    average = [parameter.detach().clone() for parameter in trainer.generator.parameters()]
    for _ in range(2):
        trainer.take_step(one_batch(trainer))
        trainer.step += 1
        decay = 0.5 ** (1 / 312.5)
        average = [
            decay * a + (1 - decay) * p.detach() for a, p in zip(average, trainer.generator.parameters(), strict=True)
        ]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(average, trainer.ema.average, strict=True))
    saved = trainer.sampling_weights()
    assert torch.equal(saved["const"], trainer.ema.average[0])
    assert torch.equal(saved["mean_w"], trainer.generator.mean_w)


def test_the_ramp_limits_the_averages_half_life(tmp_path):
    trainer = make_trainer(tmp_path, "--ema_kimg=1", "--ema_rampup=0.5")
    trainer.step = 4
    assert trainer.ema_decay() == pytest.approx(0.5 ** (2 / 12))  # half of 4 steps x 2 clips x 3 frames
    trainer.step = 10_000
    assert trainer.ema_decay() == pytest.approx(0.5 ** (2 / 1000))


def test_micro_batches_are_averaged(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.discriminator = BySum()
    trainer.optimizers["discriminator"] = torch.optim.SGD(trainer.discriminator.parameters(), lr=0.0)
    batches = trainer._batches()
    both = [next(batches), next(batches)]

    def loss_of(batch, draws):
        return trainer.discriminator(batch["video"], batch["times"], None), {}

    values = trainer._update(gan_trainer.DISCRIMINATOR_PHASE, both, loss_of)
    assert values["discriminator_loss"] == pytest.approx(np.mean([batch["video"].mean().item() for batch in both]))
    assert trainer.discriminator.bias.grad == pytest.approx(1)


def test_half_precision_trains(tmp_path):
    AcceleratorState._reset_state(True)
    try:
        trainer = make_trainer(tmp_path, precision="bf16")
        before = weights(trainer.generator)
        values = trainer.take_step(one_batch(trainer))
    finally:
        AcceleratorState._reset_state(True)
    assert all(math.isfinite(value) for value in values.values())
    assert not are_same(before, weights(trainer.generator))
    assert trainer.generator.const.dtype == torch.float32
    in_full = make_trainer(tmp_path).take_step(one_batch(make_trainer(tmp_path)))
    assert values["generator_loss"] != in_full["generator_loss"]
    assert values["generator_loss"] == pytest.approx(in_full["generator_loss"], rel=0.05)


def test_half_precision_that_overflows_is_refused(tmp_path):
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(ValueError, match=r"^mixed precision fp16: expected no or bf16\.$"):
            make_trainer(tmp_path, precision="fp16")
    finally:
        AcceleratorState._reset_state(True)


def test_a_step_that_is_not_finite_ends_the_training_and_saves_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.discriminator.epilogue.out.weight.data.fill_(math.nan)
    with pytest.raises(BadStep, match=r"^step 1: the loss of the generator or its gradient is not finite"):
        trainer.fit()
    assert not list(tmp_path.glob("checkpoint-*"))


# --- exactness -------------------------------------------------------------------------------------------------------


STATES = ("generator", "discriminator", "ema")


def killed_after(trainer: GANTrainer, step: int) -> None:
    """Trains until `step` is over, without what comes then but for a checkpoint."""
    report = trainer._report

    def stop(progress):
        report(progress)
        if trainer.step == step:
            raise KeyboardInterrupt

    trainer._report = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def log_of(folder: Path) -> list[dict]:
    """Its lines, without the speed."""
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "clips_per_second"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """A training of six steps with augmentation that soon does something."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gan_trainer, "R1_INTERVAL", 2)
        make_trainer(folder, "--augmentation_clips=10", "--augmentation_target=-1").fit()
    return folder


def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path, uninterrupted):
    more = ("--augmentation_clips=10", "--augmentation_target=-1")
    killed_after(make_trainer(tmp_path, *more), 5)  # two steps after its checkpoint
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5]
    trainer = make_trainer(tmp_path, *more)
    torch.manual_seed(123)  # none of whose numbers matter
    trainer.resume(tmp_path / "checkpoint-3")
    trainer.fit()
    for name in STATES:
        paths = [folder / "checkpoint-6" / f"{name}.safetensors" for folder in (tmp_path, uninterrupted)]
        assert are_same(*(load_file(path) for path in paths)), name
    for name in ("generator_optimizer.bin", "discriminator_optimizer.bin"):
        one, other = (torch.load(folder / "checkpoint-6" / name) for folder in (tmp_path, uninterrupted))
        assert all(are_same(one["state"][i], other["state"][i]) for i in one["state"])
    assert log_of(tmp_path) == log_of(uninterrupted)
    assert log_of(tmp_path)[-1]["augmentation_probability"] > 0.5


def test_another_seed_is_another_training(tmp_path, uninterrupted):
    trainer = make_trainer(tmp_path, "--seed=1", "--max_train_steps=1")
    trainer.fit()
    assert log_of(tmp_path)[0]["generator_loss"] != log_of(uninterrupted)[0]["generator_loss"]


def test_the_log_says_what_a_step_did(uninterrupted):
    lines = log_of(uninterrupted)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["r1"] == lines[1]["r1"] != lines[2]["r1"]  # in every second step
    for line in lines:
        assert line["generator_loss"] > 0
        assert line["discriminator_loss"] > 0
        assert line["generator_grad_norm"] > 0
        assert -1 <= line["real_sign"] <= 1


def test_a_checkpoint_of_another_training_is_refused(tmp_path, uninterrupted):
    trainer = make_trainer(tmp_path, "--learning_rate=0.001", "--augmentation_clips=10", "--augmentation_target=-1")
    with pytest.raises(ValueError, match=r"another training: learning_rate was 0.0025 and is 0.001\.$"):
        trainer.resume(uninterrupted / "checkpoint-3")
    same = ("--augmentation_clips=10", "--augmentation_target=-1")
    for flags_of_layout in (("--train_batch_size=1", "--gradient_accumulation_steps=2"), ("--initial_contrast=0.5",)):
        name = flags_of_layout[0][2:].split("=")[0]
        with pytest.raises(ValueError, match=f"another training: {name} was"):
            make_trainer(tmp_path, *same, *flags_of_layout).resume(uninterrupted / "checkpoint-3")
    shorter = ("--augmentation_clips=10", "--augmentation_target=-1", "--max_train_steps=2")
    with pytest.raises(
        ValueError, match="checkpoint-3 is of step 3, beyond the 2 steps of the training; ask for more"
    ):
        make_trainer(tmp_path, *shorter).resume(uninterrupted / "checkpoint-3")
    foreign = tmp_path / "checkpoint-3"
    foreign.mkdir()
    for content in ("[]", '{"facts": null}', '{"facts": 3}', "no json"):
        (foreign / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"has no run\.json with the facts of a training: expected a checkpoint"):
            make_trainer(tmp_path, *same).resume(foreign)
