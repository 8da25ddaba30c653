"""Publishing to a Hub that speaks HTTP: what arrives, that it loads, and what happens when the server fails."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDPMScheduler
from hub_server import EXPIRED, READ_ONLY, TOKEN, Fault, HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from diffusers_endora import EndoraPipeline, EndoraTransformer3DModel
from diffusers_endora.data.contact_sheet import save_contact_sheet
from diffusers_endora.data.provenance import synthetic_metadata
from diffusers_endora.data.video_io import write_video
from diffusers_endora.hub import create_repository, publish_folder, save_model_card
from diffusers_endora.metrics.feature_extractors import hash_weights
from diffusers_endora.model_card import is_edited
from diffusers_endora.pipelines.single_file import single_file_source
from diffusers_endora.publication import prepare_publication, without_private

SECRET = "hf_" + "NeverToBePublished" * 2


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(server, monkeypatch, tmp_path) -> HubServer:
    """The empty server, where huggingface_hub goes in this process; waits take no time and are in `hub.waits`."""
    server.clear()
    server.waits = []
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(time, "sleep", server.waits.append)
    return server


@pytest.fixture(scope="module")
def pipe() -> EndoraPipeline:
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    vae = AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
    transformer = EndoraTransformer3DModel(2, 8, num_layers=1, sample_size=8, num_frames=4, num_classes=2).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    return EndoraPipeline(vae, transformer, scheduler)


@pytest.fixture(scope="module")
def trained(pipe, tmp_path_factory) -> Path:
    """The output of a training, with all that may lie in one."""
    folder = tmp_path_factory.mktemp("trainings") / "run"
    pipe.save_pretrained(folder)
    arguments = {
        "train_data_dir": "/data/patients/colon",
        "dataset_name": None,
        "pretrained_vae": str(folder / "my-vae"),
        "prior": "none",
        "train_batch_size": 2,
        "output_dir": str(folder),
        "hub_token": SECRET,
        "seed": 0,
        "use_ema": False,
    }
    training = {"arguments": arguments, "results": {"steps": 20, "learning_rate": 1e-4}, "class_names": ["a", "b"]}
    (folder / "training.json").write_text(json.dumps(training))
    (folder / "training_log.jsonl").write_text(f'{{"step": 1, "loss": 0.5}}\n{{"note": "saved to {folder}/x"}}\n')
    logs = folder / "logs" / "endora"
    logs.mkdir(parents=True)
    (logs / "hparams.yml").write_text(f"output_dir: {folder}\nhub_token: {SECRET}\nseed: 0\n")
    (logs / "events.out.tfevents.0").write_bytes(b"\x00numbers\x01")
    (logs / "events.out.tfevents.1").write_bytes(b"\x00" + str(folder).encode() + b"\x01")
    clip = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
    for step in (5, 20):
        place = folder / "validation" / f"step-{step}"
        place.mkdir(parents=True)
        write_video(place / "clip_0.mp4", clip // (1 + step), 8, metadata=synthetic_metadata(str(folder), "0" * 64))
        save_contact_sheet(place / "contact_sheet.png", clip[None])
    (folder / "checkpoint-20").mkdir()
    (folder / "checkpoint-20" / "random_states.pkl").write_bytes(b"pickle")
    save_model_card(folder, arguments, training["results"], ["a", "b"])
    return folder


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


PUBLISHED = {
    "README.md",
    "logs/endora/events.out.tfevents.0",
    "logs/endora/hparams.yml",
    "model_index.json",
    "pipeline.py",
    "samples/clip.mp4",
    "samples/contact_sheet.png",
    "scheduler/scheduler_config.json",
    "training.json",
    "training_log.jsonl",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


# What arrives


def test_a_training_is_published_in_one_commit(hub, trained):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    address = publish_folder(trained, "me/model", private=True)
    repository = hub.repositories["me/model"]
    assert repository.private
    assert address == f"{hub.url}/me/model/commit/{repository.heads['main']}"
    assert len(repository.commits) == 2  # the Hub's own and ours
    files = repository.files()
    assert set(files) == PUBLISHED | {".gitattributes"}
    for name in ("transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert files[name] == before[trained / name]
    assert files["pipeline.py"].decode() == single_file_source()
    assert files["samples/clip.mp4"] == before[trained / "validation/step-20/clip_0.mp4"]
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "EndoraPipeline"
    assert index["transformer"] == ["diffusers", "EndoraTransformer3DModel"]

    card = ModelCard(files["README.md"].decode())
    assert 'EndoraPipeline.from_pretrained("me/model")' in card.text
    assert "- `1` b" in card.text
    assert "| data | colon |" in card.text
    assert "at step 20" in card.text
    assert not is_edited(files["README.md"].decode())
    arguments = json.loads(files["training.json"])["arguments"]
    assert arguments["train_data_dir"] == "colon"
    assert arguments["pretrained_vae"] == "my-vae"
    assert "hub_token" not in arguments
    assert files["training_log.jsonl"] == b'{"step": 1, "loss": 0.5}\n{"note": "saved to x"}\n'
    assert files["logs/endora/hparams.yml"] == b"output_dir: run\nhub_token:\nseed: 0\n"
    for name, content in files.items():
        assert b"/data/patients" not in content, name
        assert str(trained).encode() not in content, name
        assert SECRET.encode() not in content, name
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_publishing_again_changes_nothing(hub, trained):
    first = publish_folder(trained, "me/model")
    assert publish_folder(trained, "me/model") == first
    assert hub.count("^PUT /lfs/") == len(hub.large_files)


def test_nothing_of_an_earlier_model_stays(hub, copy):
    publish_folder(copy, "me/model")
    repository = hub.repositories["me/model"]
    stale = {"transformer/diffusion_pytorch_model.fp16.safetensors": b"0", "transformer/old.bin": b"0"}
    repository.commit("main", {**repository.files(), **stale, "notes.txt": b"mine", "paper/figure.png": b"mine"})
    shutil.rmtree(copy / "logs")
    publish_folder(copy, "me/model")
    kept = {name for name in PUBLISHED if not name.startswith("logs/")}
    assert set(repository.files()) == kept | {".gitattributes", "notes.txt", "paper/figure.png"}


def test_branches_pull_requests_and_tags(hub, copy):
    publish_folder(copy, "me/model", tag="step-20")
    repository = hub.repositories["me/model"]
    first = repository.heads["main"]
    assert repository.tags == {"step-20": first}
    publish_folder(copy, "me/model", tag="step-20")  # the same commit again

    with (copy / "training_log.jsonl").open("a") as log:
        log.write('{"step": 21}\n')
    publish_folder(copy, "me/model", revision="later")
    assert repository.heads["main"] == first
    assert b"21" in repository.files("later")["training_log.jsonl"]
    assert publish_folder(copy, "me/model", create_pr=True) == f"{hub.url}/me/model/discussions/1"
    assert repository.heads["main"] == first
    assert repository.files("refs/pr/1") == repository.files("later")
    publish_folder(copy, "me/model", revision="refs/pr/1")
    with pytest.raises(ValueError, match="the tag step-20 was there already, of commit"):
        publish_folder(copy, "me/model", tag="step-20")
    with pytest.raises(ValueError, match="tagged when it is merged"):
        publish_folder(copy, "me/model", tag="x", create_pr=True)


def test_a_private_push_does_not_end_in_a_public_repository(hub, trained):
    publish_folder(trained, "me/model")
    with pytest.raises(ValueError, match="me/model is a public repository; expected a private one"):
        publish_folder(trained, "me/model", private=True)
    publish_folder(trained, "other")  # whose the token is
    assert "me/other" in hub.repositories


# Loading


LOAD = """
import json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers_endora":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

