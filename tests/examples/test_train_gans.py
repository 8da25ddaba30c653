"""The scripts that train the GANs, on small networks: what they write, how they resume, what they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from script_runs import EXAMPLES, as_flags, read_log, run_main

from diffusers_endora import MoStGANVPipeline, StyleGANVPipeline
from diffusers_endora.baselines.gan_arguments import parse_gan_arguments
from diffusers_endora.baselines.gan_recipes import MOSTGAN_V, STYLEGAN_V
from diffusers_endora.data.video_io import read_video_info

TRAIN_STYLEGAN_V, TRAIN_MOSTGAN_V = EXAMPLES / "train_stylegan_v.py", EXAMPLES / "train_mostgan_v.py"
WEIGHTS = "generator/diffusion_pytorch_model.safetensors"


def arguments(material: dict[str, str], output_dir: Path | None, **changes) -> list[str]:
    options = {
        "train_data_dir": material["videos"],
        "output_dir": output_dir,
        "preset": "demo",
        "resolution": 32,
        "channel_base": 64,
        "channel_max": 4,
        "code_dim": 8,
        "train_batch_size": 2,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "validation_steps": 4,
        "num_validation_clips": 3,
        "dataloader_num_workers": 0,
        **changes,
    }
    return as_flags(options)


def refusal(script: Path, flags: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit code and stderr of a run that ends at once."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(script, flags)
    return ended.value.code, capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory) -> Path:
    """A class-conditional StyleGAN-V."""
    output_dir = tmp_path_factory.mktemp("trained") / "out"
    run_main(TRAIN_STYLEGAN_V, arguments(material, output_dir, class_conditional=True))
    return output_dir


def test_ends_with_a_pipeline_of_the_averaged_generator(trained):
    pipe = StyleGANVPipeline.from_pretrained(trained)
    frames = pipe(class_labels=[0, 1], output_type="np").frames
    assert frames.shape == (2, 16, 32, 32, 3)
    assert pipe.generator.config.num_classes == 2
    saved, average = load_file(trained / WEIGHTS), load_file(trained / "checkpoint-4" / "ema.safetensors")
    last = load_file(trained / "checkpoint-4" / "generator.safetensors")
    assert all(torch.equal(saved[name], average[name]) for name in average)
    assert not torch.equal(saved["const"], last["const"])
    assert torch.equal(saved["mean_w"], last["mean_w"])


def test_validation_shows_the_fixed_clips_of_the_average(trained):
    folder = trained / "validation" / "step-4"
    assert (folder / "contact_sheet.png").is_file()
    infos = [read_video_info(folder / f"clip_{index}.mp4") for index in range(3)]
    assert [(info.num_frames, info.height) for info in infos] == [(16, 32)] * 3


def test_says_what_it_did(trained):
    facts = json.loads((trained / "training.json").read_text())
    assert facts["class_names"] == ["a", "b"]
    assert facts["arguments"]["resolution"] == 32
    results = facts["results"]
    assert (results["steps"], results["clips_seen"], results["averaged_steps"]) == (4, 8, 4)
    assert results["seconds"] > 0
    lines = read_log(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert results["generator_loss"] == pytest.approx(np.mean([line["generator_loss"] for line in lines]))
    assert results["num_discriminator_parameters"] > 0
    assert not (trained / "discriminator").exists()  # it is in checkpoints alone
    assert "[StyleGAN-V](https://arxiv.org/abs/2112.14683)" in (trained / "README.md").read_text()


def test_resumes_from_its_latest_checkpoint(material, trained, tmp_path, capsys):
    output_dir = tmp_path / "out"
    flags = {"class_conditional": True, "checkpointing_steps": 2}
    run_main(TRAIN_STYLEGAN_V, arguments(material, output_dir, **flags, max_train_steps=2))
    run_main(TRAIN_STYLEGAN_V, arguments(material, output_dir, **flags, resume_from_checkpoint="latest"))
    assert "Resumed from" in capsys.readouterr().out
    one, other = load_file(output_dir / WEIGHTS), load_file(trained / WEIGHTS)
    assert all(torch.equal(one[name], other[name]) for name in other)
    code, error = refusal(TRAIN_STYLEGAN_V, arguments(material, output_dir, **flags), capsys)
    assert code == 1
    assert "has the checkpoints of a training, up to checkpoint-4" in error


def test_mostgan_v_trains_with_a_preset_in_a_config(material, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("preset: demo\nresolution: 32\nmax_train_steps: 1\nr1_gamma: 2.5\n")
    flags = arguments(material, tmp_path / "out", preset=None, resolution=None, max_train_steps=None, config=config)
    run_main(TRAIN_MOSTGAN_V, flags)
    frames = MoStGANVPipeline.from_pretrained(tmp_path / "out")(num_frames=5, output_type="pt").frames
    assert frames.shape == (1, 5, 3, 32, 32)
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["results"]["r1_gamma"] == 2.5
    assert facts["arguments"]["ema_rampup"] == 0.05  # the preset's
    assert "1 steps, R1 gamma 2.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_data_dir": None}, "give --train_data_dir or --dataset_name."),
        ({"output_dir": None}, "--output_dir is required."),
        ({"resolution": 48}, "--resolution 48: expected a power of 2 from 32."),
        ({"resolution": 16}, "--resolution 16: expected a power of 2 from 32."),
        ({"num_frames": 2}, "--num_frames 2: expected 3 or more, as the discriminator sees so many."),
        ({"train_batch_size": 6}, "--train_batch_size 6: expected at most 4 or a multiple of it"),
        ({"train_batch_size": 0}, "--train_batch_size 0: expected a positive integer."),
        ({"r1_gamma": -1}, "--r1_gamma -1.0: expected 0 or more."),
        ({"augmentation_target": 2}, "--augmentation_target 2.0: expected a number from -1 to 1."),
        ({"ema_kimg": 0}, "--ema_kimg 0.0: expected a positive number."),
        ({"seed": -1}, "--seed -1: expected 0 or more."),
        ({"mixed_precision": "fp16"}, "argument --mixed_precision: invalid choice: 'fp16'"),
        ({"push_to_hub": True}, "--push_to_hub needs --hub_model_id."),
        ({"validation_fvd": 4}, "--validation_fvd needs held-out videos"),
        ({"num_still_images": 8}, "unrecognized arguments: --num_still_images 8"),
    ],
)
def test_flags_that_do_not_fit_are_refused(material, tmp_path, capsys, changes, sentence):
    code, error = refusal(TRAIN_MOSTGAN_V, arguments(material, **{"output_dir": tmp_path / "out", **changes}), capsys)
    assert code == 2
    assert sentence in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_data_dir": "nowhere"}, "train_stylegan_v.py: error: nowhere: expected a folder with videos"),
        ({"channel_base": 32}, "train_stylegan_v.py: error: channel_base=32: expected at least"),
        (
            {"resume_from_checkpoint": "checkpoint-7"},
            "train_stylegan_v.py: error: resume_from_checkpoint=checkpoint-7",
        ),
        ({"learning_rate": 1e30}, "train_stylegan_v.py: error: step 1: the loss of the discriminator or its"),
    ],
)
def test_what_goes_wrong_is_one_sentence(material, tmp_path, capsys, changes, sentence):
    code, error = refusal(TRAIN_STYLEGAN_V, arguments(material, tmp_path / "out", **changes), capsys)
    assert code == 1
    assert sentence in error.splitlines()[-1]
    assert not list(tmp_path.glob("out/checkpoint-*"))
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_the_defaults_are_the_official_configuration():
    args = parse_gan_arguments(STYLEGAN_V, ["--train_data_dir=VIDEOS", "--output_dir=OUT"])
    assert (args.resolution, args.num_frames, args.train_batch_size, args.learning_rate) == (128, 16, 64, 0.0025)
    assert (args.channel_base, args.channel_max, args.code_dim, args.motion_z_distance) == (16384, 512, 512, 16)
    assert (args.augmentation, args.augmentation_target, args.augmentation_clips) == (True, 0.6, 100_000)
    assert (args.r1_gamma, args.ema_rampup, args.initial_contrast) == (None, None, 1)
    demo = parse_gan_arguments(
        STYLEGAN_V, ["--train_data_dir=VIDEOS", "--output_dir=OUT", "--preset=demo", "--code_dim=32"]
    )
    assert (demo.resolution, demo.code_dim, demo.r1_gamma, demo.ema_rampup) == (64, 32, 2, 0.05)
    assert (demo.augmentation, demo.max_train_steps) == (False, STYLEGAN_V.demo_steps)
    demo = parse_gan_arguments(MOSTGAN_V, ["--train_data_dir=VIDEOS", "--output_dir=OUT", "--preset=demo"])
    assert demo.max_train_steps == MOSTGAN_V.demo_steps != STYLEGAN_V.demo_steps
    more = ["--preset=demo", "--augmentation", "--initial_contrast=0.5"]
    demo = parse_gan_arguments(STYLEGAN_V, ["--train_data_dir=VIDEOS", "--output_dir=OUT", *more])
    assert (demo.augmentation, demo.initial_contrast) == (True, 0.5)


@pytest.mark.slow
def test_a_fresh_process_loads_the_pipeline(trained):
    program = (
        "from diffusers_endora import StyleGANVPipeline; "
        f"print(StyleGANVPipeline.from_pretrained({str(trained)!r})(class_labels=1, output_type='np').frames.shape)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.strip() == "(1, 16, 32, 32, 3)"


@pytest.mark.slow
def test_processes_share_out_a_step_and_stay_alike(material, tmp_path):
    """Two processes end with the same weights, as they average their gradients."""
    program = tmp_path / "two.py"
    program.write_text(f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import train_stylegan_v
from accelerate.utils import gather_object
from diffusers_endora.baselines.gan_trainer import GANTrainer
from diffusers_endora.metrics.feature_extractors import hash_weights

results = GANTrainer.results

def compared(self):
    if self.step:
        hashes = gather_object([hash_weights(self.generator.mapping) + hash_weights(self.discriminator)])
        print("ALIKE" if len(set(hashes)) == 1 else "APART", len(hashes))
    return results(self)

GANTrainer.results = compared
train_stylegan_v.main()
""")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    run = subprocess.run(
        [*launch, *arguments(material, tmp_path / "out", train_batch_size=1, max_train_steps=3)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("ALIKE 2") == 2
    results = json.loads((tmp_path / "out" / "training.json").read_text())["results"]
    assert (results["num_processes"], results["clips_seen"]) == (2, 6)
    assert [line["step"] for line in read_log(tmp_path / "out")] == [1, 2, 3]
