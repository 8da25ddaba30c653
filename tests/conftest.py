"""Fixtures shared by the tests: official numbers, real clips and a real VAE, where they are at hand."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_endora import cli

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_path(relative: str) -> Path:
    """A file or folder of the shared test material; the calling test is skipped where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs ../shared/{relative}, which is not on this machine")
    return path


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Outputs of the official implementation; see ../shared/golden/README.md for the keys."""
    return load_file(shared_path("golden/expected.safetensors"))


@pytest.fixture(scope="session")
def golden_dino_tokens() -> list[torch.Tensor]:
    """Stand-ins for the tokens of DINO blocks 2, 5, 8, 11: a list of 4 float32 tensors `(24, 256, 384)`."""
    tokens = load_file(shared_path("golden/dino_tokens.safetensors"))
    return [tokens[f"layer{layer}"].float() for layer in (2, 5, 8, 11)]


@pytest.fixture
def official_checkpoint():
    """Returns `name -> path` of an official checkpoint: `unconditional`, `sequential`, `class_conditional`."""
    return lambda name: shared_path(f"golden/official_{name}.pt")


@pytest.fixture
def shared_file():
    """Returns `relative -> path` into ../shared; the test is skipped where it is absent."""
    return shared_path


@pytest.fixture
def endora(monkeypatch, capsys):
    """Runs `endora ...` in this process: `endora(*arguments) -> (exit code, stdout, stderr)`."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["endora", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run
