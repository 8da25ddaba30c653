"""Training of StyleGAN-V and MoStGAN-V on the clips of a corpus: exact after a kill, and on one or more processes.

The procedure is that of StyleGAN-V (Skorokhodov et al. 2022, https://arxiv.org/abs/2112.14683, section 4 and
https://github.com/universome/stylegan-v), which MoStGAN-V (Shen et al. 2023, https://arxiv.org/abs/2304.02777) shares:
StyleGAN2's with adaptive augmentation (Karras et al. 2020, https://arxiv.org/abs/2006.06676), without style mixing and
path length regularisation, on a few frames of each clip.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedType, init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..data.clips import ClipDataset
from ..data.video_io import VideoError
from ..files import replacing_entries
from ..hub import save_model_card
from ..training.arguments import recorded
from ..training.checkpoints import AVERAGE, checkpoint_step, remove_leftovers
from ..training.ema import MovingAverage
from ..training.processes import by_main_process
from ..training.setup import begin, end_training, load_clips, make_accelerator, publish, start_trackers
from ..training.training_clips import TrainingClips, batches_from
from ..training.training_log import TrainingLog
from ..training.training_run import RUN_FACTS, BadStep, TrainingRun
from ..training.validation import Validation
from .gan_arguments import FRAMES_PER_CLIP
from .gan_recipes import GANRecipe
from .stylegan_v.augmentation import AdaptiveAugmentation
from .stylegan_v.gan_loss import discriminator_loss, generator_loss, lazy_correction, r1_penalty, r1_weight

# Steps between those of a regulariser. The generator has none here, but its rate and betas are corrected all the same
# in the official training, which runs StyleGAN2's path length regularisation with weight 0.
R1_INTERVAL = 16
GENERATOR_INTERVAL = 4
AUGMENTATION_INTERVAL = 4  # steps after which its probability is adapted

DISTANCES = (1, 2, 4, 8, 16, 32)  # from the first to the last frame shown, `configs/sampling/random.yaml`
DISCRIMINATOR_LAYERS = 2  # of its mapping network, as `src/train.py` sets it
LOSS_WINDOW = 200  # steps that the reported losses are averaged over

GENERATOR_PHASE, DISCRIMINATOR_PHASE, R1_PHASE = range(3)


# --- clips -----------------------------------------------------------------------------------------------------------


def draw_times(num_frames: int, is_real: bool, rng: np.random.Generator) -> np.ndarray:
    """Times of the frames that the discriminator sees of a clip.

    First and last are a power of 2 apart, of which all that a clip has room for are drawn equally often; the others
    are drawn between them, without repetition (`random_frame_sampling` in the official `src/training/layers.py`).

    Args:
        num_frames: of the clip, `FRAMES_PER_CLIP` or more.
        is_real: of a real clip, whose times are whole; a generated clip can begin between two frames.

    Returns:
        float64 `(FRAMES_PER_CLIP,)`, ascending, in [0, num_frames - 1].
    """
    distance = rng.choice([d for d in DISTANCES if FRAMES_PER_CLIP - 1 <= d <= num_frames - 1])
    room = num_frames - 1 - distance
    first = rng.integers(0, room, endpoint=True) if is_real else room * rng.random()
    between = 1 + rng.choice(distance - 1, FRAMES_PER_CLIP - 2, replace=False)
    return first + np.sort(np.array([0, *between, distance], dtype=np.float64))


class GANClips(TrainingClips):
    """`TrainingClips` of the few frames that the discriminator sees.

    An item has `video`, float32 `(FRAMES_PER_CLIP, 3, H, W)` in [-1, 1], `times`, float32 `(FRAMES_PER_CLIP,)`, in
    frames of the clip, `position`, and `class_labels` of a dataset with labels.
    """

    def __init__(self, dataset: ClipDataset, seed: int, stop: int) -> None:
        super().__init__(dataset, (0, 0, 0), seed, stop)

    def __getitem__(self, position: int) -> dict[str, Any]:
        item = super().__getitem__(position)
        del item["frame_ids"]  # of all frames
        return item | {"video": item["video"][item["times"].long()]}

    def random_numbers(
        self, position: int, num_frames: int, class_labels: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The times of the frames shown of the clip at `position`."""
        times = draw_times(num_frames, True, np.random.default_rng((self.seed, position, 7)))
        return {"times": torch.tensor(times, dtype=torch.float32)}