repo, with_package = sys.argv[1], sys.argv[2] == "with"
if with_package:
    from diffusers_endora import EndoraPipeline
    pipe = EndoraPipeline.from_pretrained(repo)
else:
    sys.meta_path.insert(0, NotInstalled())
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)
    assert not [name for name in sys.modules if name.startswith("diffusers_endora")]
pipe.save_pretrained(sys.argv[3])
print(type(pipe).__module__)
"""


def run_elsewhere(hub, tmp_path, *command) -> str:
    """What a fresh process prints that has nothing of this one but the address of the server and a token."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    environment |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, *map(str, command)]
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def assert_same_weights(folder: Path, trained: Path) -> None:
    for component in ("transformer", "vae"):
        name = f"{component}/diffusion_pytorch_model.safetensors"
        assert (folder / name).read_bytes() == (trained / name).read_bytes()


def test_it_loads_where_the_package_is_absent(hub, trained, tmp_path):
    publish_folder(trained, "me/model")
    module = run_elsewhere(hub, tmp_path, "-c", LOAD, "me/model", "without", tmp_path / "loaded")
    assert module.startswith("diffusers_modules.")
    assert_same_weights(tmp_path / "loaded", trained)


@pytest.mark.slow
def test_the_command_publishes_and_the_package_loads(hub, trained, tmp_path):
    command = ["-m", "diffusers_endora.cli", "publish", trained, "me/model", "--private"]
    out = run_elsewhere(hub, tmp_path, *command)
    assert out.splitlines()[-1] == f"{hub.url}/me/model/commit/{hub.repositories['me/model'].heads['main']}"
    module = run_elsewhere(hub, tmp_path, "-c", LOAD, "me/model", "with", tmp_path / "loaded")
    assert module == "diffusers_endora.pipelines.pipeline_endora"
    assert_same_weights(tmp_path / "loaded", trained)


