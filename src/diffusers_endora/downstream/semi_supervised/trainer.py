"""One training of a classifier: labelled clips alone, or FixMatch with unlabelled ones."""

import copy
import json
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ...files import written_atomically
from ...training.processes import on_cpu
from ...training.resumable_steps import resumable_steps, resume
from .fixmatch import FixMatchLoss, align_distribution, cosine_decay, fixmatch_loss
from .videos import Clips, LabelledVideos, as_uint8, pixels_of
from .views import strong_view, weak_view

HISTORY = "history.json"
ALIGNED_OVER = 128  # batches, as ReMixMatch
_EVALUATED_AT_A_TIME = 16  # clips
_EPOCHS_OF_A_SEED = 2**24
_WITHOUT_EFFECT = ("checkpointing_steps", "num_workers")


@dataclass(frozen=True)
class TrainingSettings:
    """What a training does, beside its clips.

    Attributes:
        max_train_steps: steps of the optimiser.
        train_batch_size: labelled clips in a step, B.
        unlabelled_ratio: unlabelled clips for each labelled one, the paper's mu.
        unlabelled_weight: the paper's lambda_u.
        confidence_threshold: the paper's tau.
        distribution_alignment: see `align_distribution`.
        learning_rate, weight_decay: of AdamW; the rate rises for 5 % of the steps, then follows `cosine_decay`.
        ema_decay: of the averaged weights, which judge; less in the first steps; 0: the last weights.
        validation_steps: steps between two looks at the validation part.
        checkpointing_steps: steps between two checkpoints.
        mixed_precision: "no", "fp16" or "bf16".
        num_workers: processes that read clips and make views.
    """

    max_train_steps: int = 1000
    train_batch_size: int = 8
    unlabelled_ratio: int = 2
    unlabelled_weight: float = 1.0
    confidence_threshold: float = 0.95
    distribution_alignment: bool = False
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    ema_decay: float = 0.99
    validation_steps: int = 50
    checkpointing_steps: int = 500
    mixed_precision: str = "no"
    num_workers: int = 0

    def deciding(self) -> dict[str, Any]:
        """Those that the result depends on."""
        return {name: value for name, value in asdict(self).items() if name not in _WITHOUT_EFFECT}


class TrainingBatches(Dataset[dict[str, torch.Tensor]]):
    """Item `step` is the batch of that step, a function of seed and step alone.

    Labelled and unlabelled clips are gone through in random order, each time in another one. Items are `labelled`
    `(B, F, H, W, 3)` uint8 weak views, `labels` `(B,)`, and with unlabelled clips `weak` and, unless `weak_alone`,
    `strong`, views of the same clips, `(mu B, F, H, W, 3)`.
    """

    def __init__(
        self,
        labelled: Clips,
        labels: np.ndarray,
        unlabelled: Clips | None,
        settings: TrainingSettings,
        seed: int,
        weak_alone: bool = False,
    ) -> None:
        self.labelled = labelled
        self.labels = labels
        self.unlabelled = unlabelled
        self.settings = settings
        self.seed = seed
        self.weak_alone = weak_alone

    def __len__(self) -> int:
        return self.settings.max_train_steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        batch_size = self.settings.train_batch_size
        views, labels = [], []
        for draw in range(step * batch_size, (step + 1) * batch_size):
            clip, position = self._drawn(self.labelled, draw, stream=0)
            views.append(weak_view(clip, np.random.default_rng((self.seed, 0, draw))))
            labels.append(self.labels[position])
        batch = {"labelled": torch.from_numpy(np.stack(views)), "labels": torch.tensor(labels)}
        if self.unlabelled is not None:
            num_unlabelled = batch_size * self.settings.unlabelled_ratio
            draws = range(step * num_unlabelled, (step + 1) * num_unlabelled)
            clips = [self._drawn(self.unlabelled, draw, stream=1)[0] for draw in draws]
            makers = {"weak": (weak_view, 1), "strong": (strong_view, 2)}
            for name in ["weak"] if self.weak_alone else ["weak", "strong"]:
                make, stream = makers[name]
                made = [
                    make(clip, np.random.default_rng((self.seed, stream, draw)))
                    for clip, draw in zip(clips, draws, strict=True)
                ]
                batch[name] = torch.from_numpy(np.stack(made))
        return batch

    def _drawn(self, clips: Clips, draw: int, stream: int) -> tuple[np.ndarray, int]:
        """Clip number `draw` of the training, and its position among `clips`."""
        epoch, place = divmod(draw, len(clips.videos))
        order = np.random.default_rng((self.seed, 3, stream, epoch)).permutation(len(clips.videos))
        position = int(order[place])
        return clips.read(self.seed * _EPOCHS_OF_A_SEED + epoch, position), position


