import json

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from script_runs import EXAMPLES, as_flags, run_main

from diffusers_endora import EndoraPipeline, EndoraTransformer3DModel

ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture
def parts(tmp_path):
    """A trained pipeline and a student."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1)
    transformer = EndoraTransformer3DModel(
        2, 8, num_layers=1, sample_size=4, num_frames=2, out_channels=4, num_classes=3
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipeline = EndoraPipeline(vae, transformer, FlowMatchEulerDiscreteScheduler())
    pipeline.save_pretrained(tmp_path / "training")
    options = {"num_steps": 2, "num_trajectories": 4, "rank": 2, "max_train_steps": 2}
    script = EXAMPLES / "distill_endora.py"
    run_main(
        script,
        as_flags({"pretrained_model": tmp_path / "training", "output_dir": tmp_path / "student", **options}),
    )
    return {"model": tmp_path / "training", "student": tmp_path / "student"}


def bundle(output_dir, **options):
    run_main(EXAMPLES / "bundle_model.py", as_flags({"output_dir": output_dir, **options}))


def test_a_student_is_optional_but_none_is_left_of_another_model(parts, tmp_path):
    bundle(tmp_path / "out", model=parts["model"])
    EndoraPipeline.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "student").exists()
    bundle(tmp_path / "out", **parts)
    with pytest.raises(SystemExit, match="holds the student of an earlier model"):
        bundle(tmp_path / "out", model=parts["model"])


def test_a_student_of_another_model_is_refused(parts, tmp_path):
    other = EndoraPipeline.from_pretrained(parts["model"])
    with torch.no_grad():
        other.transformer.proj_out.bias += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="is of another model than --model"):
        bundle(tmp_path / "out", model=tmp_path / "other", student=parts["student"])
    assert not list((tmp_path / "out").iterdir())


def test_half_the_bytes_of_model_and_student(parts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("a card")
    bundle(tmp_path / "out", **parts, num_inference_steps=7)
    pipe = EndoraPipeline.from_pretrained(tmp_path / "out")
    assert pipe.config.num_inference_steps == 7
    assert pipe.transformer.dtype == torch.float32
    assert (tmp_path / "out" / "README.md").read_text() == "a card"
    trained = EndoraPipeline.from_pretrained(parts["model"])
    for part in ("vae", "transformer"):
        original = getattr(trained, part).state_dict()
        for name, weight in getattr(pipe, part).state_dict().items():
            assert torch.equal(weight, original[name].half().float())

    def sample() -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(class_labels=[1], generator=torch.Generator().manual_seed(0), output_type="pt").frames

    teacher = sample()
    pipe.load_lora_weights(tmp_path / "out", subfolder="student")
    pipe.scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "out", subfolder="student/scheduler")
    assert not torch.equal(sample(), teacher)
    with (
        safe_open(tmp_path / "out" / "student" / ADAPTER, "pt") as file,
        safe_open(parts["student"] / ADAPTER, "pt") as original,
    ):
        assert file.metadata() == original.metadata()
        assert all(file.get_tensor(name).dtype == torch.float16 for name in file.keys())  # noqa: SIM118
    configs = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("*.json")]
    assert len(configs) == 6
    assert not any(config.get("_name_or_path") for config in configs)


def test_a_model_of_noise_is_refused(parts, tmp_path):
    pipe = EndoraPipeline.from_pretrained(parts["model"])
    EndoraPipeline(pipe.vae, pipe.transformer, DDPMScheduler()).save_pretrained(tmp_path / "noise")
    with pytest.raises(SystemExit, match="predicts no flow"):
        bundle(tmp_path / "out", **{**parts, "model": tmp_path / "noise"})
    with pytest.raises(SystemExit):
        bundle(tmp_path / "out", **parts, num_inference_steps=0)
    assert not (tmp_path / "out").exists()