# When the server fails

REQUESTS = {
    "the repository": "POST /api/repos/create",
    "the card": "POST /api/validate-yaml",
    "the listing": "GET /api/models/me/model/tree",
    "the kinds of files": "POST /api/models/me/model/preupload",
    "the large files": "POST /me/model.git/info/lfs/objects/batch",
    "a transfer": "PUT /lfs/",
    "the commit": "POST /api/models/me/model/commit",
    "the tag": "POST /api/models/me/model/tag",
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_errors_that_pass_are_tried_again(hub, trained, request_):
    hub.faults = [
        Fault(request_, status=429, headers={"Retry-After": "7"}),
        Fault(request_, status=500),
        Fault(request_, drop="before"),
        Fault(request_, drop="after"),
    ]
    publish_folder(trained, "me/model", tag="v1")
    repository = hub.repositories["me/model"]
    assert set(repository.files()) == PUBLISHED | {".gitattributes"}
    assert len(repository.commits) == 2  # one whose answer was lost is not made again
    assert repository.tags == {"v1": repository.heads["main"]}
    assert [fault.times for fault in hub.faults] == [0] * 4
    assert max(hub.waits) in (7, 8)  # what the server said, or one more as huggingface_hub counts
    assert len(hub.waits) == 4


@pytest.mark.parametrize("request_", [REQUESTS["a transfer"], REQUESTS["the commit"], REQUESTS["the large files"]])
def test_a_server_that_keeps_failing_leaves_the_repository_as_it_was(hub, trained, request_):
    hub.faults = [Fault(request_, times=1000, status=503)]
    with pytest.raises(ConnectionError, match=r"the Hub cannot be reached or keeps failing \(status 503.*stopped"):
        publish_folder(trained, "me/model")
    assert set(hub.repositories["me/model"].files()) == {".gitattributes"}
    assert len(hub.waits) == 5 * max(1, hub.count("^PUT") // 6)  # the library's own or ours, never these times those
    sent = set(hub.large_files)

    hub.faults = []
    before = len(hub.requests)
    publish_folder(trained, "me/model")
    assert set(hub.repositories["me/model"].files()) == PUBLISHED | {".gitattributes"}
    again = [request for request in hub.requests[before:] if request.startswith("PUT /lfs/")]
    assert not sent & {request.rpartition("/")[2] for request in again}


def test_what_arrived_before_an_interruption_is_not_sent_again(hub, trained):
    hub.faults = [Fault("PUT /lfs/", times=1000, skip=2, drop="before")]
    with pytest.raises(ConnectionError, match="goes on where it stopped"):
        publish_folder(trained, "me/model")
    assert len(hub.large_files) == 2
    hub.faults, before = [], len(hub.requests)
    publish_folder(trained, "me/model")
    sent = sum(request.startswith("PUT /lfs/") for request in hub.requests[before:])
    assert sent == len(hub.large_files) - 2


def test_a_commit_in_between_is_built_upon(hub, trained):
    publish_folder(trained, "me/model")
    repository = hub.repositories["me/model"]
    repository.commit("main", {"README.md": b"other"})
    hub.faults = [Fault("POST /api/models/me/model/commit", status=412)]
    publish_folder(trained, "me/model")
    assert set(repository.files()) == PUBLISHED


def test_a_pull_request_whose_answer_was_lost_is_not_opened_again(hub, trained):
    hub.faults = [Fault("POST /api/models/me/model/commit", drop="after")]
    with pytest.raises(ConnectionError, match="look whether it is there before you publish again"):
        publish_folder(trained, "me/model", create_pr=True)
    assert hub.repositories["me/model"].pull_requests == ["refs/pr/1"]
    hub.faults = [Fault("POST /api/models/me/model/commit", status=429)]
    publish_folder(trained, "me/model", create_pr=True)
    assert hub.repositories["me/model"].pull_requests == ["refs/pr/1", "refs/pr/2"]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (EXPIRED, "does not accept the token: it is missing, wrong or expired; run `hf auth login`"),
        (READ_ONLY, "the token may not write to me/model; choose a repository of yours"),
    ],
)
@pytest.mark.parametrize("is_there", [False, True])
def test_tokens_that_do_not_do(hub, trained, token, message, is_there):
    if is_there:
        publish_folder(trained, "me/model")
    with pytest.raises(PermissionError, match=message) as error:
        publish_folder(trained, "me/model", token=token)
    assert "\n" not in str(error.value)
    assert token not in str(error.value)
    assert hub.waits == []