class Draws(NamedTuple):
    """What is drawn for a batch in a phase of a step."""

    z: torch.Tensor  # (B, z_dim)
    times: torch.Tensor  # (B, FRAMES_PER_CLIP), of generated clips
    motion_noise: torch.Tensor
    generator: torch.Generator  # of the CPU, for augmentation


# --- reports ---------------------------------------------------------------------------------------------------------


class GANLog(TrainingLog):
    """`training_log.jsonl`, a line for each step: what `GANTrainer` measures of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, LOSS_WINDOW, num_timesteps=1)

    def add_step(self, step: int, values: dict[str, float], is_written: bool) -> None:
        """Counts a step in, of the same `values` each time; the main process writes them."""
        self.window.append(values)
        if is_written:
            self._write([{"step": step, **values}])


class GANValidation(Validation):
    """Clips of fixed seeds from the averaged generator, a contact sheet of them, and on request their FVD."""

    def trained_part(self, pipeline: Any) -> torch.nn.Module:
        return pipeline.generator

    def sampling_options(self, pipeline: Any) -> dict[str, Any]:
        return {}


# --- the training ----------------------------------------------------------------------------------------------------


class GANTrainer(TrainingRun):
    """Trains generator and discriminator in turn.

    A step has up to three updates: of the generator, of the discriminator, and in every `R1_INTERVAL`-th step of the
    discriminator by R1 alone. Then the generator is counted into its moving average, and in every
    `AUGMENTATION_INTERVAL`-th step augmentation is adapted.

    Every random number is a function of the seed and of the step (of clips: their place in the training), so that a
    training that was killed goes on as if it had not been. Processes share out the clips of a step and average their
    gradients; the networks are not wrapped, as an update passes them several times, once without gradients.

    Args:
        args: the flags of `gan_arguments`.
        accelerator: made from them.
        recipe: which networks.
        generator, discriminator: new ones, the same in every process.
        dataset: the corpus.
        validate: called as `validate(weights, folder, step, is_last)` by the main process at each validation, with the
            averaged generator's weights; returns numbers for the trackers.

    Raises:
        ValueError: the processes or their precision are none that it is made for.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        recipe: GANRecipe,
        generator: Any,
        discriminator: Any,
        dataset: ClipDataset,
        validate: Callable[[dict[str, torch.Tensor], Path, int, bool], dict[str, float]] | None = None,
    ) -> None:
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(f"{accelerator.distributed_type.value}: expected plain processes, as whole networks fit.")
        if accelerator.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed precision {accelerator.mixed_precision}: expected no or bf16.")
        super().__init__(args, accelerator, dataset, args.max_train_steps)
        self.validate = validate
        self.generator = generator.to(accelerator.device).train()
        self.discriminator = discriminator.to(accelerator.device).train()
        self.clips_per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
        self.clips = GANClips(dataset, args.seed, args.max_train_steps * self.clips_per_step)
        self.seconds = 0.0  # that the steps took

        # 1. Optimisers, with the correction for lazy regularisation
        self.optimizers = {}
        for name, interval in (("generator", GENERATOR_INTERVAL), ("discriminator", R1_INTERVAL)):
            correction = lazy_correction(interval)
            self.optimizers[name] = torch.optim.Adam(
                getattr(self, name).parameters(),
                lr=args.learning_rate * correction,
                betas=(0.0, 0.99**correction),
                eps=1e-8,
                fused=True,
            )

        # 2. R1, moving average, augmentation
        gamma = recipe.r1_gamma if args.r1_gamma is None else args.r1_gamma
        self.r1_gamma = r1_weight(args.resolution, self.clips_per_step) if gamma is None else gamma
        self.ema = MovingAverage(self.generator.parameters(), self.ema_decay())
        self.augment = AdaptiveAugmentation(args.augmentation_target, args.augmentation_clips, recipe.rotates)

        # 3. What is reported
        self.log = GANLog(self.output_dir / "training_log.jsonl")
        self.last_r1 = 0.0  # of the last step that had it; the first has
        self._real_signs: list[float] = []  # since augmentation was adapted

    def ema_decay(self) -> float:
        """What the moving average keeps in the step under way: half within `ema_kimg` thousand clips.

        By default that is 10/32 of the clips of a step, the official setting: half within 312.5 steps. (Officially
        frames are counted for the ramp and clips for the half-life, too.)
        """
        args = self.args
        half_life = 1000 * (self.clips_per_step * 10 / 32 if args.ema_kimg is None else args.ema_kimg)
        if args.ema_rampup is not None:
            half_life = min(half_life, args.ema_rampup * self.step * self.clips_per_step * FRAMES_PER_CLIP)
        return 0.5 ** (self.clips_per_step / max(half_life, 1e-8))

    # --- the loop ----------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Trains to the last step.

        Raises:
            BadStep: a loss or gradient is not finite; nothing of that step is saved.
        """
        args, accelerator = self.args, self.accelerator
        if accelerator.is_main_process:
            remove_leftovers(self.output_dir)
        batches = self._batches()
        is_hidden = not accelerator.is_local_main_process
        with tqdm(total=args.max_train_steps, initial=self.step, desc="train", disable=is_hidden) as progress:
            while self.step < args.max_train_steps:
                began = time.perf_counter()
                values = self.take_step([next(batches) for _ in range(args.gradient_accumulation_steps)])
                seconds = time.perf_counter() - began
                self.step += 1
                self.seconds += seconds
                values["clips_per_second"] = self.clips_per_step / seconds
                self.log.add_step(self.step, values, accelerator.is_main_process)
                progress.update()
                self._report(progress)

    def take_step(self, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """The updates of a step, on its micro-batches; returns what the log gets."""
        # 1. Generator and discriminator
        values = self._update(GENERATOR_PHASE, batches, self._generator_loss)
        values |= self._update(DISCRIMINATOR_PHASE, batches, self._discriminator_loss)
        self._real_signs.append(values["real_sign"])
        if self.step % R1_INTERVAL == 0 and self.r1_gamma > 0:
            regularised = self._update(R1_PHASE, batches, self._r1_loss)
            self._real_signs.append(regularised["real_sign"])
            self.last_r1 = regularised["r1"]

        # 2. Moving average
        self.ema.decay = self.ema_decay()
        self.ema.step(self.generator.parameters())

        # 3. Augmentation
        if (self.step + 1) % AUGMENTATION_INTERVAL == 0:
            mean_sign = math.fsum(self._real_signs) / len(self._real_signs)
            if self.args.augmentation:
                self.augment.adapt(mean_sign, AUGMENTATION_INTERVAL * self.clips_per_step)
            self._real_signs = []
        values["augmentation_probability"] = self.augment.probability.item()
        return values | ({"r1": self.last_r1} if self.r1_gamma > 0 else {})

    def _update(
        self,
        phase: int,
        batches: list[dict[str, torch.Tensor]],
        loss_of: Callable[[dict[str, torch.Tensor], Draws], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    ) -> dict[str, float]:
        """An update by the mean of a loss; the means of loss, gradient norm and of what `loss_of` measures with it."""
        name = "generator" if phase == GENERATOR_PHASE else "discriminator"
        network, optimizer = getattr(self, name), self.optimizers[name]
        self.generator.requires_grad_(network is self.generator)
        self.discriminator.requires_grad_(network is self.discriminator)

        # 1. Gradients
        optimizer.zero_grad()
        sums: dict[str, torch.Tensor] = {}
        for micro_batch, batch in enumerate(batches):
            losses, measured = loss_of(batch, self._draw(phase, micro_batch, len(batch["video"])))
            (losses.mean() / len(batches)).backward()
            for key, value in {"loss": losses, **measured}.items():
                share = value.detach().float().mean() / len(batches)
                sums[key] = sums[key] + share if key in sums else share
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        self._average(gradients)
        sums["grad_norm"] = torch.nn.utils.get_total_norm(gradients)

        # 2. The update, if they are finite
        means = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="mean").tolist()
        values = dict(zip(sums, means, strict=True))
        if not all(math.isfinite(value) for value in values.values()):
            raise BadStep(
                f"step {self.step + 1}: {'the R1 penalty' if phase == R1_PHASE else f'the loss of the {name}'} or its "
                "gradient is not finite; nothing of that step was saved, and earlier checkpoints are as they were."
            )
        optimizer.step()
        if phase != R1_PHASE:
            values[f"{name}_loss"] = values.pop("loss")
            values[f"{name}_grad_norm"] = values.pop("grad_norm")
        return values

    def _average(self, gradients: list[torch.Tensor]) -> None:
        """Gradients become their mean over the processes."""
        if self.accelerator.num_processes == 1:
            return
        together = torch.cat([gradient.flatten() for gradient in gradients])
        together = self.accelerator.reduce(together, reduction="mean")
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    # --- the losses of the phases ------------------------------------------------------------------------------------

    def _generator_loss(
        self, batch: dict[str, torch.Tensor], draws: Draws
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = self._logits(self._generated(batch, draws), draws.times, batch, draws)
        return generator_loss(logits), {}

    def _discriminator_loss(
        self, batch: dict[str, torch.Tensor], draws: Draws
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.no_grad():
            generated = self._generated(batch, draws)
        fake_logits = self._logits(generated, draws.times, batch, draws)
        real_logits = self._logits(batch["video"], batch["times"], batch, draws)
        signs = {"real_sign": real_logits.sign(), "fake_sign": fake_logits.sign()}
        return discriminator_loss(real_logits, fake_logits), signs

    def _r1_loss(self, batch: dict[str, torch.Tensor], draws: Draws) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        frames = batch["video"].detach().requires_grad_()  # as they are before augmentation
        real_logits = self._logits(frames, batch["times"], batch, draws)
        penalty = r1_penalty(real_logits, frames)
        # By the logits' zero, weights that R1 does not depend on get a gradient as well, and Adam counts the step
        losses = R1_INTERVAL * self.r1_gamma / 2 * penalty + 0 * real_logits
        return losses, {"r1": penalty, "real_sign": real_logits.sign()}

    def _generated(self, batch: dict[str, torch.Tensor], draws: Draws) -> torch.Tensor:
        """Clips of the same labels as the real ones, `(B, FRAMES_PER_CLIP, 3, H, W)`."""
        with self.accelerator.autocast():
            labels = batch.get("class_labels")
            frames = self.generator(draws.z, draws.times, labels, draws.motion_noise, return_dict=False)[0]
        return frames.float()

    def _logits(
        self, frames: torch.Tensor, times: torch.Tensor, batch: dict[str, torch.Tensor], draws: Draws
    ) -> torch.Tensor:
        """The discriminator's, `(B,)`, after augmentation."""
        if self.args.augmentation:
            frames = self.augment(frames, draws.generator)
        with self.accelerator.autocast():
            return self.discriminator(frames, times, batch.get("class_labels")).float()

    # --- data --------------------------------------------------------------------------------------------------------

    def _draw(self, phase: int, micro_batch: int, batch_size: int) -> Draws:
        """The random numbers of a phase of the step under way."""
        entropy = (self.args.seed, self.step, phase, micro_batch, self.accelerator.process_index, 8)
        rng = np.random.default_rng(entropy)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        num_frames, device = self.args.num_frames, self.accelerator.device
        times = np.stack([draw_times(num_frames, False, rng) for _ in range(batch_size)])
        return Draws(
            torch.randn(batch_size, self.generator.config.z_dim, generator=generator).to(device),
            torch.tensor(times, dtype=torch.float32, device=device),
            self.generator.draw_motion_noise(batch_size, num_frames - 1, generator, device),
            generator,
        )

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The batches of this process from the step that the training is at."""
        first, workers = self.step * self.clips_per_step, self.args.dataloader_num_workers
        return batches_from(self.clips, first, self.args.train_batch_size, workers, self.accelerator)

    # --- reports -----------------------------------------------------------------------------------------------------

    def _report(self, progress: tqdm) -> None:
        """Trackers, validation and checkpoint, where it is time for them."""
        args, step = self.args, self.step
        is_last = step == args.max_train_steps
        if step % args.logging_steps == 0 or is_last:
            means = self.log.means()
            shown = ("generator_loss", "discriminator_loss", "real_sign", "augmentation_probability")
            progress.set_postfix({name: f"{means[name]:.3f}" for name in shown})
            self.track(means)
        if step % args.validation_steps == 0 or is_last:
            self._validate(is_last)
        if step % args.checkpointing_steps == 0 or is_last:
            self.save()

    def _validate(self, is_last: bool) -> None:
        if self.validate is None:
            return
        weights, validate = self.sampling_weights(), self.validate
        folder = self.output_dir / "validation" / f"step-{self.step}"
        measured = self.unless_the_disk_is_full("validation", lambda: validate(weights, folder, self.step, is_last))
        if measured:
            self.track(measured)

    def sampling_weights(self) -> dict[str, torch.Tensor]:
        """The generator's state on the CPU, with averaged parameters; buffers, as the mean code, are its own."""
        state = {name: value.detach().cpu().clone() for name, value in self.generator.state_dict().items()}
        names = [name for name, _ in self.generator.named_parameters()]
        return state | dict(zip(names, self.ema.full_tensors(), strict=True))

    def results(self) -> dict[str, Any]:
        """What the training measured, after `fit`."""
        return {
            "steps": self.step,
            "clips_seen": self.step * self.clips_per_step,
            "seconds": round(self.seconds, 1),
            "averaged_steps": len(self.log.window),
            **self.log.means(),
            "r1_gamma": self.r1_gamma,
            "num_parameters": sum(parameter.numel() for parameter in self.generator.parameters()),
            "num_discriminator_parameters": sum(parameter.numel() for parameter in self.discriminator.parameters()),
            "num_videos": self.dataset.num_videos,
            "num_broken": self.dataset.num_broken,
            "learning_rate": self.args.learning_rate,
            "num_processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
        }

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What has to be the same for a resumed training to be the training that was stopped."""
        names = ["seed", "num_frames", "frame_interval", "window", "horizontal_flip", "antialias", "learning_rate"]
        names += ["augmentation", "augmentation_target", "augmentation_clips", "ema_kimg", "ema_rampup"]
        names += ["train_batch_size", "gradient_accumulation_steps", "initial_contrast"]  # draws are those of a batch
        networks = {"generator": self.generator, "discriminator": self.discriminator}
        return {
            "num_processes": self.accelerator.num_processes,
            "frames_of_videos": self.digest_of_corpus(),
            "r1_gamma": self.r1_gamma,
            **{name: getattr(self.args, name) for name in names},
            **{
                name: {key: value for key, value in network.config.items() if not key.startswith("_")}
                for name, network in networks.items()
            },
        }

    def write_checkpoint(self, folder: Path) -> None:
        if not self.accelerator.is_main_process:
            return
        names = [name for name, _ in self.generator.named_parameters()]
        average = dict(zip(names, self.ema.full_tensors(), strict=True))
        save_file(average, folder / AVERAGE, metadata={"format": "pt"})
        for name in ("generator", "discriminator"):
            save_file(getattr(self, name).state_dict(), folder / f"{name}.safetensors", metadata={"format": "pt"})
            torch.save(self.optimizers[name].state_dict(), folder / f"{name}_optimizer.bin")
        state = {
            "facts": self.facts(),
            "augmentation_probability": self.augment.probability.item(),
            "real_signs": self._real_signs,
            "last_r1": self.last_r1,
            "seconds": self.seconds,
            "log": self.log.state_dict(),
        }
        (folder / RUN_FACTS).write_text(json.dumps(state, indent=1))

    def resume(self, checkpoint: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            ValueError: it is of another training; what differs is named.
        """
        # 1. Is it of this training?
        state = self.state_of_same_run(checkpoint)

        # 2. Its state
        for name in ("generator", "discriminator"):
            getattr(self, name).load_state_dict(load_file(checkpoint / f"{name}.safetensors"))
            optimizer_state = torch.load(checkpoint / f"{name}_optimizer.bin", map_location="cpu", weights_only=True)
            self.optimizers[name].load_state_dict(optimizer_state)
        average = load_file(checkpoint / AVERAGE)
        self.step = checkpoint_step(checkpoint)
        self.ema.load([average[name] for name, _ in self.generator.named_parameters()], self.step)
        self.augment.probability.fill_(state["augmentation_probability"])
        self._real_signs = state["real_signs"]
        self.last_r1 = state["last_r1"]
        self.seconds = state["seconds"]
        self.log.load_state_dict(state["log"], self.step, self.accelerator.is_main_process)

        # 3. Later checkpoints are no longer the latest
        by_main_process(self.accelerator, lambda: self.set_aside_later_ones(checkpoint))


