"""Which checkpoints a training goes on from."""

import json
from types import SimpleNamespace

import pytest

from diffusers_endora.training.trainer import Trainer
from diffusers_endora.training.training_run import TrainingRun


class Run(TrainingRun):
    facts_of_earlier_versions = Trainer.facts_of_earlier_versions

    def facts(self):
        return {"clips_per_step": 4, "optimizer": self.args.optimizer, "max_grad_norm": 1.0}


def go_on(folder, facts, optimizer="adamw", max_train_steps=2):
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "run.json").write_text(json.dumps({"facts": facts, "step": 2}))
    args = SimpleNamespace(output_dir=folder, optimizer=optimizer)
    return Run(args, SimpleNamespace(print=print), None, max_train_steps).state_of_same_run(checkpoint)


def test_checkpoints_of_earlier_versions_go_on(tmp_path, capsys):
    assert go_on(tmp_path, {"clips_per_step": 4})["step"] == 2
    assert "does not say what these were, taken to be as now: ['max_grad_norm']" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"checkpoint-2 is of another training: optimizer was adamw and is muon\.$"):
        go_on(tmp_path, {"clips_per_step": 4}, optimizer="muon")


def test_what_differs_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"clips_per_step was 8 and is 4, max_grad_norm was 2 and is 1\.0\.$"):
        go_on(tmp_path, {"clips_per_step": 8, "optimizer": "adamw", "max_grad_norm": 2})


def test_checkpoints_beyond_the_training_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="checkpoint-2 is of step 2, beyond the 1 steps of the training; ask for more"
    ):
        go_on(tmp_path, {"clips_per_step": 4}, max_train_steps=1)