def test_before_a_training_it_is_known_whether_the_token_may_write(hub, trained, monkeypatch):
    assert create_repository("model") == "me/model"
    create_repository("me/model")  # again, with the right to
    with pytest.raises(PermissionError, match="the token may not write to me/model"):
        create_repository("me/model", READ_ONLY)
    with pytest.raises(ValueError, match="me/model is a public repository"):
        create_repository("me/model", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="the Hub does not accept the token: it is missing"):
        create_repository("me/model")


def test_refusals_are_one_sentence(hub, trained, endora):
    publish_folder(trained, "me/model")
    with pytest.raises(OSError, match="me/model has no revision refs/pr/9"):
        publish_folder(trained, "me/model", revision="refs/pr/9")
    hub.faults = [Fault("POST /api/repos/create", status=418)]
    code, _, err = endora("publish", trained, "me/model")
    assert (code, err) == (1, "endora: error: the Hub refuses: status 418: the server fails as it was told\n")
    assert endora("publish", trained, "no/such/name")[0] == 1


def test_a_failed_transfer_of_another_kind_is_a_sentence_too(hub, trained, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Data processing error")  # as the transfer by Xet ends

    monkeypatch.setattr("huggingface_hub.HfApi.preupload_lfs_files", fail)
    with pytest.raises(ConnectionError, match=r"the transfer of files failed \(Data processing error\)"):
        publish_folder(trained, "me/model")


def test_an_earlier_model_stays_whole_when_a_later_one_fails(hub, copy):
    publish_folder(copy, "me/model")
    before = dict(hub.repositories["me/model"].files())
    path = copy / "transformer/diffusion_pytorch_model.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})
    hub.faults = [Fault("POST /api/models/me/model/commit", times=1000, status=500)]
    with pytest.raises(ConnectionError, match="not half published"):
        publish_folder(copy, "me/model")
    assert hub.repositories["me/model"].files() == before


# What is checked first


def cut_short(folder):
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def of_another_shape(folder):
    weights = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name][..., :1].clone()
    save_file(weights, folder / "transformer/diffusion_pytorch_model.safetensors")


def lacking(folder):
    weights = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    weights.popitem()
    save_file(weights, folder / "transformer/diffusion_pytorch_model.safetensors")


def with_index(change):
    def damage(folder):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, **change}))

    return damage


