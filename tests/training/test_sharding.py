"""Two processes, each with its part of every parameter (FSDP2, on gloo), train as one process with all of them does.

Accelerate takes no notice of its FSDP plugin on a CPU, so the model is sharded here as the plugin would on GPUs, or
Accelerate is told that it is on some.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from diffusers import AutoencoderTiny
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import ViTConfig, ViTModel

from diffusers_endora import EndoraTransformer3DModel
from diffusers_endora.data.clips import ClipDataset
from diffusers_endora.data.video_io import write_video
from diffusers_endora.models.autoencoder import load_vae_config
from diffusers_endora.training.arguments import add_model, new_parser, parse_arguments
from diffusers_endora.training.dino_prior import DinoPrior
from diffusers_endora.training.ema import MovingAverage
from diffusers_endora.training.objective import make_scheduler
from diffusers_endora.training.sharding import full_tensor, prepare_to_shard
from diffusers_endora.training.trainer import Trainer
from diffusers_endora.training.training_model import Losses, TrainingModel

NUM_PROCESSES = 2
BATCH_SIZE = 4  # of both together


def small_model() -> TrainingModel:
    """The objective of a transformer of 2 pairs of blocks with 2 classes, and a prior; no weight is zero."""
    torch.manual_seed(0)
    transformer = EndoraTransformer3DModel(
        num_attention_heads=2, attention_head_dim=6, num_layers=2, sample_size=8, num_frames=16, num_classes=2
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=8
    )
    prior = DinoPrior(ViTModel(config, add_pooling_layer=False), (1, 3), (0, 1), (4, 4), projection_channels=3)
    return TrainingModel(transformer, make_scheduler("epsilon"), prior, num_still_images=2)


def shard(model: TrainingModel, **options: Any) -> TrainingModel:
    """Every block a unit and the rest another one, as `examples/accelerate_configs/fsdp2.yaml` has it."""
    for module in model.modules():
        if type(module).__name__ in EndoraTransformer3DModel._no_split_modules:
            fully_shard(module, **options)
    return fully_shard(model, **options)


def batch(rank: int | None = None) -> dict[str, Any]:
    """Arguments of the model: a process' part of the batch, or all of it."""
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, BATCH_SIZE, 4, 18, 8, 8, generator=generator)
    tokens = torch.randn(2, BATCH_SIZE, 18, 16, 8, generator=generator)
    timesteps, labels = torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 1])
    size = BATCH_SIZE // NUM_PROCESSES
    part = slice(None) if rank is None else slice(rank * size, (rank + 1) * size)
    return {
        "latents": latents[part],
        "timesteps": timesteps[part],
        "noise": noise[part],
        "class_labels": labels[part],
        "teacher_tokens": [layer[part] for layer in tokens],
    }


def accelerator_of_fsdp2(mixed_precision: str, device: str) -> SimpleNamespace:
    """What an `Accelerator` with `fsdp2.yaml` says of itself."""
    policy = None
    if mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(*[torch.bfloat16] * 3)
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2, mixed_precision_policy=policy))
    return SimpleNamespace(
        state=state,
        distributed_type=DistributedType.FSDP,
        mixed_precision=mixed_precision,
        device=torch.device(device),
    )


