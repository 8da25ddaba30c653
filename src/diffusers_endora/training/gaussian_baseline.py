"""What a predictor that knows only the mean and variance of each latent would score: the floor of a useful model."""

from typing import Any

import torch


class GaussianBaseline:
    """The prediction error of the best predictor for independent Gaussian latents.

    Every latent element (channel, row, column) is modelled as N(mu, v), with moments over all frames seen. For
    x_t = a x_0 + b eps, the posterior mean of any c x_0 + d eps is then the optimal prediction, and its expected
    squared error the posterior variance (a d - b c)^2 v / (a^2 v + b^2) (Bishop 2006, eq. 2.113-2.117). A diffusion
    model that does not score well below it has not learned what the frames look like.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sum: torch.Tensor | None = None
        self.sum_of_squares: torch.Tensor | None = None

    def update(self, latents: torch.Tensor) -> None:
        """Adds the frames of latents `(B, C, F, h, w)`; stays on their device and does not synchronise with it."""
        frames = latents.detach().transpose(1, 2).flatten(0, 1)
        frames = frames.float() if frames.device.type == "mps" else frames.double()  # MPS has no float64
        self.count += len(frames)
        if self.sum is None or self.sum_of_squares is None:
            self.sum, self.sum_of_squares = torch.zeros_like(frames[0]), torch.zeros_like(frames[0])
        self.sum = self.sum.to(frames) + frames.sum(0)  # after a resume the sums lie on the CPU
        self.sum_of_squares = self.sum_of_squares.to(frames) + frames.square().sum(0)

    def gathered(self, accelerator: Any) -> "GaussianBaseline":
        """One with the frames of all processes; all of them call it, after an `update`."""
        both = GaussianBaseline()
        if self.sum is not None and self.sum_of_squares is not None:
            count = torch.tensor(float(self.count), dtype=self.sum.dtype, device=accelerator.device)
            sums = [value.to(accelerator.device) for value in (count, self.sum, self.sum_of_squares)]
            count, both.sum, both.sum_of_squares = (accelerator.reduce(value, reduction="sum") for value in sums)
            both.count = round(count.item())
        return both

    def expected_error(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> float:
        """Mean squared error per element, over positions and timesteps.

        Args:
            a, b, c, d: `(T,)` each, what the model sees, a x_0 + b eps, and is to predict, c x_0 + d eps.

        Raises:
            ValueError: before the first `update`.
        """
        if self.count == 0 or self.sum is None or self.sum_of_squares is None:
            raise ValueError("GaussianBaseline has seen no latents: call update first.")
        mean = self.sum / self.count
        variance = (self.sum_of_squares / self.count - mean.square()).clamp(min=0).flatten()
        a, b, c, d = (value.to(variance)[:, None] for value in (a, b, c, d))
        return (variance * (a * d - b * c).square() / (a.square() * variance + b.square())).mean().item()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The moments, for a checkpoint; empty before the first `update`."""
        if self.sum is None or self.sum_of_squares is None:
            return {}
        sums = {"sum": self.sum, "sum_of_squares": self.sum_of_squares}
        return {"count": torch.tensor(self.count)} | {name: value.contiguous() for name, value in sums.items()}

    def clear(self) -> None:
        """Forgets the frames that it has seen, but not of what shape they are."""
        self.count = 0
        for sums in (self.sum, self.sum_of_squares):
            if sums is not None:
                sums.zero_()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Takes the moments of `state_dict`, on any device."""
        if state:
            self.count = int(state["count"])
            self.sum, self.sum_of_squares = state["sum"], state["sum_of_squares"]
