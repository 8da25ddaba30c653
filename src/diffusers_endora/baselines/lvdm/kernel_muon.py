"""Muon for the kernels of convolutions, taken as matrices."""

import torch
import torch.nn as nn

from ...training.muon import MuonWithAdamW

KERNELS = (nn.Linear, nn.Conv3d, nn.ConvTranspose3d)


class KernelMuon(MuonWithAdamW):
    """`MuonWithAdamW` for a network of convolutions: kernels and matrices by Muon, all other parameters by AdamW.

    A kernel is taken as the matrix of its first dimension by all others, in the same memory.

    Args:
        model: on the device that it is trained on; its parameters must not be replaced afterwards.
        last_layer: a kernel that AdamW trains, as the sizes of its outputs matter.
        lr, betas, weight_decay: see there.
    """

    def __init__(
        self,
        model: nn.Module,
        last_layer: nn.Parameter,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        kernels = [module.weight for module in model.modules() if isinstance(module, KERNELS)]
        self.kernels = [kernel for kernel in kernels if kernel is not last_layer]
        taken = {id(kernel) for kernel in self.kernels}
        others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        self.matrices = [nn.Parameter(kernel.data.flatten(1)) for kernel in self.kernels]
        super().__init__(self.matrices, others, lr, betas, weight_decay)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """A step by the gradients of the model's parameters."""
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        super().step(closure)
        for matrix in self.matrices:
            matrix.grad = None