def sharding_accelerator() -> Accelerator:
    """An `Accelerator` with `fsdp2.yaml`, made to take notice of it on a CPU; it accumulates two micro-batches."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=EndoraTransformer3DModel._no_split_modules,
        reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    return accelerator


def full(named_tensors: Any) -> dict[str, torch.Tensor]:
    return {name: full_tensor(value).clone() for name, value in named_tensors}


def gradients(model: TrainingModel) -> dict[str, torch.Tensor]:
    return full((name, value.grad) for name, value in model.named_parameters())


def adamw(model: TrainingModel) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def detached(losses: Losses) -> Losses:
    return Losses(*(value.detach().clone() for value in losses))


def train(folder: Path, accelerator: Accelerator, batch_size: int, resume: bool = False) -> dict[str, Any]:
    """Three steps of the trainer, the last with its gradient clipped, with an evaluation after each.

    Args:
        batch_size: of a forward.
        resume: go on after the second, from its checkpoint.
    """
    parser = new_parser("")
    add_model(parser.add_argument_group("model"))
    flags = {
        "train_data_dir": folder / "videos",
        "pretrained_vae": folder / "vae",
        "dino_model": "given",
        "output_dir": folder / f"out-{batch_size}",
        "train_batch_size": batch_size,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "max_train_steps": 3,
        "max_grad_norm_start": 2,
        "validation_steps": 1,
        "checkpointing_steps": 2,
        "validation_loss_clips": 3,
        "ema_decay": 0.5,
        "dataloader_num_workers": 0,
    }
    args = parse_arguments(parser, ["--class_conditional", *(f"--{name}={value}" for name, value in flags.items())])
    Path(args.output_dir).mkdir(exist_ok=True)
    options = {"num_still_images": 2, "resolution": 32, "class_labels": True}
    trainer = Trainer(
        args,
        accelerator,
        small_model(),
        load_vae_config(args.pretrained_vae),
        ClipDataset(args.train_data_dir, **options),
        held_out=ClipDataset(args.train_data_dir, **options, fixed_offsets=True, horizontal_flip=False),
    )
    held_out: list[float] = []

    def held_out_loss() -> float:
        held_out.append(Trainer.held_out_loss(trainer))
        return held_out[-1]

    trainer.held_out_loss = held_out_loss
    if resume:
        trainer.resume(Path(args.output_dir) / "checkpoint-2")
    trainer.fit()
    return {"held_out": held_out, "log": list(trainer.log.window), "weights": trainer.sampling_weights()}


# --- the two processes -----------------------------------------------------------------------------------------------


def process(rank: int, folder: Path) -> None:
    """What each of the processes does; what it finds goes into a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_PROCESSES)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # Accelerate wants them, and has no use for them
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=NUM_PROCESSES)
    found: dict[str, Any] = {}

    # 1. Gradients
    model = shard(small_model())
    parameters = list(model.parameters())
    found["are_sharded"] = all(isinstance(parameter, DTensor) for parameter in parameters)
    found["part"] = {name: value.to_local().clone() for name, value in model.named_parameters()}
    optimizer, average = adamw(model), MovingAverage(parameters, 0.9)
    losses = model(**batch(rank))
    losses.total.backward()
    found["losses"], found["gradients"] = detached(losses), gradients(model)
    found["norm"] = full_tensor(torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters]))

    # 2. A step that is left out, one that is not, and the average after it
    for name, is_bad in (("left_out", 1.0), ("stepped", 0.0)):
        optimizer.found_inf = torch.tensor(is_bad)
        optimizer.step()
        found[name] = full(model.named_parameters())
    average.step(parameters)
    found["average"] = average.full_tensors()
    with average.swapped_into(parameters):
        found["swapped_in"] = [full_tensor(parameter).clone() for parameter in parameters]
    found["swapped_back"] = full(model.named_parameters())
    loaded = MovingAverage([torch.zeros_like(parameter) for parameter in parameters], 0.9)
    loaded.load(average.full_tensors(), average.num_steps)
    found["loaded"] = loaded.full_tensors()

    # 3. A checkpoint, read by another model
    save(model, optimizer, average, folder / "checkpoint")
    model_2 = shard(small_model())
    optimizer_2, average_2 = adamw(model_2), MovingAverage(model_2.parameters(), 0.9)
    load(model_2, optimizer_2, average_2, folder / "checkpoint")
    found["is_read_back"] = all(
        torch.equal(written.to_local(), read.to_local())
        for written, read in zip(
            [*parameters, *average.average, *moments(optimizer)],
            [*model_2.parameters(), *average_2.average, *moments(optimizer_2)],
            strict=True,
        )
    )

    # 4. Mixed precision
    model = small_model()
    accelerator = accelerator_of_fsdp2("bf16", "cpu")
    prepare_to_shard(accelerator, model, BATCH_SIZE // NUM_PROCESSES)
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    losses = shard(model, mp_policy=policy)(**batch(rank))
    losses.total.backward()
    found["bf16_losses"], found["bf16_gradients"] = detached(losses), gradients(model)

    # 5. A training
    for name in ("training", "resumed"):
        AcceleratorState._reset_state(True)
        accelerator = sharding_accelerator()
        found[name] = train(folder, accelerator, BATCH_SIZE // NUM_PROCESSES // 2, resume=name == "resumed")
    torch.save(found, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


def save(model: TrainingModel, optimizer: torch.optim.Optimizer, average: MovingAverage, folder: Path) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "average": dict(enumerate(average.average))}
    dcp.save(state, checkpoint_id=folder)


def load(model: TrainingModel, optimizer: torch.optim.Optimizer, average: MovingAverage, folder: Path) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "average": dict(enumerate(average.average))}
    dcp.load(state, checkpoint_id=folder)  # in place
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    return [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three videos of two classes, and a VAE."""
    folder = tmp_path_factory.mktemp("sharding")
    rng = np.random.default_rng(0)
    for index, name in enumerate("aba"):
        frames = (rng.integers(0, 200, size=(1, 32, 32, 3)) + np.arange(20).reshape(20, 1, 1, 1)).astype(np.uint8)
        (folder / "videos" / name).mkdir(parents=True, exist_ok=True)
        write_video(folder / "videos" / name / f"{index}.mp4", frames, fps=8)
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    counts = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    AutoencoderTiny(**blocks, **counts).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def found(folder) -> list[dict[str, Any]]:
    """What each of the processes found."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers_endora.training.trainer", "diffusers", "transformers"])  # once for both
    torch.multiprocessing.start_processes(process, (folder,), nprocs=NUM_PROCESSES, start_method="forkserver")
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(NUM_PROCESSES)]


