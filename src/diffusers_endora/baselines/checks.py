"""Checks of arguments that the calls of several pipelines take."""

from typing import Any

import torch


def require_generators(generator: Any, batch_size: int) -> None:
    """Raises a ValueError of one sentence if `generator` is not None, one generator, or a list with one per clip."""
    generators = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(of, torch.Generator) for of in generators):
        raise ValueError(
            f"generator is a {type(generator).__name__}: expected a torch.Generator, or a list with one for each clip."
        )
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"{len(generator)} generators for batch_size={batch_size}: expected one for each clip.")


def numbers_of(name: str, value: Any) -> torch.Tensor:
    """A number, a sequence of numbers or a tensor, as a tensor; a ValueError of one sentence for anything else."""
    try:
        return torch.as_tensor(value if isinstance(value, torch.Tensor | int | float) else list(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}={value!r}: expected numbers ({error}).") from error
