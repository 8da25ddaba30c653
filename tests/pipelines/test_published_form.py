"""What `save_pretrained` leaves: a folder that loads in a fresh process, with this package or without it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderTiny, DDPMScheduler, DiffusionPipeline, UniPCMultistepScheduler

from diffusers_endora import EndoraPipeline, EndoraTransformer3DModel
from diffusers_endora.pipelines.single_file import single_file_source

SINGLE_FILE = Path(__file__).resolve().parents[2] / "pipelines" / "endora" / "pipeline.py"
PUBLISHED_INDEX = {
    "_class_name": "EndoraPipeline",
    "_diffusers_version": diffusers.__version__,
    "num_inference_steps": 250,
    "prediction_type": "epsilon",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "transformer": ["diffusers", "EndoraTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderTiny"],
}


def tiny_pipeline() -> EndoraPipeline:
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    vae = AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
    transformer = EndoraTransformer3DModel(2, 8, num_layers=1, sample_size=8, num_frames=4, num_classes=3).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    pipe = EndoraPipeline(vae, transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: DiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(num_inference_steps=2, class_labels=[1], generator=generator, output_type="latent").frames


def assert_same(latents: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 standard deviations: the last bits may differ with the place of the weights in memory."""
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5 * expected.std().item())


@pytest.fixture
def pipe() -> EndoraPipeline:
    return tiny_pipeline()


@pytest.fixture
def folder(pipe, tmp_path) -> Path:
    pipe.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def read_index(folder: Path) -> dict:
    return json.loads((folder / "model_index.json").read_text())


# The single file


def test_the_single_file_is_up_to_date():
    assert SINGLE_FILE.read_text(encoding="utf-8") == single_file_source(), "out of date: run `make single-file`"


def test_the_single_file_defines_one_pipeline_and_needs_torch_and_diffusers_alone():
    tree = ast.parse(single_file_source())
    bases = {
        node.name: {ast.unparse(base) for base in node.bases} for node in tree.body if isinstance(node, ast.ClassDef)
    }
    assert [name for name, names in bases.items() if "DiffusionPipeline" in names] == ["EndoraPipeline"]
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0]
    others = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert others <= {"torch", "diffusers", "numpy", "PIL"}  # the last two are diffusers' own needs


# The folder


def test_a_saved_folder_has_the_published_form(folder):
    assert {path.name for path in folder.iterdir()} == {
        "model_index.json",
        "pipeline.py",
        "scheduler",
        "transformer",
        "vae",
    }
    assert read_index(folder) == PUBLISHED_INDEX
    assert (folder / "pipeline.py").read_text(encoding="utf-8") == single_file_source()


def test_a_loaded_pipeline_saves_the_published_form_again(folder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is EndoraPipeline
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "again")
    assert read_index(tmp_path / "again") == {**PUBLISHED_INDEX, "scheduler": ["diffusers", "UniPCMultistepScheduler"]}


@pytest.mark.parametrize("library", ["diffusers", "diffusers_endora"])
def test_an_index_that_names_the_package_loads_as_well(pipe, folder, library):
    """diffusers' own way of saving would have named it."""
    index = {**read_index(folder), "transformer": [library, "EndoraTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert_same(generate(DiffusionPipeline.from_pretrained(folder)), generate(pipe))


@pytest.mark.parametrize(
    "settings",
    [{"safe_serialization": False}, {"variant": "fp16"}, {"max_shard_size": "5KB"}],
    ids=lambda s: next(iter(s)),
)
def test_every_way_of_saving_loads_again(pipe, tmp_path, settings):
    pipe.save_pretrained(tmp_path, **settings)
    loaded = EndoraPipeline.from_pretrained(tmp_path, variant=settings.get("variant"))
    assert_same(generate(loaded), generate(pipe))
    assert read_index(tmp_path) == PUBLISHED_INDEX
    weights = " ".join(path.name for path in (tmp_path / "transformer").iterdir())
    assert {"safe_serialization": ".bin", "variant": ".fp16.", "max_shard_size": "-00002-of-"}[
        next(iter(settings))
    ] in weights


def test_a_variant_that_is_not_there_is_refused(folder):
    with pytest.raises(ValueError, match="variant=fp16"):
        EndoraPipeline.from_pretrained(folder, variant="fp16")


def test_precision_by_component(folder):
    pipe = EndoraPipeline.from_pretrained(folder, dtype={"transformer": torch.bfloat16, "default": torch.float16})
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float16)
    assert generate(pipe).isfinite().all()


def test_loading_to_a_device(pipe, folder):
    assert_same(generate(EndoraPipeline.from_pretrained(folder, device_map="cpu")), generate(pipe))


# Saving cut short


def test_a_first_save_cut_short_leaves_nothing_that_loads(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pipe.vae, "save_pretrained", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "model_index.json").exists()


def test_the_index_is_replaced_whole_or_not_at_all(pipe, folder, monkeypatch):
    before = (folder / "model_index.json").read_text()
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    written = []

    def cut_short(self, target):
        written.append((self.read_text(), Path(target).name))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut_short)
        with pytest.raises(KeyboardInterrupt):
            pipe.save_pretrained(folder)
    assert (folder / "model_index.json").read_text() == before
    assert written == [(pipe.to_json_string(), "model_index.json")]
    pipe.save_pretrained(folder)
    assert (folder / "model_index.json").read_text() == written[0][0]
    assert not list(folder.glob("*.tmp"))