class ClassifierInTraining(nn.Module):
    """A classifier with its moving average and the best of these so far: all that a checkpoint has to hold."""

    selected_auroc: torch.Tensor

    def __init__(self, classifier: nn.Module, ema_decay: float) -> None:
        super().__init__()
        self.classifier = classifier
        self.averaged = copy.deepcopy(classifier).requires_grad_(False)
        self.selected = copy.deepcopy(classifier).requires_grad_(False)
        self.ema_decay = ema_decay
        self.register_buffer("selected_auroc", torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.classifier(clips)

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Counts the weights after a step in; at step n with a decay of at most `n / (n + 10)`."""
        decay = min(self.ema_decay, step / (step + 10))
        new = self.classifier.state_dict()
        for name, average in self.averaged.state_dict().items():
            if average.is_floating_point():
                average.lerp_(new[name], 1 - decay)
            else:
                average.copy_(new[name])

    def select(self, auroc: float) -> None:
        """Keeps the moving average if it is the best on the validation part so far, or as good."""
        if auroc >= self.selected_auroc:
            self.selected_auroc.fill_(auroc)
            self.selected.load_state_dict(self.averaged.state_dict())


class RecentPredictions:
    """Mean probabilities of the last batches, for `align_distribution`."""

    def __init__(self) -> None:
        self.means: deque[list[float]] = deque(maxlen=ALIGNED_OVER)

    def count_in(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Adds a batch `(U, K)`; returns the mean of all, `(K,)`."""
        self.means.append(probabilities.mean(0).tolist())
        return probabilities.new_tensor(list(self.means)).mean(0)

    def state_dict(self) -> dict[str, Any]:
        return {"means": list(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means = deque(state["means"], maxlen=ALIGNED_OVER)


@dataclass(frozen=True)
class TrainedClassifier:
    """What a training leaves.

    Attributes:
        classifier: the averaged weights of the step that was best on the validation part.
        history: a dictionary for each look at the validation part: step, validation AUROC in percent, mean losses and
            share of unlabelled clips that counted since the last look.
    """

    classifier: nn.Module
    history: list[dict[str, float]]


def train_classifier(
    classifier: nn.Module,
    videos: LabelledVideos,
    labelled: list[int],
    validation: list[int],
    unlabelled: Clips | None,
    settings: TrainingSettings,
    seed: int,
    output_dir: Path,
    description: dict[str, Any],
    endora_legacy: bool = False,
) -> TrainedClassifier:
    """Trains with FixMatch, or, without unlabelled clips, by cross-entropy on the labelled ones.

    Which weights are kept is decided by the AUROC on the validation videos. Killed, it goes on from the latest
    checkpoint in `output_dir`, on a CPU exactly.

    Args:
        classifier: `(B, F, 3, H, W)` in [-1, 1] to logits `(B, 2)`.
        videos: the training corpus.
        labelled, validation: numbers of its videos.
        output_dir: for checkpoints and `history.json`.
        description: all that the result depends on, as JSON has it; checkpoints of another one are refused.
        endora_legacy: the unlabelled loss of the official Endora code (`Downstream-Semi/train_semi_gen.py`): the
            logits of the **weak** view are fitted to the pseudo-labels that come from them; strong views enter no
            loss. This is self-training and not FixMatch.

    Raises:
        ValueError: the loss is not finite, a checkpoint is of another training, or there are several processes.
        VideoError: a video is damaged.
    """
    accelerator = Accelerator(cpu=on_cpu(), mixed_precision=settings.mixed_precision)
    if accelerator.num_processes > 1:
        raise ValueError(f"{accelerator.num_processes} processes; it is made for one.")
    labels = videos.labels[labelled]
    class_shares = torch.tensor(np.bincount(labels, minlength=2) / len(labels), dtype=torch.float32)
    class_shares = class_shares.to(accelerator.device)
    batches = TrainingBatches(
        Clips(videos.random_clips, labelled), labels, unlabelled, settings, seed, weak_alone=endora_legacy
    )
    decayed = [parameter for parameter in classifier.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in classifier.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
    )
    num_steps = settings.max_train_steps
    rise = max(1, num_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / rise) * cosine_decay(step, num_steps)
    )
    model = ClassifierInTraining(classifier, settings.ema_decay)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    recent = RecentPredictions()
    accelerator.register_for_checkpointing(recent)
    history_file = output_dir / HISTORY
    done = resume(accelerator, output_dir, description)
    history = json.loads(history_file.read_text(encoding="utf-8")) if done and history_file.is_file() else []
    history = [look for look in history if look["step"] <= done]

    reader = DataLoader(batches, batch_size=None, sampler=range(done, num_steps), num_workers=settings.num_workers)
    read = iter(reader)
    losses: list[list[float]] = []
    for step in resumable_steps(accelerator, output_dir, done, num_steps, settings.checkpointing_steps, description):
        torch.manual_seed(seed * 2**32 + step)  # dropout
        batch = {name: values.to(accelerator.device) for name, values in next(read).items()}
        model.train()
        with accelerator.autocast():
            loss = step_loss(model, batch, class_shares, recent, settings, endora_legacy)
        if not torch.isfinite(loss.total):
            raise ValueError(f"step {step}: the loss is {loss.total.item()}; lower --learning_rate.")
        accelerator.backward(loss.total)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        inner = accelerator.unwrap_model(model)
        inner.average(step + 1)
        losses.append([loss.supervised.item(), loss.unlabelled.item(), loss.share.item()])
        if (step + 1) % settings.validation_steps == 0 or step + 1 == num_steps:
            probabilities = predict(inner.averaged, videos, validation)
            auroc = 100 * float(roc_auc_score(videos.labels[validation], probabilities))
            inner.select(auroc)
            means = dict(zip(("supervised", "unlabelled", "share"), np.mean(losses, axis=0).tolist(), strict=True))
            history.append({"step": step + 1, "validation_auroc": auroc, **means})
            with written_atomically(history_file) as temporary:
                temporary.write_text(json.dumps(history, indent=1), encoding="utf-8")
            losses = []
    return TrainedClassifier(accelerator.unwrap_model(model).selected.eval(), history)


def step_loss(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    class_shares: torch.Tensor,
    recent: RecentPredictions,
    settings: TrainingSettings,
    endora_legacy: bool,
) -> FixMatchLoss:
    """The objective of one step; without unlabelled clips the first term alone."""
    labelled = pixels_of(batch["labelled"])
    if "weak" not in batch:
        supervised = nn.functional.cross_entropy(model(labelled).float(), batch["labels"])
        nothing = torch.zeros_like(supervised)
        return FixMatchLoss(supervised, supervised, nothing, nothing)
    num_labelled = len(labelled)
    if endora_legacy:
        logits = model(torch.cat([labelled, pixels_of(batch["weak"])])).float()
        weak_logits = logits[num_labelled:].detach()
    else:
        with torch.no_grad():
            weak_logits = model(pixels_of(batch["weak"])).float()
        logits = model(torch.cat([labelled, pixels_of(batch["strong"])])).float()
    probabilities = weak_logits.softmax(dim=1)
    if settings.distribution_alignment:
        probabilities = align_distribution(probabilities, class_shares, recent.count_in(probabilities))
    return fixmatch_loss(
        logits[:num_labelled],
        batch["labels"],
        probabilities,
        logits[num_labelled:],
        settings.confidence_threshold,
        settings.unlabelled_weight,
    )


@torch.no_grad()
def predict(classifier: nn.Module, videos: LabelledVideos, chosen: list[int] | range) -> np.ndarray:
    """Probability of the positive class of some videos, `(len(chosen),)`: the mean over clips at fixed places.

    Raises:
        VideoError: a video is damaged.
    """
    classifier.eval()
    device = next(classifier.parameters()).device
    items = [(row, item) for row, video in enumerate(chosen) for item in videos.fixed_clips.fixed_clips_of(video)]
    sums, counts = np.zeros(len(chosen)), np.zeros(len(chosen))
    for first in range(0, len(items), _EVALUATED_AT_A_TIME):
        some = items[first : first + _EVALUATED_AT_A_TIME]
        clips = torch.from_numpy(np.stack([as_uint8(videos.fixed_clips[item]["video"]) for _, item in some]))
        probabilities = classifier(pixels_of(clips.to(device))).float().softmax(dim=1)[:, 1].cpu().numpy()
        for (row, _), probability in zip(some, probabilities, strict=True):
            sums[row] += probability
            counts[row] += 1
    return sums / counts