def with_json(name, value):
    return lambda folder: (folder / name).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json; expected a pipeline folder"),
        (lambda folder: (folder / "vae/config.json").unlink(), "vae: has no config.json; the folder would not load"),
        (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler: has no scheduler_config.json"),
        (lambda folder: (folder / "vae/diffusion_pytorch_model.safetensors").unlink(), "safetensors: is missing"),
        (lambda folder: (folder / "vae/model.bin").touch(), "model.bin: is a pickle"),
        (cut_short, "is damaged or cut short"),
        (of_another_shape, "and its config.json asks for"),
        (lacking, "lacks the weights .*, which its config.json asks for"),
        (with_index({"_class_name": "LattePipeline"}), "is a LattePipeline; expected an EndoraPipeline"),
        (with_index({"vae": [None, None]}), "names no vae"),
        (lambda folder: (folder / "training.json").write_text("{"), "training.json: is no JSON"),
        (with_index({"transformer": 5}), "names no transformer"),
        (with_json("vae/diffusion_pytorch_model.safetensors.index.json", {}), "weight_map: expected a dict, got none"),
        (with_json("conversion.json", {}), "conversion.json: source: expected a dict, got none"),
        (with_json("training.json", {"arguments": [1], "results": {}}), "arguments: expected a dict, got list"),
        (
            with_json("training.json", {"arguments": {"seed": 0}, "results": {"mse": "x"}}),
            "no card can be made of its",
        ),
        (lambda folder: (folder / "README.md").write_bytes(b"\xff"), "README.md: is no UTF-8"),
    ],
)
def test_half_a_folder_is_refused_before_anything_is_sent(hub, copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message) as error:
        publish_folder(copy, "me/model")
    assert "\n" not in str(error.value)
    assert hub.requests == []


def test_the_index_is_published_in_the_published_form(copy):
    with_index({"transformer": ["diffusers_endora", "EndoraTransformer3DModel"], "_name_or_path": "/data/x"})(copy)
    index = json.loads(prepare_publication(copy, "me/model").files["model_index.json"])
    assert index["transformer"] == ["diffusers", "EndoraTransformer3DModel"]
    assert "_name_or_path" not in index


def test_sharded_weights_are_published_whole(pipe, trained, tmp_path):
    pipe.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    files = prepare_publication(tmp_path / "sharded", "me/model", license="mit").files
    shards = [name for name in files if "-of-" in name]
    assert len(shards) > 2
    Path(files[shards[1]]).unlink()
    with pytest.raises(ValueError, match=r"-of-.*is missing; the folder would not load"):
        prepare_publication(tmp_path / "sharded", "me/model", license="mit")


# Licences, cards and reports


def converted(folder: Path) -> None:
    (folder / "training.json").unlink()
    record = {"source": {"file": "colon.pt", "sha256": "ab" * 32}, "block_order": "interleaved", "vae": "a/vae"}
    (folder / "conversion.json").write_text(json.dumps(record))


def license_of(publication) -> str | None:
    return ModelCard(publication.files["README.md"].decode()).data.get("license")


def test_a_licence_has_no_default(copy):
    publication = prepare_publication(copy, "me/model")
    assert license_of(publication) is None
    assert "the card states no licence; --license adds one" in publication.notes
    assert license_of(prepare_publication(copy, "me/model", license="mit")) == "mit"
    with pytest.raises(ValueError, match="--license 'My own': expected the Hub's name of a licence"):
        prepare_publication(copy, "me/model", license="My own")

    converted(copy)
    with pytest.raises(ValueError, match=r"is converted from colon\.pt, .* --license .*: there is no default"):
        prepare_publication(copy, "me/model")
    publication = prepare_publication(copy, "me/model", license="cc-by-nc-4.0")
    assert license_of(publication) == "cc-by-nc-4.0"
    assert "conversion.json" in publication.files

    (copy / "conversion.json").unlink()
    with pytest.raises(ValueError, match=r"holds neither training\.json nor conversion\.json"):
        prepare_publication(copy, "me/model")


def test_the_licence_that_the_training_states_is_kept(copy):
    training = json.loads((copy / "training.json").read_text())
    training["arguments"]["license"] = "apache-2.0"
    (copy / "training.json").write_text(json.dumps(training))
    assert license_of(prepare_publication(copy, "me/model")) == "apache-2.0"


def test_a_card_written_by_hand_is_published_as_it_is(copy):
    by_hand = "---\nlicense: mit\n---\n# Mine\n"
    (copy / "README.md").write_text(by_hand)
    publication = prepare_publication(copy, "me/model", license="mit")
    assert publication.files["README.md"].decode() == by_hand
    assert any("published as it is" in note for note in publication.notes)
    with pytest.raises(ValueError, match=r"states the licence mit, not apache-2\.0"):
        prepare_publication(copy, "me/model", license="apache-2.0")
    new = prepare_publication(copy, "me/model", license="apache-2.0", overwrite_card=True)
    assert license_of(new) == "apache-2.0"
    assert (copy / "README.md").read_text() == by_hand

    (copy / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match="its metadata is no YAML"):
        prepare_publication(copy, "me/model")