# The Hub


class FakeHub:
    """Stands for the network calls of diffusers' uploads; keeps what a repository would hold."""

    def __init__(self, monkeypatch):
        self.files: dict[str, str] = {}
        for module in (
            "diffusers.utils.hub_utils",
            "diffusers.pipelines.pipeline_utils",
            "diffusers.configuration_utils",
        ):
            monkeypatch.setattr(f"{module}.create_repo", self.create_repo)
        for module in ("diffusers.utils.hub_utils", "diffusers.pipelines.pipeline_utils"):
            monkeypatch.setattr(f"{module}.load_or_create_model_card", lambda *args, **kwargs: self)
            monkeypatch.setattr(f"{module}.populate_model_card", lambda card: card)
        monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", self.upload_folder)

    def create_repo(self, repo_id, **kwargs):
        self.repo_id = repo_id
        return self

    def save(self, path):
        Path(path).write_text("a model card")

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        assert repo_id == self.repo_id == "me/endora"
        for path in Path(folder_path).rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                self.files[path.relative_to(folder_path).as_posix()] = content.decode(errors="replace")


@pytest.mark.parametrize("how", ["save_pretrained", "push_to_hub", "save_config"])
def test_uploads_have_the_published_form(pipe, tmp_path, monkeypatch, how):
    hub = FakeHub(monkeypatch)
    if how == "push_to_hub":
        pipe.push_to_hub("me/endora")
    else:
        getattr(pipe, how)(str(tmp_path / "saved"), push_to_hub=True, repo_id="me/endora")
    assert json.loads(hub.files["model_index.json"]) == PUBLISHED_INDEX
    assert hub.files["pipeline.py"] == single_file_source()
    assert ("transformer/diffusion_pytorch_model.safetensors" in hub.files) == (how != "save_config")


# Fresh processes

GENERATE = """
import json, os, sys

def generate(pipe):
    import torch
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    latents = pipe(num_inference_steps=2, class_labels=[1], generator=generator, output_type="latent").frames
    return [type(pipe).__module__, type(pipe.transformer).__module__, latents.flatten().tolist()]
"""

WITH_PACKAGE = """
from diffusers import DiffusionPipeline
from diffusers_endora import EndoraPipeline

loaders = (EndoraPipeline, DiffusionPipeline)
print(json.dumps([generate(loader.from_pretrained(folder)) for folder in sys.argv[1:] for loader in loaders]))
"""

WITHOUT_PACKAGE = """
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers_endora":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
try:
    import diffusers_endora
except ModuleNotFoundError:
    pass
else:
    sys.exit("the package is there: this process proves nothing")

from diffusers import DiffusionPipeline

folder, single_file, again = sys.argv[1:]
try:
    DiffusionPipeline.from_pretrained(folder)
except AttributeError as error:
    assert "EndoraPipeline" in str(error)
else:
    sys.exit("loaded without the package and without custom_pipeline")
loads = []
for custom_pipeline in (folder, single_file):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=custom_pipeline, trust_remote_code=True)
    loads.append(generate(pipe))
pipe.save_pretrained(again)
pipe = DiffusionPipeline.from_pretrained(again, custom_pipeline=again, trust_remote_code=True)
loads.append(generate(pipe))
assert not [name for name in sys.modules if name.startswith("diffusers_endora")]
print(json.dumps(loads))
"""


def fresh_process(script: str, cache: Path, *arguments) -> list:
    """What `script` prints as JSON, run by a new interpreter that has an empty Hugging Face cache and no network."""
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, "-c", GENERATE + script, *map(str, arguments)]
    process = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_folder_loads_in_fresh_processes_with_and_without_the_package(pipe, folder, tmp_path):
    expected = generate(pipe).flatten()
    cache = tmp_path / "cache"
    cache.mkdir()

    again = tmp_path / "again"
    for pipeline_module, transformer_module, latents in fresh_process(
        WITHOUT_PACKAGE, cache, folder, SINGLE_FILE, again
    ):
        assert pipeline_module.startswith("diffusers_modules.")
        assert transformer_module.startswith("diffusers_modules.")
        assert_same(torch.tensor(latents), expected)
    assert read_index(again) == PUBLISHED_INDEX
    assert (again / "pipeline.py").read_text(encoding="utf-8") == single_file_source()

    loads = fresh_process(WITH_PACKAGE, cache, folder, again)
    assert len(loads) == 4
    for pipeline_module, transformer_module, latents in loads:
        assert pipeline_module == "diffusers_endora.pipelines.pipeline_endora"
        assert transformer_module == "diffusers_endora.models.transformer_endora"
        assert_same(torch.tensor(latents), expected)


def test_the_number_of_steps_is_saved_with_its_scheduler(tmp_path):
    pipe = tiny_pipeline()
    scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    EndoraPipeline(pipe.vae, pipe.transformer, scheduler, num_inference_steps=3).save_pretrained(tmp_path)
    loaded = EndoraPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, UniPCMultistepScheduler)
    loaded.set_progress_bar_config(disable=True)
    loaded(output_type="latent")
    assert loaded.num_timesteps == 3
    loaded(output_type="latent", num_inference_steps=2)
    assert loaded.num_timesteps == 2
