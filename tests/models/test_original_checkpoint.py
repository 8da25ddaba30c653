"""Official checkpoints: what is read from them, what is refused, and the way back bit for bit."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from diffusers_endora import EndoraTransformer3DModel, load_original_checkpoint, save_original_checkpoint
from diffusers_endora.models.original_checkpoint import (
    OFFICIAL_HEADS,
    OriginalExtras,
    infer_config,
    read_original_checkpoint,
)

GOLDEN_ORDERS = {"unconditional": "interleaved", "sequential": "sequential", "class_conditional": "interleaved"}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-4 of the expected tensor's standard deviation, as the golden numbers are stated."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 1e-4 * expected.std()


def assert_same_files(first: Path, second: Path) -> None:
    """The same wrapper, the same keys in the same order, the same bits."""
    first_content, second_content = (torch.load(path, weights_only=True) for path in (first, second))
    assert list(first_content) == list(second_content)
    if not isinstance(next(iter(first_content.values())), torch.Tensor):
        (first_content,), (second_content,) = first_content.values(), second_content.values()
    assert list(first_content) == list(second_content)
    for key, tensor in first_content.items():
        other = second_content[key]
        assert tensor.dtype == other.dtype, key
        assert tensor.shape == other.shape, key
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), key


@pytest.fixture
def transformer() -> EndoraTransformer3DModel:
    """Two pairs, 16 wide, 2 heads, 4x4 latents of 3 frames, 5 classes; all weights random, none zero."""
    torch.manual_seed(0)
    model = EndoraTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=4, num_frames=3, num_classes=5
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def checkpoint(transformer, tmp_path) -> Path:
    """An official file of that model, with a convolution of the prior and drifted tables."""
    path = tmp_path / "official.pt"
    save_original_checkpoint(transformer, path, OriginalExtras(tensors={"cov.weight": torch.randn(8, 3, 2, 2)}))
    content = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(1)
    for key in ("pos_embed", "temp_embed"):
        content["ema"][key] += 2e-4 * (2 * torch.rand(content["ema"][key].shape, generator=generator) - 1)
    for key in ("linear.weight", "linear.bias", "linear_2.weight", "linear_2.bias"):
        content["ema"][key] = torch.randn(content["ema"][key].shape, generator=generator)
    torch.save(content, path)
    return path


@pytest.fixture
def state_dict(checkpoint) -> dict[str, torch.Tensor]:
    return dict(torch.load(checkpoint, weights_only=True)["ema"])


# --- golden checkpoints ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_golden_unconditional(official_checkpoint, golden):
    model = load_original_checkpoint(official_checkpoint("unconditional"), num_attention_heads=4)
    assert not model.training
    assert_close(model(golden["forward/x"].transpose(1, 2), golden["forward/t"]).sample, golden_out(golden, "forward"))
    joint = model(golden["joint/x"].transpose(1, 2), golden["joint/t"], num_still_images=8)
    assert_close(joint.sample, golden_out(golden, "joint"))


@torch.no_grad()
def test_golden_sequential(official_checkpoint, golden):
    model = load_original_checkpoint(official_checkpoint("sequential"), "sequential", num_attention_heads=4)
    output = model(golden["sequential/x"].transpose(1, 2), golden["sequential/t"], num_still_images=8)
    assert_close(output.sample, golden_out(golden, "sequential"))


@torch.no_grad()
def test_golden_class_conditional(official_checkpoint, golden):
    model = load_original_checkpoint(official_checkpoint("class_conditional"), num_attention_heads=4)
    assert model.config.num_classes == 7
    assert model.null_class == 7
    output = model(golden["class/x"].transpose(1, 2), golden["class/t"], class_labels=golden["class/y"])
    assert_close(output.sample, golden_out(golden, "class"))


def golden_out(golden: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return golden[f"{name}/out"].transpose(1, 2)


@pytest.mark.parametrize(("name", "block_order"), GOLDEN_ORDERS.items())
def test_golden_round_trip_through_a_folder_is_bit_exact(official_checkpoint, tmp_path, name, block_order):
    original = official_checkpoint(name)
    model, extras = read_original_checkpoint(original, block_order, num_attention_heads=4)
    model.save_pretrained(tmp_path)
    extras.save(tmp_path / OriginalExtras.FILE_NAME)
    assert ("cov.weight" in extras.tensors) == (name == "unconditional")

    loaded = EndoraTransformer3DModel.from_pretrained(tmp_path)
    regenerated = save_original_checkpoint(loaded, tmp_path / "back.pt", tmp_path / OriginalExtras.FILE_NAME)
    assert regenerated == {}
    assert_same_files(original, tmp_path / "back.pt")


# --- reading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_reads_the_model_that_was_written(transformer, checkpoint):
    loaded = load_original_checkpoint(checkpoint, num_attention_heads=2)
    names = [name for name in transformer.config if not name.startswith("_")]
    assert {name: loaded.config[name] for name in names} == {name: transformer.config[name] for name in names}
    for name, parameter in transformer.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
        assert loaded.get_parameter(name).requires_grad


def test_weights_have_storages_of_their_own(checkpoint):
    loaded = load_original_checkpoint(checkpoint, num_attention_heads=2)
    storages = [parameter.untyped_storage() for parameter in loaded.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert [storage.nbytes() for storage in storages] == [parameter.nbytes for parameter in loaded.parameters()]
    before = loaded.proj_out.weight.clone()
    checkpoint.write_bytes(bytes(checkpoint.stat().st_size))  # the model does not depend on the file any more
    assert torch.equal(loaded.proj_out.weight, before)


def test_loading_draws_no_random_numbers(checkpoint):
    state = torch.get_rng_state()
    load_original_checkpoint(checkpoint, num_attention_heads=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda weights: weights, id="bare"),
        pytest.param(lambda weights: {"model": weights}, id="model"),
        pytest.param(lambda weights: {"ema": weights, "model": {"x": torch.zeros(1)}, "step": 3}, id="ema-first"),
        pytest.param(lambda weights: {"ema": {f"module.{k}": v for k, v in weights.items()}}, id="module-prefix"),
        pytest.param(lambda weights: {"ema": dict(reversed(weights.items()))}, id="other-order"),
        pytest.param(lambda weights: {"ema": {k: v.half() for k, v in weights.items()}}, id="float16"),
        pytest.param(lambda weights: {"ema": {k: v.bfloat16() for k, v in weights.items()}}, id="bfloat16"),
    ],
)
def test_wrappers_prefixes_and_dtypes_round_trip(state_dict, tmp_path, wrap):
    content = wrap(state_dict)
    torch.save(content, tmp_path / "official.pt")
    model, extras = read_original_checkpoint(tmp_path / "official.pt", num_attention_heads=2)
    assert model.dtype == torch.float32
    extras.save(tmp_path / "extras.safetensors")
    save_original_checkpoint(model, tmp_path / "back.pt", tmp_path / "extras.safetensors")
    if "model" in content and "ema" in content:
        torch.save({"ema": content["ema"]}, tmp_path / "official.pt")
    assert_same_files(tmp_path / "official.pt", tmp_path / "back.pt")


@pytest.mark.parametrize("form", ["legacy", "compressed"])
def test_files_that_cannot_be_mapped_into_memory(checkpoint, state_dict, tmp_path, form):
    """A compressed archive loads without an error where it is mapped, and its tensors are wrong."""
    path = tmp_path / f"{form}.pt"
    if form == "legacy":
        torch.save({"ema": state_dict}, path, _use_new_zipfile_serialization=False)
    else:
        with zipfile.ZipFile(checkpoint) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as compressed:
            for member in stored.namelist():
                compressed.writestr(member, stored.read(member))
    loaded = load_original_checkpoint(path, num_attention_heads=2)
    assert torch.equal(loaded.patch_embed.weight, state_dict["x_embedder.proj.weight"])


def test_state_dict_in_memory_is_not_shared(state_dict):
    loaded = load_original_checkpoint(state_dict, num_attention_heads=2)
    before = state_dict["final_layer.linear.weight"].clone()
    with torch.no_grad():
        loaded.proj_out.weight.zero_()
    assert torch.equal(state_dict["final_layer.linear.weight"], before)


@pytest.mark.parametrize(("width", "heads"), OFFICIAL_HEADS.items())
def test_heads_of_the_official_widths(width, heads):
    with torch.device("meta"):
        official = EndoraTransformer3DModel(heads, width // heads, num_layers=1, sample_size=4, num_frames=2)
    shapes = {
        "pos_embed": (1, 4, width),
        "temp_embed": (1, 2, width),
        "x_embedder.proj.weight": tuple(official.patch_embed.weight.shape),
        "blocks.0.attn.qkv.weight": (3 * width, width),
        "blocks.1.attn.qkv.weight": (3 * width, width),
        "blocks.0.mlp.fc1.weight": (4 * width, width),
        "final_layer.linear.weight": tuple(official.proj_out.weight.shape),
    }
    config = infer_config({k: torch.empty(s, device="meta") for k, s in shapes.items()}, "interleaved", None, "test")
    assert config == {name: official.config[name] for name in config}


def test_mlp_ratio_whose_product_rounds_down(tmp_path):
    """The file tells the hidden width; the model multiplies the ratio by the width and cuts the decimals off."""
    width, hidden = next(
        (width, hidden)
        for width in range(4, 400, 4)
        for hidden in range(1, 400)
        if int(width * (hidden / width)) < hidden
    )
    model = EndoraTransformer3DModel(
        1, width, num_layers=1, sample_size=2, num_frames=1, mlp_ratio=(hidden + 0.5) / width
    )
    save_original_checkpoint(model, tmp_path / "odd.pt")
    loaded = load_original_checkpoint(tmp_path / "odd.pt", num_attention_heads=1)
    assert loaded.get_parameter("transformer_blocks.0.ff.net.2.weight").shape == (width, hidden)


def test_model_without_variance_channels(tmp_path):
    model = EndoraTransformer3DModel(
        2, 8, in_channels=3, out_channels=3, num_layers=1, sample_size=6, patch_size=3, num_frames=2
    )
    save_original_checkpoint(model, tmp_path / "noise.pt")
    config = load_original_checkpoint(tmp_path / "noise.pt", num_attention_heads=2).config
    assert (config.in_channels, config.out_channels, config.patch_size, config.sample_size) == (3, 3, 3, 6)


# --- refusing --------------------------------------------------------------------------------------------------------


def test_every_missing_and_unexpected_key_is_named(state_dict):
    missing = ["pos_embed", "linear_2.bias", "blocks.1.mlp.fc1.weight", "blocks.3.attn.qkv.bias"]
    for key in missing:
        del state_dict[key]
    unexpected = ["blocks.2.attn.extra", "z_embedder.weight", "blocks.01.attn.qkv.bias", "blocks.123456789.x"]
    state_dict |= {key: torch.zeros(1) for key in unexpected}
    with pytest.raises(ValueError, match=r"missing keys: .*; unexpected keys: ") as error:
        load_original_checkpoint(state_dict, num_attention_heads=2)
    for key in missing + unexpected:
        assert key in str(error.value)


@pytest.mark.parametrize("key", ["temp_embed", "linear.weight", "t_embedder.mlp.2.bias", "final_layer.linear.bias"])
def test_one_missing_key(state_dict, key):
    del state_dict[key]
    with pytest.raises(ValueError, match=f"missing keys: {key}.$"):
        load_original_checkpoint(state_dict, num_attention_heads=2)


def test_last_block_missing_is_not_a_smaller_model(state_dict):
    state_dict = {key: tensor for key, tensor in state_dict.items() if not key.startswith("blocks.3.")}
    with pytest.raises(ValueError, match=r"of 4 blocks: missing keys: blocks\.3\.attn\.qkv\.weight, "):
        load_original_checkpoint(state_dict, num_attention_heads=2)


@pytest.mark.parametrize("key", ["pos_embed", "temp_embed"])
def test_drift_of_the_tables(state_dict, key):
    clean = load_original_checkpoint(state_dict, num_attention_heads=2)
    assert clean is not None  # drifted by 2e-4 in the fixture, as official ones are
    state_dict[key] = state_dict[key].clone()
    state_dict[key][0, 1, 3] += 2e-3
    with pytest.raises(
        ValueError, match=rf"{key} differs from the computed table by up to 0\.00\d+, more than 0\.001"
    ):
        load_original_checkpoint(state_dict, num_attention_heads=2)
    state_dict[key][0, 1, 3] = float("nan")
    with pytest.raises(ValueError, match=f"{key} differs .* nan"):
        load_original_checkpoint(state_dict, num_attention_heads=2)


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("blocks.1.attn.proj.weight", torch.zeros(16, 15), r"blocks\.1\.attn\.proj\.weight is \(16, 15\) instead of"),
        ("blocks.2.attn.qkv.bias", torch.zeros(47), r"blocks\.2\.attn\.qkv\.bias is \(47,\) instead of \(48,\)"),
        ("x_embedder.proj.weight", torch.zeros(16, 4, 2), r"expected \(width, channels, patch, patch\)"),
        (
            "x_embedder.proj.weight",
            torch.zeros(16, 4, 2, 1),
            r"x_embedder\.proj\.weight is \(16, 4, 2, 1\) instead of",
        ),
        ("x_embedder.proj.weight", torch.zeros(0, 4, 2, 2), "none of them 0"),
        ("pos_embed", torch.zeros(1, 5, 16), "5 positions; expected a square number"),
        ("temp_embed", torch.zeros(2, 3, 16), r"temp_embed is \(2, 3, 16\) instead of \(1, 3, 16\)"),
        ("final_layer.linear.weight", torch.zeros(30, 16), "30 outputs; expected 16, or 32 with variance"),
        ("y_embedder.embedding_table.weight", torch.zeros(1, 16), "has 1 row"),
        ("blocks.0.mlp.fc2.bias", torch.full((16,), float("nan")), "values that are not finite"),
        ("blocks.0.mlp.fc2.bias", torch.zeros(16, dtype=torch.int64), r"mlp\.fc2\.bias \(int64, strided\): expected"),
        ("blocks.0.mlp.fc2.bias", torch.zeros(16, dtype=torch.float64), "float64"),
        ("blocks.0.mlp.fc2.bias", torch.zeros(16).to_sparse(), "sparse"),
        ("blocks.0.mlp.fc2.bias", 3, "other things than tensors"),
    ],
)
def test_tensors_that_do_not_fit(state_dict, key, tensor, message):
    state_dict[key] = tensor
    with pytest.raises(ValueError, match=message):
        load_original_checkpoint({"ema": state_dict}, num_attention_heads=2)


@pytest.mark.parametrize(
    ("heads", "message"),
    [(None, "width 16 needs num_attention_heads"), (3, "=3 does not divide the width 16"), (0, "=0 does not divide")],
)
def test_heads_that_do_not_fit(state_dict, heads, message):
    with pytest.raises(ValueError, match=message):
        load_original_checkpoint(state_dict, num_attention_heads=heads)


def test_unknown_block_order(checkpoint):
    with pytest.raises(ValueError, match='block_order="temporal": expected "interleaved" or "sequential"') as error:
        load_original_checkpoint(checkpoint, "temporal", num_attention_heads=2)
    assert str(checkpoint) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
        ({}, "empty dict"),
        ({"ema": {}}, "empty dict"),
        ({"optimizer": {"lr": 1.0}, "step": 3}, r"other things than tensors \(optimizer, step\)"),
        ({3: torch.zeros(1)}, "other things than tensors"),
        ({"conv.weight": torch.zeros(2)}, "missing keys: pos_embed, .*; unexpected keys: conv.weight"),
    ],
)
def test_dicts_of_something_else(tmp_path, content, message):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        load_original_checkpoint(path)
    assert str(path) in str(error.value)


def test_files_that_are_no_checkpoints(checkpoint, tmp_path):
    content = checkpoint.read_bytes()
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        load_original_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="is a folder"):
        load_original_checkpoint(tmp_path)
    for name, data, message in [
        ("zero.pt", b"", "is empty"),
        ("half.pt", content[: len(content) // 2], "is damaged, or not a checkpoint"),
        ("cut.pt", content[:-10], "is damaged, or not a checkpoint"),
        ("text.pt", b"hello, this is no checkpoint\n", "is damaged, or not a checkpoint"),
        ("page.pt", b"<!DOCTYPE html><html></html>", "is damaged, or not a checkpoint"),
        ("random.pt", bytes(range(256)) * 20, "is damaged, or not a checkpoint"),
    ]:
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            load_original_checkpoint(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


class TouchesAFile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(state_dict, tmp_path, form):
    path, trace = tmp_path / "malicious.pt", tmp_path / "trace"
    content = {"ema": state_dict, "args": TouchesAFile(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"ema": TouchesAFile(trace)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        ValueError, match=r"malicious\.pt: refused, because it holds \w+\.system beside tensors"
    ) as error:
        load_original_checkpoint(path, num_attention_heads=2)
    assert "\n" not in str(error.value)
    assert not trace.exists()
    pickle.loads(pickle.dumps(TouchesAFile(trace)))  # it would have run
    assert trace.exists()


# --- writing ---------------------------------------------------------------------------------------------------------


def test_without_extras_everything_made_anew_is_named(checkpoint, state_dict, tmp_path):
    loaded = load_original_checkpoint(checkpoint, num_attention_heads=2)
    regenerated = save_original_checkpoint(loaded, tmp_path / "bare.pt")
    assert regenerated == {
        "pos_embed": "computed",
        "temp_embed": "computed",
        **dict.fromkeys(
            ("linear.weight", "linear.bias", "linear_2.weight", "linear_2.bias"), "zeros, no layer uses it"
        ),
    }
    written = torch.load(tmp_path / "bare.pt", weights_only=True)["ema"]
    assert list(written) == [key for key in state_dict if key != "cov.weight"]
    for key, tensor in written.items():
        assert tensor.shape == state_dict[key].shape
        if key in ("pos_embed", "temp_embed"):
            assert (tensor - state_dict[key]).abs().max() <= 2.1e-4
        elif key not in regenerated:
            assert torch.equal(tensor, state_dict[key])


def test_half_precision_model_is_written_as_float32(transformer, tmp_path):
    save_original_checkpoint(transformer.to(torch.bfloat16), tmp_path / "half.pt")
    written = torch.load(tmp_path / "half.pt", weights_only=True)["ema"]
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert torch.equal(written["final_layer.linear.bias"], transformer.proj_out.bias.float())


def test_file_is_no_larger_than_its_tensors(checkpoint, tmp_path):
    """torch.save writes the whole storage behind a view, and loading maps all tensors of a file into one."""
    model, extras = read_original_checkpoint(checkpoint, num_attention_heads=2)
    model.save_pretrained(tmp_path / "model")
    model = EndoraTransformer3DModel.from_pretrained(tmp_path / "model")
    save_original_checkpoint(model, tmp_path / "back.pt", extras)
    assert (tmp_path / "back.pt").stat().st_size < 1.02 * checkpoint.stat().st_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_layers": 3},
            "they describe 58 tensors in interleaved order, and this model has 78 in interleaved order",
        ),
        ({"num_classes": None}, "this model has 57"),
        ({"block_order": "sequential"}, "in interleaved order, and this model has 58 in sequential order"),
        ({"sample_size": 8}, r"pos_embed is \(1, 4, 16\) there, and this model's is \(1, 16, 16\)"),
        ({"num_frames": 7}, r"temp_embed is \(1, 3, 16\) there, and this model's is \(1, 7, 16\)"),
    ],
)
def test_extras_of_another_model(transformer, checkpoint, tmp_path, change, message):
    _, extras = read_original_checkpoint(checkpoint, num_attention_heads=2)
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    other = EndoraTransformer3DModel(**{**config, **change})
    with pytest.raises(ValueError, match=f"the extras belong to another model: .*{message}"):
        save_original_checkpoint(other, tmp_path / "back.pt", extras)
    assert not (tmp_path / "back.pt").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"not a safetensors file at all"])
def test_damaged_extras(transformer, tmp_path, content):
    (tmp_path / "extras.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"extras\.safetensors: is damaged, or not a file of extras"):
        save_original_checkpoint(transformer, tmp_path / "back.pt", tmp_path / "extras.safetensors")


def test_safetensors_without_layout_are_no_extras(transformer, tmp_path):
    transformer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a file of extras"):
        save_original_checkpoint(transformer, tmp_path / "x.pt", tmp_path / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [({"sample_size": (4, 8)}, "square sizes only"), ({"num_classes": 2, "class_dropout_prob": 0.0}, "null class")],
)
def test_models_that_the_official_format_cannot_express(tmp_path, config, message):
    model = EndoraTransformer3DModel(2, 8, num_layers=1, num_frames=2, **{"sample_size": 4, **config})
    with pytest.raises(ValueError, match=message):
        save_original_checkpoint(model, tmp_path / "back.pt")


def test_fused_projections_are_refused(transformer, tmp_path):
    transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"to_qkv\.weight.*unfuse projections"):
        save_original_checkpoint(transformer, tmp_path / "back.pt")


def test_failed_write_leaves_the_old_file_alone(transformer, tmp_path, monkeypatch):
    path = tmp_path / "back.pt"
    path.write_bytes(b"earlier")

    def write_half(content, file):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="no space"):
        save_original_checkpoint(transformer, path)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_of_the_checkpoint_has_to_exist(transformer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"create it first"):
        save_original_checkpoint(transformer, tmp_path / "absent" / "back.pt")


@pytest.mark.parametrize(
    "bomb",
    [torch.zeros(1, 1, 1).expand(1, 10**12, 16), torch.empty(1, 4, 16, device="meta")],
    ids=["stride 0", "meta"],
)
def test_tensors_without_the_numbers_they_claim_are_refused(state_dict, bomb):
    with pytest.raises(ValueError, match="pos_embed"):
        load_original_checkpoint({**state_dict, "pos_embed": bomb}, num_attention_heads=2)
