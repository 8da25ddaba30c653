"""The moving average of the weights that sampling uses."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from .sharding import full_tensor


class MovingAverage:
    """Exponential moving average of parameters: after each step `average += (1 - decay) (parameters - average)`.

    It starts at the parameters' initial values, as officially. (`diffusers.training_utils.EMAModel` replaces the
    average by the parameters in its first step and keeps its decay below step / (step + 10).)

    Args:
        parameters: of the model, in the order that all methods get them in. Sharded ones (`DTensor`) are averaged
            shard by shard, those of 16 bits in float32.
        decay: in [0, 1]; the paper's is 0.9999.
        warm_up: begin with less: at step n the decay is at most n / (n + 10), so that a short training forgets its
            initial weights.
        device: where the average is kept, the parameters' own by default; "cpu" saves their memory on a GPU.

    Raises:
        ValueError: for a decay outside [0, 1].
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        decay: float = 0.9999,
        warm_up: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay}: expected a number in [0, 1].")
        self.decay = decay
        self.warm_up = warm_up
        self.num_steps = 0
        self.average = [p.detach().to(device=device, dtype=torch.float32, copy=True) for p in parameters]

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.Tensor]) -> None:
        """Counts the parameters in; does not wait for their device, unless the average is kept on another."""
        self.num_steps += 1
        decay = min(self.decay, self.num_steps / (self.num_steps + 10)) if self.warm_up else self.decay
        current = [parameter.detach() for parameter in parameters]
        alike = all(a.device == b.device and a.dtype == b.dtype for a, b in zip(self.average, current, strict=True))
        if not alike:
            for average, parameter in zip(self.average, current, strict=True):  # one at a time: no second copy of all
                average.lerp_(parameter.to(average), 1 - decay)
        else:
            torch._foreach_lerp_(self.average, current, 1 - decay)

    @contextmanager
    def swapped_into(self, parameters: Iterable[torch.Tensor]) -> Iterator[None]:
        """The parameters are the average while this lasts; tensor by tensor, so that it takes no further memory."""
        parameters = list(parameters)
        # parameters of 16 bits would not give the average back as it was
        is_rounded = any(a.dtype != p.dtype for a, p in zip(self.average, parameters, strict=True))
        exact = [average.clone() for average in self.average] if is_rounded else self.average
        self._swap(parameters)
        try:
            yield
        finally:
            self._swap(parameters)
            self.average = exact

    @torch.no_grad()
    def _swap(self, parameters: list[torch.Tensor]) -> None:
        for average, parameter in zip(self.average, parameters, strict=True):
            kept = average.to(parameter, copy=True)
            average.copy_(parameter)
            parameter.copy_(kept)

    def full_tensors(self) -> list[torch.Tensor]:
        """The average on the CPU, shards put together: a collective call where there are any."""
        return [full_tensor(average) for average in self.average]

    @torch.no_grad()
    def load(self, full_tensors: Iterable[torch.Tensor], num_steps: int) -> None:
        """Goes on from what `full_tensors` gave after `num_steps` steps.

        Raises:
            ValueError: for tensors of other shapes.
        """
        for average, tensor in zip(self.average, full_tensors, strict=True):
            if average.shape != tensor.shape:
                raise ValueError(f"a tensor has shape {tuple(tensor.shape)}: expected {tuple(average.shape)}.")
            if isinstance(average, DTensor):
                mesh = average.device_mesh
                tensor = distribute_tensor(tensor.to(mesh.device_type), mesh, average.placements)
            average.copy_(tensor)
        self.num_steps = num_steps
