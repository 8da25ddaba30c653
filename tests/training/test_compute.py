"""Operations of a training: of a script whose number of operations is known."""

import pytest
import torch

from diffusers_endora.training.compute import OperationCounter, count_training, steps_of

# 2 x 8 x 4 x 4 operations once, three products of 2 x 4 x 4 x 4 a step (forwards, and backwards to both sides), a
# fourth every 16th step, from the first on
SCRIPT = """
import argparse
from pathlib import Path
import torch
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=Path)
parser.add_argument("--max_train_steps", type=int)
args = parser.parse_args()
if args.max_train_steps == 13:
    raise SystemExit("script.py: error: an unlucky number.")
args.output_dir.mkdir(parents=True)
torch.ones(8, 4) @ torch.ones(4, 4)
weight, clip = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
for step in range(args.max_train_steps):
    (weight @ clip).sum().backward()
    if step % 16 == 0:
        weight @ clip
"""


@pytest.fixture
def script(tmp_path) -> str:
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def command(script: str, steps: int) -> list[str]:
    return [script, "--output_dir", "{output}", "--max_train_steps", str(steps)]


@pytest.mark.slow
def test_a_long_training_is_counted_by_its_first_steps(script):
    once, product = 2 * 8 * 4 * 4, 2 * 4 * 4 * 4
    assert count_training(command(script, 161)) == once + product + 3 * 161 * product + 10 * product


def test_gradients_of_gradients_are_counted():
    weight, clip = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    with OperationCounter() as counter:
        score = torch.nn.Sequential(torch.nn.Identity())(weight @ clip).square().sum()
        (gradient,) = torch.autograd.grad(score, clip, create_graph=True)  # a product
        gradient.square().sum().backward()  # two of that product, two of the first
    assert counter.total == 6 * 2 * 4 * 4 * 4


def test_a_script_that_fails_says_why(script):
    with pytest.raises(ValueError, match=r"does not run for 13 steps: script.py: error: an unlucky number\."):
        count_training(command(script, 13))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.py --output_dir {output}", "expected one of --max_train_steps and --autoencoder_steps with a number"),
        (
            "a.py --output_dir {output} --max_train_steps",
            "expected one of --max_train_steps and --autoencoder_steps with a number",
        ),
        (
            "a.py --output_dir {output} --max_train_steps many",
            "expected one of --max_train_steps and --autoencoder_steps with a number",
        ),
        (
            "a.py --output_dir {output} --autoencoder_steps 9 --max_train_steps 9",
            "expected one of --max_train_steps and",
        ),
        ("a.py --output_dir here --max_train_steps 9", "expected {output} where the folder goes"),
        ("a.py --output_dir {output} --max_train_steps 9 --push_to_hub", "expected no --push_to_hub"),
    ],
)
def test_commands_that_do_not_say_enough_are_refused(line, message):
    with pytest.raises(ValueError, match=message):
        steps_of(line.split())


def test_stages_have_their_own_flag():
    assert steps_of(["a.py", "--autoencoder_steps", "12", "--output_dir", "{output}"]) == 12