@pytest.mark.parametrize("text", [f"Push with {SECRET}.", "See {folder}/notes.", "Data in /data/patients/colon."])
def test_a_card_with_a_token_or_a_local_path_is_refused(copy, text):
    training = json.loads((copy / "training.json").read_text())
    assert training["arguments"]["train_data_dir"] == "/data/patients/colon"
    (copy / "README.md").write_text(text.format(folder=copy))
    with pytest.raises(ValueError, match=r"README\.md: holds (a token of the Hub|the local path)") as error:
        prepare_publication(copy, "me/model")
    assert SECRET not in str(error.value)


def test_a_report_goes_into_the_card_if_it_is_of_this_model(pipe, copy, tmp_path):
    from test_hub import REPORT

    report = json.loads(json.dumps(REPORT))
    report["real"]["source"] = "/data/patients/test"
    report["fake"] = {"source": "clips", "sampling": f"DDPM, transformer {hash_weights(pipe.transformer)[:16]}, VAE 0"}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    publication = prepare_publication(copy, "me/model", report=tmp_path, datasets=["me/colon"])
    card = ModelCard(publication.files["README.md"].decode())
    assert card.data.eval_results[0].metric_value == 460.7
    assert card.data.eval_results[0].dataset_name == "test"
    assert card.data.datasets == ["me/colon"]
    published = publication.files["evaluation/report.json"]
    assert b"/data" not in published
    assert b"jane_doe" not in published
    assert not any("does not say which model" in note for note in publication.notes)

    report["fake"]["sampling"] = "DDPM, transformer 0123456789abcdef, VAE 0"
    path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="is of another model: transformer 0123456789abcdef"):
        prepare_publication(copy, "me/model", report=path)
    report["fake"]["sampling"] = None
    path.write_text(json.dumps(report))
    assert any("does not say which model" in note for note in prepare_publication(copy, "me/model", report=path).notes)
    with pytest.raises(ValueError, match="is not there"):
        prepare_publication(copy, "me/model", report=tmp_path / "absent.json")
    for name, value, message in (
        ("protocol", 1, "report.json: protocol: expected a dict, got int"),
        ("results", [1], "no card can be made"),
        ("memorisation", {"closest": 2}, "report.json: closest: expected a list, got int"),
    ):
        path.write_text(json.dumps({**report, name: value}))
        with pytest.raises(ValueError, match=message):
            prepare_publication(copy, "me/model", report=path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/my data", "my data"),
        ("~/videos/", "videos"),
        ("file:///home/me/x.mp4", "x.mp4"),
        ("read /home/me/x.mp4, then --out=/tmp/y/z", "read x.mp4, then --out=z"),
        ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"),
        ("https://huggingface.co/me/model", "https://huggingface.co/me/model"),
        ("3 frames/s, real / generated, 50/50", "3 frames/s, real / generated, 50/50"),
        (f"token {SECRET}", "token hf_..."),
    ],
)
def test_local_paths_and_tokens_are_taken_out(text, expected):
    assert without_private({"a": [text], "api_key": "x", "num_tokens": 3}) == {"a": [expected], "num_tokens": 3}


# The command


def test_the_command_lists_what_it_would_upload(hub, trained, endora):
    code, out, err = endora("publish", trained, "me/model", "--dry_run")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert {line.split()[-1] for line in lines if line[0] == " "} == PUBLISHED
    assert "note: logs/endora/events.out.tfevents.1: holds the local path" in out
    assert lines[-1] == f"me/model: {len(PUBLISHED)} files; nothing was uploaded (--dry_run)"
    assert hub.requests == []
    assert endora("publish", trained, "me//model", "--dry_run")[0] == 1
    code, out, _ = endora("publish", trained, "me/model", "--license", "mit", "--tag", "v1", "--revision", "dev")
    assert code == 0
    repository = hub.repositories["me/model"]
    assert out.splitlines()[-1] == f"{hub.url}/me/model/commit/{repository.heads['dev']}"
    assert repository.tags == {"v1": repository.heads["dev"]}
