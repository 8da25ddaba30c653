"""Muon for the weight matrices of the blocks, AdamW for everything else, as one optimiser."""

import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of the quintic, as published with Muon; so is the number of iterations
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): steps of singular values about 1.

    As `torch.optim.Muon` with Nesterov's momentum, but for the precision: that one multiplies in bfloat16 wherever it
    runs, which on a CPU without instructions for it can take several times as long as the rest of a training step.
    Here that is float32 on CPUs.

    Args:
        params: matrices.
        lr: learning rate.
        weight_decay: decoupled.
        momentum: share of the former mean of the gradients that is kept.
        is_like_adamw: steps have the size of AdamW's (Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2),
            so that a learning rate for AdamW suits. Otherwise the step of a matrix of O outputs and I inputs is
            `max(1, O / I) ** 0.5` times as large as said above.

    Raises:
        ValueError: a parameter is no matrix.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        is_like_adamw: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.is_like_adamw = is_like_adamw
        for parameter in chain.from_iterable(group["params"] for group in self.param_groups):
            if parameter.ndim != 2:
                raise ValueError(f"parameter of shape {tuple(parameter.shape)}: expected a matrix, for Muon.")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """A step for every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalized(parameter.grad.lerp(mean, group["momentum"]))
                rows, columns = parameter.shape
                size = 0.2 * math.sqrt(max(rows, columns)) if self.is_like_adamw else math.sqrt(max(1, rows / columns))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * size)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """`(O, I)` to a matrix of the same singular vectors whose singular values are near 1 (Newton-Schulz iterations).

    On CPUs in float32, and at the size of the smaller side: an iteration multiplies X from the left by a polynomial of
    X X^T, and the polynomials are gathered first, a third of the operations for a matrix nine times as wide as high.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    is_on_cpu = matrix.device.type == "cpu"
    x = matrix.float() if is_on_cpu else matrix.bfloat16()
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    if is_on_cpu:
        gram = x @ x.T
        gathered = unit = torch.eye(len(x))
        for _ in range(ITERATIONS):
            polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c) + a * unit
            gathered, gram = polynomial @ gathered, polynomial @ gram @ polynomial
        x = gathered @ x
    else:
        for _ in range(ITERATIONS):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).to(matrix.dtype)


class MuonWithAdamW(torch.optim.Optimizer):
    """`Muon` for some parameters and `torch.optim.AdamW` for others, at one learning rate for AdamW.

    Args:
        matrices: parameters of two dimensions, for Muon.
        others: parameters for AdamW.
        lr: learning rate.
        betas: of AdamW.
        weight_decay: of both, decoupled.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        others: Iterable[torch.nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        matrices, others = list(matrices), list(others)
        super().__init__([*matrices, *others], {"lr": lr})
        self.parts: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(matrices, lr=lr, weight_decay=weight_decay, is_like_adamw=True),
            "adamw": torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=True),
        }
        self._share_groups()

    def _share_groups(self) -> None:
        """The groups are those of the parts, so that a change of the learning rate reaches them."""
        self.param_groups = list(chain.from_iterable(part.param_groups for part in self.parts.values()))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """A step of both parts.

        Raises:
            ValueError: a closure is given.
        """
        if closure is not None:
            raise ValueError("MuonWithAdamW takes no closure.")
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self._share_groups()
