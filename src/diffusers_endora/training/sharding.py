"""What a training has to see to where its model is sharded (FSDP2, https://arxiv.org/abs/2304.11277)."""

from typing import Any

import torch
from accelerate import DistributedType
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from .training_model import TrainingModel


def prepare_to_shard(accelerator: Any, model: TrainingModel, batch_size: int) -> None:
    """What Accelerate leaves out with FSDP2 and DeepSpeed; called before `accelerator.prepare`. Else does nothing.

    FSDP2: the teacher, which is no submodule of the model, goes to the device. And mixed precision becomes that of the
    other ways to train: Accelerate would have FSDP2 cast all that the model is given, noise and continuous timesteps
    too, and compute the loss in 16 bits. With autocast the networks alone do, and gradients add up in float32.
    DeepSpeed: it is told the batch size of a process, which else a loader would have to tell.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2:
        return
    if model.prior is not None and model.prior.teacher is not None:
        model.prior.teacher.to(accelerator.device)
    if accelerator.mixed_precision != "no":
        dtype = plugin.mixed_precision_policy.param_dtype
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)  # type: ignore[method-assign]


def reshard(model: torch.nn.Module) -> None:
    """Makes sharded modules forget the whole parameters that a forward put together; nothing if there are none.

    The outermost module keeps them for the backward that is to follow. Where none does and the shards change, its next
    forward would still compute with the old ones.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, its shards put together where it has any: then a collective call."""
    value = value.detach()
    if isinstance(value, DTensor):  # shards on the CPU have to come to where the processes talk to each other
        on_mesh: Any = value.to(value.device_mesh.device_type)
        value = on_mesh.full_tensor()
    return value.cpu()
