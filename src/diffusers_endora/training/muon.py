"""Muon for the weight matrices of the blocks, AdamW for everything else, as one optimiser."""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for some parameters and `torch.optim.AdamW` for others, at one learning rate.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) takes steps whose singular values are all
    about 1, here scaled to the size of AdamW's steps (Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2),
    so that a learning rate for AdamW suits both.

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
            "muon": torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
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