# --- from the flags to the pipeline ----------------------------------------------------------------------------------


def build_networks(args: argparse.Namespace, recipe: GANRecipe, num_classes: int | None) -> tuple[Any, Any]:
    """New networks of the size that the flags say, with weights drawn by `--seed`."""
    torch.manual_seed(args.seed)  # the same initial weights in every process
    sizes = {name: getattr(args, name) for name in ("resolution", "channel_base", "channel_max")}
    generator = recipe.generator(
        **sizes,
        num_frames=args.num_frames,
        num_classes=num_classes,
        z_dim=args.code_dim,
        w_dim=args.code_dim,
        motion_z_dim=args.code_dim,
        motion_code_dim=args.code_dim,
        num_frequencies=args.code_dim // 2,
        motion_z_distance=args.motion_z_distance,
    )
    with torch.no_grad():
        for block in generator.blocks:
            block.to_rgb.weight.mul_(args.initial_contrast)
    discriminator = recipe.discriminator(
        **sizes,
        num_frames_per_clip=FRAMES_PER_CLIP,
        num_classes=num_classes,
        num_mapping_layers=DISCRIMINATOR_LAYERS,
    )
    return generator, discriminator


def train(args: argparse.Namespace, recipe: GANRecipe) -> int:
    """Trains as the flags say, and leaves a pipeline folder with the averaged generator; the exit code.

    What goes wrong is one sentence on stderr and code 1.
    """
    hub_token, args.hub_token = args.hub_token, None  # not for logs and files
    output_dir = Path(args.output_dir)

    def fail(error: Exception) -> int:
        print(f"{recipe.script}: error: {error}", file=sys.stderr)
        return 1

    # 1. The checkpoint to go on from, the corpus, the networks
    try:
        accelerator = make_accelerator(args)
        resume_from = begin(args, accelerator, hub_token)
        dataset, held_out = load_clips(args)
        generator, discriminator = build_networks(args, recipe, dataset.num_classes)

        def assemble(weights: dict[str, torch.Tensor]) -> Any:
            with init_empty_weights():
                sampler: Any = recipe.generator.from_config(generator.config)
            sampler.load_state_dict(weights, assign=True)
            return recipe.pipeline(generator=sampler.eval())

        validation = GANValidation(args, assemble, dataset.num_classes, held_out, accelerator)
        trainer = GANTrainer(args, accelerator, recipe, generator, discriminator, dataset, validation)
        if resume_from is not None:
            trainer.resume(resume_from)
            accelerator.print(f"Resumed from {resume_from} at step {trainer.step}.")
        output_dir.mkdir(parents=True, exist_ok=True)
        start_trackers(recipe.script.removeprefix("train_").removesuffix(".py"), args, accelerator)
    except (ValueError, OSError) as error:
        return fail(error)
    results = trainer.results()
    accelerator.print(
        f"{recipe.name}: {dataset.num_videos} videos ({dataset.num_broken} broken, "
        f"{len(dataset.too_short)} too short, {dataset.num_unlabelled} without a label, "
        f"{dataset.num_ignored_files} other files ignored), {results['num_parameters'] / 1e6:.1f} M parameters in the "
        f"generator, {results['num_discriminator_parameters'] / 1e6:.1f} M in the discriminator, "
        f"{args.train_batch_size} clips x {accelerator.num_processes} processes x {args.gradient_accumulation_steps} "
        f"accumulated, {args.max_train_steps} steps, R1 gamma {trainer.r1_gamma:.4g}"
    )

    # 2. The training
    try:
        trainer.fit()
    except (BadStep, VideoError) as error:
        end_training(accelerator)
        return fail(error)

    # 3. Results
    results, code = trainer.results(), 0
    if accelerator.is_main_process:
        facts = {"arguments": recorded(args), "results": results, "class_names": dataset.class_names}
        try:
            with replacing_entries(output_dir) as folder:
                assemble(trainer.sampling_weights()).save_pretrained(str(folder))
                (folder / "training.json").write_text(json.dumps(facts, indent=2))
            save_model_card(output_dir, vars(args), results, dataset.class_names)
            print(summary(results))
            print(f"Pipeline: {output_dir}")
        except (ValueError, OSError, SafetensorError) as error:
            code = fail(error)
        if args.push_to_hub and code == 0:
            code = 0 if publish(args, hub_token) else 1
    end_training(accelerator)
    return code


def summary(results: dict[str, Any]) -> str:
    """`GANTrainer.results` in a line."""
    if not results["averaged_steps"]:
        return "No step was taken."
    return (
        f"{results['clips_seen']} clips in {results['seconds'] / 60:.1f} minutes; mean of the last "
        f"{results['averaged_steps']} steps: generator {results['generator_loss']:.3f}, discriminator "
        f"{results['discriminator_loss']:.3f}, sign for real clips {results['real_sign']:.2f}, augmentation "
        f"{results['augmentation_probability']:.2f}"
    )
