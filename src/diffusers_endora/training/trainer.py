"""The training loop: exact after a crash, the same on however many processes, and never waiting without need."""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from diffusers.optimization import get_scheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..data.clips import ClipDataset
from ..files import written_atomically
from ..models.autoencoder import load_vae
from .checkpoints import (
    AVERAGE,
    checkpoint_step,
    leave_out_frozen,
    link_or_copy,
    remove_leftovers,
)
from .early_stopping import EarlyStopping
from .ema import MovingAverage
from .feature_cache import FeatureCache
from .gaussian_baseline import GaussianBaseline
from .latents import encode_frames, sample_latents
from .muon import MuonWithAdamW
from .objective import coefficients, sample_timesteps
from .processes import by_main_process
from .sharding import full_tensor, prepare_to_shard, reshard
from .training_clips import TrainingClips, batches_from
from .training_log import TrainingLog
from .training_model import Losses, TrainingModel, drop_labels, use_plain_attention
from .training_run import RUN_FACTS, BadStep, TrainingRun

BAD_STEP = "bad_step.json"
BEST_WEIGHTS = "best.safetensors"
LOSS_WINDOW = 200  # optimiser steps that the reported losses are averaged over

GOLDEN_RATIO = 0.6180339887498949


class Trainer(TrainingRun):
    """Trains a `TrainingModel` on clips, as the flags of `arguments` say.

    Every random number of a clip belongs to its place in the sequence of clips (`TrainingClips`), so that processes,
    batch size and accumulation may share a step's clips out in any way, and a training that is killed goes on as if it
    had not been.

    Args:
        args: the flags.
        accelerator: made from them.
        model: what is trained; its parameters that require gradients are.
        vae_config: of the VAE that latents are of.
        dataset, caches: the corpus, and what is kept of its frames.
        held_out, held_out_caches: videos for the held-out loss, or None.
        validate: called as `validate(weights, folder, step, is_last)` by the main process at each validation, with the
            transformer's trained weights as sampling uses them; returns numbers for the trackers.
        learning_rate: before the schedule.
        origin: what a resumed training has to share beside what the flags and the transformer's config say.
    """

    facts_of_earlier_versions: ClassVar[dict[str, Any]] = {"optimizer": "adamw"}

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: TrainingModel,
        vae_config: Any,
        dataset: ClipDataset,
        caches: tuple[FeatureCache, ...] = (),
        held_out: ClipDataset | None = None,
        held_out_caches: tuple[FeatureCache, ...] = (),
        validate: Callable[[dict[str, torch.Tensor], Path, int, bool], dict[str, float]] | None = None,
        learning_rate: float = 1e-4,
        origin: dict[str, Any] | None = None,
    ) -> None:
        self.takes_own_steps = accelerator.distributed_type == DistributedType.DEEPSPEED  # within `backward`
        if self.takes_own_steps and args.skip_bad_steps:
            raise ValueError("--skip_bad_steps: DeepSpeed takes its steps by itself, so that none can be left out.")
        super().__init__(args, accelerator, dataset, args.max_train_steps)
        self.vae_config = vae_config
        self.validate = validate
        self.origin = origin or {}
        self.num_classes = dataset.num_classes if args.class_conditional else None
        self.scheduler = model.scheduler
        self.config = model.transformer.config
        self.trainable_names = [name for name, value in model.transformer.named_parameters() if value.requires_grad]
        side = model.transformer.config.sample_size
        self.latent_shape = (vae_config.latent_channels, side, side)
        self.clips_per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps

        # 1. What the caches do not give is computed: pixels, and the networks that look at them
        cached = {name for cache in caches for name in cache.features.shapes}
        self.vae = None
        if "latent_mean" not in cached:
            self.vae = load_vae(args.pretrained_vae).requires_grad_(False).to(accelerator.device)
        self.caches, self.held_out_caches = caches, held_out_caches
        reads_pixels = self.vae is not None or (model.prior is not None and "tokens" not in cached)
        num_clips = args.max_train_steps * self.clips_per_step
        self.clips = TrainingClips(dataset, self.latent_shape, args.seed, num_clips, caches, reads_pixels)
        self.held_out = None
        if held_out is not None:
            num_clips = min(args.validation_loss_clips, len(held_out))
            self.held_out = TrainingClips(
                held_out, self.latent_shape, args.seed + 1, num_clips, held_out_caches, reads_pixels
            )

        # 2. Model, optimiser, learning rate, moving average
        if args.gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()
        if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
            use_plain_attention(model.transformer)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        options: dict[str, Any] = {
            "lr": learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "weight_decay": args.adam_weight_decay,
        }
        if args.use_8bit_adam:
            import bitsandbytes

            optimizer = bitsandbytes.optim.AdamW8bit(trainable, **options)
        elif args.optimizer == "muon":
            if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
                raise ValueError("--optimizer muon: needs whole matrices, which FSDP and DeepSpeed divide.")
            blocks = {id(p) for name, p in model.transformer.named_parameters() if "blocks." in name and p.ndim == 2}
            matrices = [parameter for parameter in trainable if id(parameter) in blocks]
            others = [parameter for parameter in trainable if id(parameter) not in blocks]
            optimizer = MuonWithAdamW(matrices, others, **options)
        else:
            optimizer = torch.optim.AdamW(trainable, **options, fused=True)
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )
        prepare_to_shard(accelerator, model, args.train_batch_size)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        takes_found_inf = isinstance(optimizer, torch.optim.AdamW)
        self.skips_on_device = takes_found_inf and accelerator.scaler is None
        self.ema = None
        if args.use_ema:
            device = "cpu" if args.offload_ema else None
            self.ema = MovingAverage(self.averaged(), args.ema_decay, args.ema_warmup, device)

        # 3. What a checkpoint holds: of the model what is trained, and what follows
        self.is_partly_frozen = any(not parameter.requires_grad for parameter in model.parameters())
        if self.is_partly_frozen:
            accelerator.register_save_state_pre_hook(leave_out_frozen)
        self.baseline = GaussianBaseline()
        accelerator.register_for_checkpointing(self.lr_scheduler)  # not prepared: its steps are not per process
        num_timesteps = self.scheduler.config["num_train_timesteps"]
        self.log = TrainingLog(self.output_dir / "training_log.jsonl", LOSS_WINDOW, num_timesteps)
        self.early_stopping = EarlyStopping(args.early_stopping_patience)
        self.data_wait = self.busy = 0.0  # seconds
        self.samples = 0
        self._latents: list[torch.Tensor] = []  # of each micro-batch of the step under way
        self._errors: list[torch.Tensor] = []  # (B,) of each micro-batch of the step under way
        self._last: _LastStep | None = None

    # --- the loop ----------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Trains to the last step, or until the held-out loss says so.

        Raises:
            BadStep: without `--skip_bad_steps`; a checkpoint of the state without that step has been written.
        """
        args, accelerator = self.args, self.accelerator
        progress = tqdm(
            total=args.max_train_steps, initial=self.step, desc="train", disable=not accelerator.is_local_main_process
        )
        if accelerator.is_main_process:
            remove_leftovers(self.output_dir)
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of what filled the caches
        batches = self._batches()
        self.model.train()
        while self.step < args.max_train_steps and not self.early_stopping.should_stop:
            began = time.perf_counter()
            for micro_batch in range(args.gradient_accumulation_steps):
                waited = time.perf_counter()
                batch = next(batches)
                self.data_wait += time.perf_counter() - waited
                # Dropout, where a model has any, is a function of seed, step and process
                entropy = (args.seed, self.step, micro_batch, accelerator.process_index, 4)
                torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
                with accelerator.accumulate(self.model):
                    inputs = self.inputs(batch)
                    self._latents.append(inputs["latents"])
                    losses = self.model(**inputs)
                    accelerator.backward(losses.total)
                    self.log.add(losses, inputs["timesteps"])
                    self._errors.append(losses.mse)
                    self._update(losses)
            self.step += 1
            self.samples += self.clips_per_step
            progress.update()
            self.busy += time.perf_counter() - began
            self._report(progress)
        self._stop_if_bad()
        progress.close()

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The arguments of the model's forward for a batch of `TrainingClips`."""
        # 1. Latents
        if self.vae is not None:
            clips = batch["video"]
            mean, log_variance = encode_frames(self.vae, clips.flatten(0, 1))
            mean = mean.unflatten(0, clips.shape[:2])
            log_variance = None if log_variance is None else log_variance.unflatten(0, clips.shape[:2])
        else:
            mean, log_variance = batch["latent_mean"], batch.get("latent_log_variance")
        latents = sample_latents(self.vae_config, mean, log_variance, batch["posterior_noise"]).transpose(1, 2)

        # 2. What is drawn for each clip
        args = self.args
        inputs: dict[str, Any] = {
            "latents": latents,
            "noise": batch["noise"],
            "timesteps": sample_timesteps(
                self.scheduler, batch["timestep_uniform"], args.timestep_density, args.logit_mean, args.logit_std
            ),
        }
        if self.num_classes is not None:
            dropped = (batch["label_uniform"], self.config.class_dropout_prob, self.num_classes)
            inputs["class_labels"] = drop_labels(batch["class_labels"], *dropped)

        # 3. The teacher's tokens
        prior = self.unwrapped.prior
        if prior is not None:
            cached = batch.get("tokens")
            inputs["teacher_tokens"] = prior.extract(batch["video"]) if cached is None else list(cached.unbind(2))
        return inputs

    @property
    def unwrapped(self) -> TrainingModel:
        """The model as it was before Accelerate wrapped it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def averaged(self) -> list[torch.nn.Parameter]:
        """The transformer's trained parameters, in the order of `trainable_names`."""
        return [value for value in self.unwrapped.transformer.parameters() if value.requires_grad]

    def _update(self, losses: Losses) -> None:
        """The optimiser's step, where the micro-batch is the step's last."""
        args, accelerator = self.args, self.accelerator
        if accelerator.sync_gradients:
            # 1. Is it a good step? Decided on the device, alike in all processes
            parameters = [value for value in self.model.parameters() if value.requires_grad]
            if self.takes_own_steps:
                grad_norm = losses.total.new_zeros(())  # the gradients are gone
            elif self.step >= args.max_grad_norm_start:
                grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            else:
                accelerator.unscale_gradients()
                grad_norm = torch.nn.utils.get_total_norm([v.grad for v in parameters if v.grad is not None])
            grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
            loss, mse = accelerator.reduce(self.log.step_losses()[:2], reduction="mean")
            is_bad = ~loss.isfinite() | ~(mse <= args.max_loss)
            if accelerator.scaler is None:  # that of fp16 meets infinite gradients as a matter of course
                is_bad = is_bad | ~grad_norm.isfinite()

            # 2. A bad one leaves the weights as they are
            self._stop_if_bad()
            if self.skips_on_device:
                self.optimizer.optimizer.grad_scale = None
                self.optimizer.optimizer.found_inf = is_bad.float()
                self.optimizer.step()
            elif not is_bad.item():  # 8-bit Adam, Muon and fp16's scaler cannot be told on the device: the host waits
                self.optimizer.step()
            elif accelerator.scaler is not None:
                accelerator.scaler.update()
            self.optimizer.zero_grad()

            # 3. What follows from it
            self.log.end_step(self.step + 1, self.lr_scheduler.get_last_lr()[0], grad_norm, is_bad)
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self.averaged())
            for latents in self._latents:
                self.baseline.update(latents)
            self._latents = []
            copied = is_bad.to("cpu", non_blocking=True)
            event = None if copied.device == is_bad.device else torch.Event(is_bad.device)
            if event is not None:
                event.record()
            self._last = _LastStep(self.step, copied, event, self._errors)
            self._errors = []

    def _stop_if_bad(self) -> None:
        """Ends the training where the last step was a bad one and bad ones are not skipped.

        Called when the device works on the next step already, so that waiting for the last one costs nothing.
        """
        last, self._last = self._last, None
        if last is None or self.args.skip_bad_steps:
            return
        if last.event is not None:
            last.event.synchronize()
        if not last.is_bad.item():
            return
        # The weights are those before the bad step: it was left out. Whatever has been computed since is not used.
        self.optimizer.zero_grad()
        errors = [self.accelerator.gather(error).tolist() for error in last.errors]
        first = last.step * self.clips_per_step
        clips = [
            {"clip": self.clips.describe(position), "position": position, "squared_error": error}
            for position, error in enumerate((error for micro_batch in errors for error in micro_batch), start=first)
        ]
        saved = self.save()
        where = f"the state {'with' if self.takes_own_steps else 'without'} that step is in {saved}"
        if saved is None:
            where = "no checkpoint could be written"
        report = json.dumps({"step": last.step + 1, "clips": clips}, indent=1)
        path = self.output_dir / BAD_STEP
        is_written = self.unless_the_disk_is_full(BAD_STEP, lambda: path.write_text(report))
        in_full = f" (all, with their errors, in {path})" if is_written else ""
        raise BadStep(
            f"step {last.step + 1}: the loss or its gradient is not finite, or the noise error is above --max_loss "
            f"{self.args.max_loss:g}. Its clips: {'; '.join(clip['clip'] for clip in clips[:8])}"
            f"{' ...' if len(clips) > 8 else ''}{in_full}; {where}. "
            "--resume_from_checkpoint latest goes on after it, --skip_bad_steps leaves such steps out."
        )

    # --- data --------------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The batches of this process from the step that the training is at."""
        first, workers = self.step * self.clips_per_step, self.args.dataloader_num_workers
        return batches_from(self.clips, first, self.args.train_batch_size, workers, self.accelerator)

    # --- reports -----------------------------------------------------------------------------------------------------

    def _report(self, progress: tqdm) -> None:
        """Logging, validation and checkpoint, where it is time for them."""
        args, step = self.args, self.step
        is_last = step == args.max_train_steps
        if step % args.logging_steps == 0 or is_last:
            waited = time.perf_counter()
            values = self.log.flush(self.accelerator)  # the device catches up
            self.busy += time.perf_counter() - waited
            progress.set_postfix({name: f"{values[name]:.4f}" for name in ("mse", "vb", "prior") if name in values})
            self.track({**values, **self.speed(), "lr": self.lr_scheduler.get_last_lr()[0]})
        if step % args.validation_steps == 0 or is_last:
            self._stop_if_bad()
            self._validate(progress)
        if step % args.checkpointing_steps == 0 or is_last or self.early_stopping.should_stop:
            self._stop_if_bad()
            self.save()

    def speed(self) -> dict[str, float]:
        """Since the last call: clips per second, the share of time that steps waited for data, peak memory in GB."""
        wait, busy, samples = self.data_wait, max(self.busy, 1e-9), self.samples
        self.data_wait = self.busy = 0.0
        self.samples = 0
        if self.accelerator.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = resident_memory()
        return {"clips_per_second": samples / busy, "data_wait": wait / busy, "memory_gb": memory / 1e9}

    def _validate(self, progress: tqdm) -> None:
        """Held-out loss and sampled clips, from the weights that sampling uses."""
        values: dict[str, float] = {}
        if self.held_out is not None:
            values["held_out_loss"] = self.held_out_loss()
            is_best = self.early_stopping.update(values["held_out_loss"], self.step)
            if is_best and self.early_stopping.patience:
                self._keep_best()
            if self.accelerator.is_main_process:
                progress.write(f"step {self.step}: held-out loss {values['held_out_loss']:.5f}")
        if self.validate is not None:
            weights, validate = self.sampling_weights(), self.validate
            folder = self.output_dir / "validation" / f"step-{self.step}"
            is_last = self.step == self.args.max_train_steps or self.early_stopping.should_stop
            written = self.unless_the_disk_is_full("validation", lambda: validate(weights, folder, self.step, is_last))
            values |= written or {}
        self.track(values)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean unweighted squared error over held-out clips, of the averaged weights, at fixed noise and timesteps.

        The timesteps are spread evenly (golden ratio sequence), the same in every evaluation.
        """
        assert self.held_out is not None
        accelerator = self.accelerator
        sums = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
        size = self.args.train_batch_size
        batches = [range(first, min(first + size, len(self.held_out))) for first in range(0, len(self.held_out), size)]
        # As many forwards in every process, which sharded models need; the surplus counts nothing
        rounds = -(-len(batches) // accelerator.num_processes) * accelerator.num_processes
        self.model.eval()
        with self.ema.swapped_into(self.averaged()) if self.ema is not None else nullcontext():
            for place in range(accelerator.process_index, rounds, accelerator.num_processes):
                positions = batches[place % len(batches)]
                items = [self.held_out[position] for position in positions]
                batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
                batch["timestep_uniform"] = torch.tensor([(k + 0.5) * GOLDEN_RATIO % 1 for k in positions])
                if "label_uniform" in batch:
                    batch["label_uniform"].fill_(1)  # none is dropped
                batch = {name: value.to(accelerator.device) for name, value in batch.items()}
                mse = self.model(**self.inputs(batch)).mse
                if place < len(batches):
                    sums += torch.stack([mse.double().sum(), sums.new_tensor(len(mse))])
        reshard(self.model)  # the weights are no longer those of the last forward
        self.model.train()
        total, count = accelerator.reduce(sums, reduction="sum").tolist()
        return total / count

    def sampling_weights(self) -> dict[str, torch.Tensor]:
        """The transformer's trained weights as sampling uses them: their moving average, if any.

        All processes call it.
        """
        if self.ema is not None:
            values = self.ema.full_tensors()
        else:
            values = [full_tensor(value) for value in self.averaged()]
        return dict(zip(self.trainable_names, values, strict=True))

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What has to be the same for a resumed training to be the training that was stopped."""
        args = self.args
        names = ["seed", "resolution", "num_frames", "frame_interval", "window", "num_still_images", "horizontal_flip"]
        names += ["antialias", "prior", "prior_weight", "use_ema", "ema_decay", "ema_warmup", "prediction_type"]
        names += ["zero_terminal_snr", "loss_weighting", "snr_gamma", "sigmoid_bias", "timestep_density", "logit_mean"]
        names += ["logit_std", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay"]
        names += ["max_grad_norm", "max_grad_norm_start", "optimizer", "use_8bit_adam"]
        if args.lr_scheduler not in ("constant", "constant_with_warmup"):
            names.append("max_train_steps")  # the rate depends on it
        return {
            "clips_per_step": self.clips_per_step,
            "frames_of_videos": self.digest_of_corpus(),
            "learning_rate": self.lr_scheduler.base_lrs[0],
            **{name: getattr(args, name) for name in names},
            **self.origin,
            "transformer": {name: value for name, value in self.config.items() if not name.startswith("_")},
        }

    def save(self) -> Path | None:
        """As in every training, with the log brought up to date."""
        self.log.flush(self.accelerator)
        return super().save()

    def write_checkpoint(self, folder: Path) -> None:
        # What the processes do together comes first: one that cannot write is not to leave the others waiting
        average = None if self.ema is None else self.ema.full_tensors()
        baseline = self.baseline.gathered(self.accelerator)
        self.accelerator.save_state(str(folder))
        if not self.accelerator.is_main_process:
            return
        if average is not None:
            tensors = dict(zip(self.trainable_names, average, strict=True))
            save_file(tensors, folder / AVERAGE, metadata={"format": "pt"})
        best = self.output_dir / BEST_WEIGHTS
        if self.early_stopping.patience and best.exists():
            link_or_copy(best, folder / BEST_WEIGHTS)
        save_file(baseline.state_dict(), folder / "gaussian_baseline.safetensors")
        state = {
            "facts": self.facts(),
            "ema_steps": 0 if self.ema is None else self.ema.num_steps,
            "log": self.log.state_dict(),
            "early_stopping": self.early_stopping.state_dict(),
        }
        (folder / RUN_FACTS).write_text(json.dumps(state, indent=1))

    def resume(self, checkpoint: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            ValueError: it is of another training.
        """
        state = self.state_of_same_run(checkpoint)
        # DeepSpeed's checkpoints hold the frozen weights too
        lacks_weights = self.is_partly_frozen and self.accelerator.distributed_type != DistributedType.DEEPSPEED
        self.accelerator.load_state(str(checkpoint), **({"strict": False} if lacks_weights else {}))
        self.accelerator.step = 0  # of the micro-batches of a step, which may be others than before
        if self.ema is not None:
            average = load_file(checkpoint / AVERAGE)
            self.ema.load([average[name] for name in self.trainable_names], state["ema_steps"])
        self.baseline.load_state_dict(load_file(checkpoint / "gaussian_baseline.safetensors"))
        if not self.accelerator.is_main_process:  # it holds the frames of all processes
            self.baseline.clear()
        self.step = checkpoint_step(checkpoint)
        self.log.load_state_dict(state["log"], self.step, self.accelerator.is_main_process)
        kept = checkpoint / BEST_WEIGHTS
        if kept.exists() or not self.early_stopping.patience:  # else it starts to count now
            self.early_stopping.load_state_dict(state["early_stopping"])

        def restore() -> None:
            (self.output_dir / BEST_WEIGHTS).unlink(missing_ok=True)
            if kept.exists():
                self.output_dir.mkdir(parents=True, exist_ok=True)
                link_or_copy(kept, self.output_dir / BEST_WEIGHTS)
            self.set_aside_later_ones(checkpoint)

        by_main_process(self.accelerator, restore)

    def _keep_best(self) -> None:
        """Keeps the weights of the best evaluation in `best.safetensors`; a checkpoint holds the file, too."""
        weights = {name: value.contiguous() for name, value in self.sampling_weights().items()}

        def write() -> None:
            with written_atomically(self.output_dir / BEST_WEIGHTS) as temporary:
                save_file(weights, temporary, metadata={"format": "pt", "step": str(self.step)})

        self.unless_the_disk_is_full(BEST_WEIGHTS, write)

    def final_weights(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The weights to publish, those of the best evaluation where early stopping is on.

        Returns:
            The weights, and `weights_of_step` and `held_out_loss` (None where it was not measured of them).
        """
        stopping = self.early_stopping
        best = self.output_dir / BEST_WEIGHTS
        if stopping.patience and best.exists():
            with safe_open(best, framework="pt") as file:
                step = int(file.metadata()["step"])
            if step == stopping.best_step:
                return load_file(best), {"weights_of_step": step, "held_out_loss": stopping.best_loss}
        loss = stopping.last_loss if stopping.last_step == self.step > 0 else None
        return self.sampling_weights(), {"weights_of_step": self.step, "held_out_loss": loss}

    def results(self) -> dict[str, Any]:
        """What the training measured; all processes call it, after `fit`."""
        self.log.flush(self.accelerator)
        baseline = self.baseline.gathered(self.accelerator)
        parameters = list(self.unwrapped.transformer.parameters())
        return {
            "steps": self.step,
            "stopped_early": self.step < self.args.max_train_steps,
            "averaged_steps": len(self.log.window),
            "skipped_steps": self.log.num_bad_steps,
            **self.log.means(),
            "gaussian_mse": self._expected_error(baseline),
            "num_parameters": sum(parameter.numel() for parameter in parameters),
            "num_videos": self.dataset.num_videos,
            "num_broken": self.dataset.num_broken,
            "learning_rate": self.lr_scheduler.base_lrs[0],
            "num_processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
        }

    def _expected_error(self, baseline: GaussianBaseline) -> float:
        """What the baseline would have scored, at timesteps of the density that the training draws them from."""
        args, num_timesteps = self.args, self.scheduler.config["num_train_timesteps"]
        uniform = (torch.arange(num_timesteps) + 0.5) / num_timesteps
        timesteps = sample_timesteps(self.scheduler, uniform, args.timestep_density, args.logit_mean, args.logit_std)
        return baseline.expected_error(*coefficients(self.scheduler, timesteps))


class _LastStep(NamedTuple):
    """A step whose outcome has not been looked at."""

    step: int
    is_bad: torch.Tensor  # on the CPU, once `event` has come
    event: torch.Event | None
    errors: list[torch.Tensor]  # (B,) of each micro-batch


def summary(results: dict[str, Any]) -> str:
    """`Trainer.results` in a line, with the step whose weights are published as `weights_of_step`."""
    if results.get("mse") is None:
        return "No step was taken."
    line = f"squared error {results['mse']:.4f}, mean of the last {results['averaged_steps']} steps"
    line += (
        f": {results['mse'] / results['gaussian_mse']:.3f} x the {results['gaussian_mse']:.4f} of a per-position "
        "Gaussian predictor on the same latents"
    )
    if results["stopped_early"]:
        line += f"; stopped early, weights of step {results['weights_of_step']}"
    if results["skipped_steps"]:
        line += f"; {results['skipped_steps']} bad steps skipped"
    return line


def resident_memory() -> int:
    """The largest amount of memory that this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