# --- their results are those of one ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> SimpleNamespace:
    """The same model whole: its weights, losses and gradients."""
    model = small_model()
    initial = full(model.named_parameters())
    losses = model(**batch())
    losses.total.backward()
    return SimpleNamespace(initial=initial, losses=detached(losses), gradients=gradients(model))


def assert_same_losses(of_processes: list[Losses], whole: Losses, rtol: float) -> None:
    for name in ("total", "prior"):  # means over the batch
        mean = torch.stack([getattr(losses, name) for losses in of_processes]).mean()
        torch.testing.assert_close(mean, getattr(whole, name), rtol=rtol, atol=0)
    for name in ("mse", "vb"):
        joined = torch.cat([getattr(losses, name) for losses in of_processes])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=rtol, atol=0)


def assert_same_gradients(sharded: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], rtol: float) -> None:
    largest = max(gradient.abs().max() for gradient in whole.values())
    assert sharded.keys() == whole.keys()
    for name, gradient in whole.items():
        assert (sharded[name] - gradient).abs().max() <= rtol * largest, name


@pytest.mark.slow
def test_each_process_holds_its_part_of_every_parameter(found, alone):
    assert all(of_process["are_sharded"] for of_process in found)
    for name, whole in alone.initial.items():
        parts = [of_process["part"][name] for of_process in found]
        assert len(parts[0]) == -(-len(whole) // NUM_PROCESSES), name
        assert torch.equal(torch.cat(parts), whole), name


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_the_whole_batch(found, alone):
    assert_same_losses([of_process["losses"] for of_process in found], alone.losses, rtol=1e-5)
    norm = torch.nn.utils.get_total_norm(list(alone.gradients.values()))
    for of_process in found:
        assert_same_gradients(of_process["gradients"], alone.gradients, rtol=1e-6)
        torch.testing.assert_close(of_process["norm"], norm, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_a_bad_step_leaves_shards_as_they_are(found, alone):
    for of_process in found:
        for name, whole in alone.initial.items():
            assert torch.equal(of_process["left_out"][name], whole), name
            assert not torch.equal(of_process["stepped"][name], whole), name


@pytest.mark.slow
def test_the_average_of_shards(found, alone):
    whole = MovingAverage(alone.initial.values(), 0.9)
    for of_process in found:
        stepped = list(of_process["stepped"].values())
        whole.load(alone.initial.values(), 0)
        whole.step(stepped)
        for average, expected in zip(of_process["average"], whole.full_tensors(), strict=True):
            assert torch.equal(average, expected)
        for name in ("swapped_in", "loaded"):
            assert all(map(torch.equal, of_process[name], of_process["average"])), name
        assert all(map(torch.equal, of_process["swapped_back"].values(), stepped))


@pytest.mark.slow
def test_a_checkpoint_of_shards_is_read_back_exactly_also_by_one_process(found, folder):
    assert all(of_process["is_read_back"] for of_process in found)
    model = small_model()
    optimizer, average = adamw(model), MovingAverage(model.parameters(), 0.9)
    load(model, optimizer, average, folder / "checkpoint")
    for name, whole in model.named_parameters():
        assert torch.equal(whole, found[0]["stepped"][name]), name
    assert all(map(torch.equal, average.average, found[0]["average"]))
    assert all(moment.abs().max() > 0 for moment in moments(optimizer))


@pytest.mark.slow
def test_mixed_precision_is_autocast_and_the_loss_stays_in_float32(found):
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(**batch())
    losses.total.backward()
    assert_same_losses([of_process["bf16_losses"] for of_process in found], losses, rtol=1e-5)
    assert_same_gradients(found[0]["bf16_gradients"], gradients(model), rtol=1e-2)


def test_the_teacher_follows_to_the_device_though_it_is_no_submodule():
    model = small_model()
    prepare_to_shard(accelerator_of_fsdp2("no", "meta"), model, BATCH_SIZE)
    assert all(value.is_meta for value in model.prior.teacher.parameters())
    assert not any(value.is_meta for value in model.parameters())


@pytest.mark.slow
def test_the_trainer_on_shards_accumulates_evaluates_and_resumes_as_on_the_whole(found, folder):
    AcceleratorState._reset_state(True)
    whole = train(folder, Accelerator(cpu=True), BATCH_SIZE)
    AcceleratorState._reset_state(True)
    for of_process in found:
        training, resumed = of_process["training"], of_process["resumed"]
        np.testing.assert_allclose(training["held_out"], whole["held_out"], rtol=1e-6)
        for step, expected in zip(training["log"], whole["log"], strict=True):
            assert step == pytest.approx(expected, rel=1e-5)
        assert training["weights"].keys() == whole["weights"].keys()
        for name, expected in whole["weights"].items():
            assert training["weights"][name].shape == expected.shape
            torch.testing.assert_close(training["weights"][name], expected, rtol=0, atol=2e-5)
            assert torch.equal(resumed["weights"][name], training["weights"][name]), name
        assert resumed["held_out"] == training["held_out"][2:]
        assert resumed["log"] == training["log"]
