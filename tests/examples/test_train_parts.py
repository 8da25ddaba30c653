"""The examples that make the parts of a model: teacher and autoencoder."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from script_runs import EXAMPLES, run_main
from transformers import ViTModel

from diffusers_endora.data.phantom import render_phantom_clip
from diffusers_endora.data.video_io import read_frames
from diffusers_endora.models.autoencoder import load_vae
from diffusers_endora.training.checkpoints import seal
from diffusers_endora.training.dino_prior import DinoPrior


def run(script, **options):
    flags = [part for name, value in options.items() for part in (f"--{name}", *str(value).split())]
    run_main(EXAMPLES / script, flags)


def weights(network):
    return torch.cat([value.flatten().float() for value in network.state_dict().values()])


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_teacher.py", "train_autoencoder.py"])
def test_two_processes_are_refused(script, material, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, EXAMPLES / script, "--train_data_dir", material["videos"], "--output_dir", tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode != 0
    assert f"{script}: error: 2 processes; it is made for one." in run.stderr
    assert not (tmp_path / "out").exists()


def test_train_teacher_and_resume(material, tmp_path):
    options = {
        "train_data_dir": material["videos"],
        "validation_data_dir": material["videos"],
        "resolution": 32,
        "width": 16,
        "num_heads": 2,
        "num_layers": 12,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
    }
    run("train_teacher.py", output_dir=tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run("train_teacher.py", output_dir=tmp_path / "resumed", **options)
    whole, resumed = (
        ViTModel.from_pretrained(tmp_path / name, add_pooling_layer=False) for name in ("whole", "resumed")
    )
    assert torch.equal(weights(whole), weights(resumed))
    facts = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert facts["nearest_neighbour_accuracy"].keys() == {"teacher", "untrained", "pixels"}
    prior = DinoPrior.from_pretrained(tmp_path / "whole", num_layers=4, student_width=16)
    assert prior.extract(torch.zeros(1, 2, 3, 32, 32))[0].shape == (1, 2, 16, 16)


def test_train_autoencoder_then_its_decoder_and_resume(material, tmp_path, capsys):
    options = {
        "train_data_dir": material["videos"],
        "validation_data_dir": material["videos"],
        "resolution": 64,
        "train_batch_size": 1,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
    }

    def train(**more):
        run("train_autoencoder.py", output_dir=tmp_path / "whole", **options, **more)
        shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
        run("train_autoencoder.py", output_dir=tmp_path / "resumed", **options, **more)
        whole, resumed = (load_vae(tmp_path / name) for name in ("whole", "resumed"))
        assert torch.equal(weights(whole), weights(resumed))
        assert whole.config.scaling_factor != 0.18215
        assert json.loads((tmp_path / "whole" / "training.json").read_text())["held_out_psnr_db"]["mean"] > 0
        assert (tmp_path / "whole" / "reconstruction.png").exists()
        return whole

    first = train(block_out_channels="8 16")
    assert "texture" not in capsys.readouterr().out
    with torch.no_grad():
        latents = first.encode(torch.rand(8, 3, 64, 64) * 2 - 1).latent_dist.mode()
    assert latents.shape == (8, 16, 32, 32)

    (tmp_path / "whole").rename(tmp_path / "first")
    shutil.rmtree(tmp_path / "resumed")
    second = train(pretrained_vae=tmp_path / "first", decoder_only="")
    assert "l1" in (printed := capsys.readouterr().out)
    assert "texture" in printed
    changed = {
        name for name, weight in second.state_dict().items() if not torch.equal(weight, first.state_dict()[name])
    }
    assert {name.split(".")[0] for name in changed} == {"decoder", "post_quant_conv"}
    assert len(changed) > 0.9 * len(second.decoder.state_dict())  # by Muon and by Adam


def test_rate_noise_and_psnr_of_the_autoencoder(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from train_autoencoder import peak_signal_to_noise_ratio, rate_at, with_noise

    rates = [rate_at(step, 600) for step in (0, 59, 399, 500, 599, 600)]
    assert rates == pytest.approx([1 / 60, 1, 1, 0.5, 0.005, 0])
    latents = 3 * torch.randn(2000, 4, 4, 4)
    deviations = (with_noise(latents, 0.25) - latents).std((1, 2, 3)) / 3
    assert deviations.square().mean().sqrt() == pytest.approx(0.25, rel=0.05)
    assert deviations.min() < 0.01  # each picture its own
    given = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 5.0)])  # the latter is cut to 1
    ratios = peak_signal_to_noise_ratio(given, torch.zeros(2, 3, 4, 4))
    torch.testing.assert_close(ratios, torch.tensor([20.0, 6.0206]))


def test_a_second_training_of_the_autoencoder_drops_unused_channels(material, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from train_autoencoder import load_pretrained, without_unused_channels

    options = {"train_data_dir": material["videos"], "resolution": 32, "train_batch_size": 2}
    first, second = tmp_path / "first", tmp_path / "second"
    sizes = {"block_out_channels": "8 8", "latent_channels": 4}
    run("train_autoencoder.py", **options, **sizes, output_dir=first, max_train_steps=2)
    assert "half" not in capsys.readouterr().out

    vae = load_pretrained(first, 32)
    frames = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -20
        vae.quant_conv.weight[4:] = 0  # all certain
        # channel 1, mean and variance, tells nothing of the picture; the decoder hears it
        vae.quant_conv.weight[[1, 5]] = 0.0
        vae.quant_conv.bias[[1, 5]] = 0.3
        vae.post_quant_conv.weight.add_(torch.eye(4)[:, :, None, None])
    vae.save_pretrained(first)
    fewer = without_unused_channels(vae, frames)
    assert fewer.config.latent_channels == 3
    with torch.no_grad():
        pixels = frames / 127.5 - 1
        latents = vae.encode(pixels).latent_dist.mode()
        kept = latents[:, [0, 2, 3]]
        torch.testing.assert_close(fewer.encode(pixels).latent_dist.mode(), kept, atol=1e-5, rtol=1e-4)
        decoded = [of.decoder.conv_in(of.post_quant_conv(z)) for of, z in ((vae, latents), (fewer, kept))]
    torch.testing.assert_close(*(hidden[..., 1:-1, 1:-1] for hidden in decoded), atol=1e-5, rtol=1e-4)
    assert without_unused_channels(fewer, frames) is fewer
    torch.nn.init.zeros_(vae.quant_conv.weight)
    with pytest.raises(ValueError, match="none of the latent channels tells anything"):
        without_unused_channels(vae, frames)

    run("train_autoencoder.py", **options, output_dir=second, max_train_steps=2, pretrained_vae=first)
    printed = capsys.readouterr().out
    assert "3 latent channels are used" in printed
    assert "half 0." in printed
    assert load_vae(second).config.latent_channels == 3
    with pytest.raises(SystemExit, match="--resolution 36: expected a multiple of 8 pixels for"):
        run("train_autoencoder.py", **options | {"resolution": 36}, output_dir=tmp_path / "out", pretrained_vae=first)


@pytest.mark.parametrize("script", ["train_teacher.py", "train_autoencoder.py"])
def test_another_training_in_the_folder_is_refused(script, material, tmp_path):
    options = {"train_data_dir": material["videos"], "resolution": 32, "train_batch_size": 2, "output_dir": tmp_path}
    options |= {"width": 12} if "teacher" in script else {"block_out_channels": "8 8"}
    run(script, max_train_steps=1, **options)
    with pytest.raises(SystemExit, match=r"--max_train_steps was 1 and is 2\); choose another output folder"):
        run(script, max_train_steps=2, **options)
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit, match="all of 1 checkpoints are damaged"):
        run(script, max_train_steps=1, **options)
    (tmp_path / "checkpoint-1").rename(tmp_path / "checkpoint-2")
    for path in (tmp_path / "checkpoint-2").iterdir():
        path.unlink()
    seal(tmp_path / "checkpoint-2")  # whole, and not of these scripts
    with pytest.raises(SystemExit, match="checkpoint-2 is of another training; choose another output folder"):
        run(script, max_train_steps=1, **options)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("train_teacher.py", {"resolution": 30}, "--resolution 30: expected a multiple of 8 pixels, 32 or more"),
        ("train_teacher.py", {"checkpointing_steps": 0}, "--checkpointing_steps 0: expected a positive integer"),
        ("train_teacher.py", {"train_batch_size": 1}, "--train_batch_size 1: expected 2 or more"),
        ("train_teacher.py", {"resolution": 32, "hidden_share": 0.05}, "--hidden_share 0.05: expected a share of 9"),
        ("train_teacher.py", {"width": 10}, "--width 10: expected a multiple of --num_heads 3"),
        ("train_autoencoder.py", {"resolution": 48}, "--resolution 48: expected a multiple of 32 pixels, 32 or more"),
        ("train_autoencoder.py", {"block_out_channels": "12 16"}, "--block_out_channels 12: expected multiples of 8"),
        ("train_autoencoder.py", {"decoder_only": ""}, "--decoder_only needs --pretrained_vae"),
        ("train_autoencoder.py", {"max_train_steps": 0}, "--max_train_steps 0: expected a positive integer"),
    ],
)
def test_wrong_flags(script, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(script, train_data_dir=tmp_path, output_dir=tmp_path / "out", **options)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["train_teacher.py", "train_autoencoder.py"])
def test_no_videos(script, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*there is none"):
        run(script, train_data_dir=tmp_path / "absent", output_dir=tmp_path / "out")


@pytest.mark.slow
def test_render_phantom_takes_the_seeds_of_a_split(tmp_path):
    options = ["--split", "test", "--num_frames", "2", "--size", "16", "--num_processes", "1"]
    script, flags = EXAMPLES / "render_phantom.py", ["--output_dir", str(tmp_path), *options]
    command = [sys.executable, str(script), *flags]  # its processes import it
    subprocess.run([*command, "--num_videos", "2"], check=True)
    paths = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.mp4"))
    assert paths == ["lumen/lumen_000009.mp4", "polyp/polyp_000019.mp4"]
    stamp = (tmp_path / paths[0]).stat().st_mtime_ns
    subprocess.run([*command, "--num_videos", "3"], check=True)
    assert len(list(tmp_path.rglob("*.mp4"))) == 3
    assert (tmp_path / paths[0]).stat().st_mtime_ns == stamp  # it stays
    frames = render_phantom_clip(9, 2, 16, 16, polyp=False, instrument=False).frames
    assert abs(read_frames(tmp_path / paths[0], range(2)).astype(int) - frames).mean() < 10
    with pytest.raises(SystemExit, match=r"holds videos of {'split': 'test', 'num_frames': 2, 'size': 16}"):
        run_main(script, [*flags, "--split", "train"])
