"""The moving average is the official one, with a warm-up on request."""

import pytest
import torch

from diffusers_endora.training.ema import MovingAverage


def parameters(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, generator=generator), torch.randn(5, generator=generator)]


def test_it_is_the_recurrence_of_the_official_code_from_the_first_step_on():
    expected = [value.double() for value in parameters(0)]
    ema = MovingAverage(parameters(0), decay=0.9)
    for seed in range(1, 8):
        ema.step(parameters(seed))
        expected = [0.9 * mean + 0.1 * value.double() for mean, value in zip(expected, parameters(seed), strict=True)]
    for average, mean in zip(ema.average, expected, strict=True):
        torch.testing.assert_close(average.double(), mean, rtol=1e-6, atol=1e-6)


def test_warm_up_forgets_the_initial_weights():
    slow, fast = MovingAverage(parameters(0), 0.9999), MovingAverage(parameters(0), 0.9999, warm_up=True)
    for _ in range(100):
        slow.step(parameters(1))
        fast.step(parameters(1))
    first, last = parameters(0)[0], parameters(1)[0]
    assert ((slow.average[0] - first).norm() / (last - first).norm()).item() == pytest.approx(
        1 - 0.9999**100, rel=1e-3
    )
    torch.testing.assert_close(fast.average[0], last, rtol=0, atol=1e-5)


def test_swapping_is_exact_and_undone_after_an_error():
    model, ema = parameters(0), MovingAverage(parameters(0), 0.5)
    ema.step(parameters(1))
    average = [value.clone() for value in ema.average]

    def run() -> None:
        with ema.swapped_into(model):
            assert all(torch.equal(value, mean) for value, mean in zip(model, average, strict=True))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert all(torch.equal(value, before) for value, before in zip(model, parameters(0), strict=True))
    assert all(torch.equal(value, mean) for value, mean in zip(ema.average, average, strict=True))


def test_loading_goes_on_exactly():
    straight, stopped = (MovingAverage(parameters(0), 0.99, warm_up=True) for _ in range(2))
    for seed in (1, 2):
        straight.step(parameters(seed))
        stopped.step(parameters(seed))
    resumed = MovingAverage(parameters(9), 0.99, warm_up=True)
    resumed.load(stopped.full_tensors(), stopped.num_steps)
    for average in (straight, resumed):
        average.step(parameters(3))
    assert all(torch.equal(a, b) for a, b in zip(straight.average, resumed.average, strict=True))
    with pytest.raises(ValueError, match=r"shape \(5,\): expected \(3, 2\)"):
        resumed.load(reversed(stopped.full_tensors()), 2)


def test_decay_outside_0_to_1():
    with pytest.raises(ValueError, match=r"decay=1.5: expected a number in \[0, 1\]"):
        MovingAverage(parameters(0), 1.5)
