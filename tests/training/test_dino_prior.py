"""The prior against the official numbers, its teachers against their own blocks."""

import contextlib
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DDPMScheduler
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTModel,
)

from diffusers_endora.training.diffusion_loss import diffusion_loss
from diffusers_endora.training.dino_prior import DinoPrior, interpolate_dino_positions, student_layers_for

LAYERS = (2, 5, 8, 11)
SIZES = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 48}


def tiny_teacher(kind: str = "vit", **sizes):
    """A random teacher: 32 wide, 12 blocks. All its norms and special tokens are made to matter."""
    torch.manual_seed(0)
    sizes = SIZES | sizes
    if kind == "vit":
        model = ViTModel(ViTConfig(patch_size=8, image_size=224, **sizes), add_pooling_layer=False)
    elif kind == "dinov2":
        model = Dinov2Model(Dinov2Config(patch_size=14, image_size=224, **sizes))
    elif kind == "dinov2_with_registers":
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(patch_size=14, image_size=224, **sizes))
    else:
        model = DINOv3ViTModel(DINOv3ViTConfig(patch_size=16, image_size=224, num_register_tokens=4, **sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def clips():
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.rand(*shape, generator=generator) * 2 - 1


@pytest.fixture
def official_prior(official_checkpoint):
    """A prior with the official checkpoint's convolution, 384 -> 1152; its teacher is not used."""
    prior = DinoPrior(tiny_teacher(hidden_size=384, num_attention_heads=6))
    state_dict = torch.load(official_checkpoint("unconditional"), weights_only=True)["ema"]
    prior.load_state_dict({"projection.weight": state_dict["cov.weight"]})
    return prior


# --- the official numbers


def test_projection_agrees_with_the_official_one(golden, golden_dino_tokens, official_prior):
    projected = official_prior.teacher_maps(torch.stack(golden_dino_tokens).unsqueeze(1)).squeeze(1)
    expected = golden["joint/prior_projected_mean"]
    torch.testing.assert_close(projected, expected, rtol=0, atol=1e-4 * expected.std().item())


@pytest.mark.parametrize(
    ("name", "latents", "timesteps"), [("loss", "joint/x", "joint/t"), ("loss2", "loss2/x", "loss2/t")]
)
def test_loss_agrees_with_the_official_one(
    golden, golden_dino_tokens, official_prior, official_checkpoint, name, latents, timesteps
):
    from diffusers_endora.models.original_checkpoint import load_original_checkpoint

    transformer = load_original_checkpoint(official_checkpoint("unconditional"), num_attention_heads=4).eval()
    tokens = [torch.stack([layer, layer.flip(0)])[: len(golden[timesteps])] for layer in golden_dino_tokens]
    with torch.no_grad():
        _, _, spatial_states = diffusion_loss(
            transformer,
            golden[latents].transpose(1, 2),
            golden[timesteps],
            golden[f"{name}/noise"].transpose(1, 2),
            DDPMScheduler(),
            num_still_images=8,
            output_spatial_states=official_prior.student_layers,
        )
        loss = official_prior(spatial_states, tokens)
    assert loss.item() == pytest.approx(golden[f"{name}/prior"].item(), rel=1e-5)


def test_student_side_agrees_with_the_official_one(golden, official_prior, official_checkpoint):
    from diffusers_endora.models.original_checkpoint import load_original_checkpoint

    transformer = load_original_checkpoint(official_checkpoint("unconditional"), num_attention_heads=4).eval()
    with torch.no_grad():
        output = transformer(
            golden["joint/x"].transpose(1, 2), golden["joint/t"], num_still_images=8, output_spatial_states=LAYERS
        )
    maps = official_prior.student_maps(torch.stack(output.spatial_states)).squeeze(1)
    expected = golden["joint/block_tokens_mean"]
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-4 * expected.std().item())


# --- the teachers


@pytest.mark.parametrize(
    ("kind", "size", "blocks", "norm", "num_other_tokens", "num_patches"),
    [
        ("vit", 128, "layers", "layernorm", 1, 256),
        ("dinov2", 112, "encoder.layer", "layernorm", 1, 64),
        ("dinov2_with_registers", 112, "encoder.layer", "layernorm", 5, 64),
        ("dinov3_vit", 128, "model.layer", "norm", 5, 64),
    ],
)
def test_teacher_gives_its_normed_block_outputs_less_the_other_tokens(
    tmp_path, clips, kind, size, blocks, norm, num_other_tokens, num_patches
):
    tiny_teacher(kind).save_pretrained(tmp_path)
    prior = DinoPrior.from_pretrained(tmp_path, local_files_only=True)
    outputs = []
    for block in prior.teacher.get_submodule(blocks):
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    tokens = prior.extract(clips(2, 3, 3, size, size))
    assert len(tokens) == 4
    for layer, layer_tokens in zip(LAYERS, tokens, strict=True):
        expected = prior.teacher.get_submodule(norm)(outputs[layer])[:, num_other_tokens:]
        assert layer_tokens.shape == (2, 3, num_patches, 32)
        assert torch.equal(layer_tokens.flatten(0, 1), expected)
        assert not layer_tokens.requires_grad


def test_teacher_sees_the_pixels_as_they_are(clips):
    prior = DinoPrior(tiny_teacher())
    inputs = []
    prior.teacher.embeddings.patch_embeddings.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    frames = clips(2, 2, 3, 64, 64)
    prior.extract(frames)
    assert torch.equal(inputs[0], frames.flatten(0, 1))


def bicubic_weights(num_places: int, num_values: int, ratio: float) -> torch.Tensor:
    """Keys' cubic convolution (a = -0.75) at (i + 0.5) / ratio - 0.5, edges repeated: `(num_places, num_values)`."""
    weights = torch.zeros(num_places, num_values, dtype=torch.float64)
    for place in range(num_places):
        source = (place + 0.5) / ratio - 0.5
        for neighbour in range(int(source // 1) - 1, int(source // 1) + 3):
            x = abs(source - neighbour)
            weight = 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[place, min(max(neighbour, 0), num_values - 1)] += weight
    return weights


@pytest.mark.parametrize(("height", "width"), [(128, 128), (64, 96)])
def test_positions_are_interpolated_as_in_dino(height, width):
    embeddings = tiny_teacher().embeddings
    table = embeddings.position_embeddings.detach()
    rows, columns = height // 8, width // 8
    like = torch.zeros(1, 1 + rows * columns, 32)
    interpolated = interpolate_dino_positions(embeddings, like, height, width)

    over_rows = bicubic_weights(rows, 28, (rows + 0.1) / 28)
    over_columns = bicubic_weights(columns, 28, (columns + 0.1) / 28)
    grid = table[0, 1:].unflatten(0, (28, 28)).double()
    expected = torch.einsum("rh,cw,hwd->rcd", over_rows, over_columns, grid).flatten(0, 1)
    torch.testing.assert_close(interpolated[0, 1:].double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(interpolated[0, 0], table[0, 0])
    # and transformers' own are other places
    assert (interpolated - embeddings.interpolate_pos_encoding(like, height, width)).abs().max() > 1e-3


def test_the_teacher_uses_the_positions_of_dino(clips):
    prior = DinoPrior(tiny_teacher())
    inputs = []
    prior.teacher.layers[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    frames = clips(1, 1, 3, 128, 128)
    prior.extract(frames)
    embeddings = tiny_teacher().embeddings
    patches = embeddings.patch_embeddings(frames[0])
    table = interpolate_dino_positions(embeddings, torch.zeros(1, 257, 32), 128, 128)
    torch.testing.assert_close(inputs[0][:, 1:], patches + table[:, 1:])
    trained_size = interpolate_dino_positions(embeddings, torch.zeros(1, 785, 32), 224, 224)
    assert torch.equal(trained_size, embeddings.position_embeddings)


@pytest.mark.parametrize(("kind", "num_other_tokens"), [("vit", 1), ("dinov3_vit", 5)])
def test_paper_objective_takes_the_attention_of_the_cls_token(clips, kind, num_other_tokens):
    prior = DinoPrior(tiny_teacher(kind, num_hidden_layers=1), (0,), objective="paper")
    attention = (prior.teacher.layers if kind == "vit" else prior.teacher.model.layer)[0].attention
    calls = []
    attention.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args[0], kwargs)), with_kwargs=True
    )
    (maps,) = prior.extract(clips(1, 2, 3, 64, 64))
    tokens, options = calls[0]

    # (frames, tokens, 32) -> (frames, heads, tokens, 8)
    query, key = (
        projection(tokens).unflatten(-1, (4, 8)).transpose(1, 2) for projection in (attention.q_proj, attention.k_proj)
    )
    if kind == "dinov3_vit":  # it rotates the patches' keys; the [CLS] query stays
        cos, sin = options["position_embeddings"]
        patches = key[:, :, num_other_tokens:]
        rotated = torch.cat([-patches[..., 4:], patches[..., :4]], dim=-1)
        key = torch.cat([key[:, :, :num_other_tokens], patches * cos + rotated * sin], dim=2)
    expected = (query[:, :, :1] @ key.mT / 8**0.5).softmax(-1)[:, :, 0, num_other_tokens:].mT
    torch.testing.assert_close(maps[0], expected)


# --- the comparison


def pearson_loss(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """Mean of 1 - r by torch.corrcoef; `(rows, N)` each."""
    return sum(
        1 - torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(student, teacher, strict=True)
    ) / len(student)


def small_prior(**arguments) -> DinoPrior:
    torch.manual_seed(0)
    options = {"teacher_layers": (0, 1), "student_grid": (4, 4), "projection_channels": 6} | arguments
    return DinoPrior(tiny_teacher(num_hidden_layers=2), **options)


@pytest.fixture
def states():
    """Two layers of student states and teacher tokens of `small_prior`: 2 clips of 3 frames, 4x4 and 8x8 tokens."""
    generator = torch.Generator().manual_seed(2)
    return tuple([torch.randn(2, 3, *size, generator=generator) for _ in range(2)] for size in ((16, 20), (64, 32)))


def test_loss_is_one_minus_pearson_of_the_mean_over_channels(states):
    spatial_states, tokens = states
    prior = small_prior()
    projected = prior.projection(torch.cat(tokens).flatten(0, 1).mT.unflatten(-1, (8, 8)))  # all six channels
    expected = pearson_loss(torch.cat(spatial_states).mean(-1).flatten(0, 1), projected.mean(1).flatten(1))
    assert prior(spatial_states, tokens).item() == pytest.approx(expected, abs=1e-6)


def test_the_mean_kernel_has_the_gradient_of_the_whole_convolution(states):
    _, tokens = states
    prior = small_prior()
    probe = torch.randn(2 * 2 * 3, 16)
    (prior.teacher_maps(torch.stack(tokens)).flatten(0, 2) * probe).sum().backward()
    whole = copy.deepcopy(prior.projection)
    whole.weight.grad = None
    projected = whole(torch.cat(tokens).flatten(0, 1).mT.unflatten(-1, (8, 8)))
    (projected.mean(1).flatten(1) * probe).sum().backward()
    torch.testing.assert_close(prior.projection.weight.grad, whole.weight.grad)


@pytest.mark.parametrize("objective", ["official", "paper"])
def test_loss_ignores_scale_and_shift_of_a_row(states, objective):
    spatial_states, tokens = states
    prior = small_prior(objective=objective)
    if objective == "paper":
        tokens = [layer[..., :4].softmax(-2) for layer in tokens]
    loss = prior(spatial_states, tokens)
    scaled = [layer * 30 + 2 for layer in tokens]
    if objective == "official":  # padding with zeros is no shift
        torch.testing.assert_close(prior(spatial_states, scaled), loss)
    torch.testing.assert_close(prior(spatial_states, [layer * 30 for layer in tokens]), loss)
    torch.testing.assert_close(prior([layer * 7 - 4 for layer in spatial_states], tokens), loss)


def test_the_papers_student_map_is_the_attention_of_the_mean_token(states):
    spatial_states, _ = states
    tokens = spatial_states[0]
    maps = small_prior(objective="paper").student_maps(tokens)
    normed = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    logits = torch.einsum("bfd,bfnd->bfn", normed.mean(2), normed) / 20**0.5
    torch.testing.assert_close(maps, logits.exp() / logits.exp().sum(-1, keepdim=True))


@pytest.mark.parametrize("objective", ["official", "paper"])
def test_objective_can_be_trained(states, objective):
    spatial_states, tokens = states
    prior = small_prior(objective=objective)
    if objective == "paper":
        tokens = [layer[..., :4].softmax(-2) for layer in tokens]
    spatial_states = [layer.clone().requires_grad_() for layer in spatial_states]
    before = prior(spatial_states, tokens)
    before.backward()
    assert all(layer.grad.abs().sum() > 0 for layer in [*spatial_states, prior.projection.weight])
    optimizer = torch.optim.Adam([*spatial_states, *prior.parameters()], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = prior(spatial_states, tokens)
        loss.backward()
        optimizer.step()
    assert before.item() > 0.7
    assert loss.item() < 0.2


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_constant_rows_correlate_with_nothing(states, side):
    spatial_states, tokens = states
    prior = small_prior()
    constant = spatial_states if side == "student" else tokens
    for layer in constant:
        layer.fill_(0.7)
    spatial_states = [layer.requires_grad_() for layer in spatial_states]
    loss = prior(spatial_states, tokens)
    loss.backward()
    assert loss.item() == pytest.approx(1, abs=1e-2)
    assert prior.projection.weight.grad.isfinite().all()
    assert all(layer.grad.isfinite().all() for layer in spatial_states)


def test_half_precision_is_compared_in_float32(states):
    spatial_states, tokens = ([layer.bfloat16() for layer in side] for side in states)
    prior = small_prior()
    expected = prior([layer.float() for layer in spatial_states], [layer.float() for layer in tokens])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = prior(spatial_states, tokens)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_teacher_tokens_are_pooled_to_twice_the_student_grid():
    prior = small_prior()
    generator = torch.Generator().manual_seed(3)
    fine = torch.randn(1, 1, 1, 24, 24, 32, generator=generator)
    pooled = fine.unflatten(4, (8, 3)).unflatten(3, (8, 3)).mean((4, 6))  # 3x3 patches to one, then 2x2 to one
    torch.testing.assert_close(prior.teacher_maps(fine.flatten(3, 4)), prior.teacher_maps(pooled.flatten(3, 4)))
    # a grid of the student's size repeats each patch
    coarse = pooled[:, :, :, ::2, ::2]
    doubled = coarse.repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(prior.teacher_maps(coarse.flatten(3, 4)), prior.teacher_maps(doubled.flatten(3, 4)))


def test_rectangular_clips_keep_their_rows_and_columns(clips):
    prior = small_prior(student_grid=(2, 3))
    tokens = prior.extract(clips(1, 1, 3, 32, 48))[0]
    maps = prior.teacher_maps(tokens[None])
    grid = tokens[0, 0].unflatten(0, (4, 6))  # 32x48 pixels in patches of 8
    kernel = prior.projection.weight.mean(0)  # (C, 2, 2)
    for row in range(2):
        for column in range(3):
            window = grid[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = torch.einsum("hwc,chw->", window, kernel)
            torch.testing.assert_close(maps[0, 0, 0, 3 * row + column], expected, rtol=1e-4, atol=1e-5)


# --- REPA


def repa_prior(**arguments) -> DinoPrior:
    return small_prior(**{"objective": "repa", "student_width": 20, "projection_channels": 24} | arguments)


def test_repa_is_the_cosine_of_each_token_with_the_mean_of_the_patches_it_covers(states):
    spatial_states, tokens = states
    prior = repa_prior()
    similarities = []
    for project, student, teacher in zip(prior.projection, spatial_states, tokens, strict=True):
        first, second, third = (layer for layer in project if isinstance(layer, nn.Linear))
        hidden = F.silu(second(F.silu(first(student))))
        projected = third(hidden)  # (B, F, 4 x 4, C)
        for row in range(4):
            for column in range(4):
                window = teacher.unflatten(2, (8, 8))[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                target, token = window.mean((2, 3)), projected[:, :, 4 * row + column]
                similarities.append((target * token).sum(-1) / target.norm(dim=-1) / token.norm(dim=-1))
    torch.testing.assert_close(prior(spatial_states, tokens), 1 - torch.stack(similarities).mean())


def test_repa_is_zero_at_its_best_and_two_at_its_worst(states):
    _, tokens = states
    prior = repa_prior(student_grid=(8, 8), student_width=32)
    prior.projection = nn.ModuleList([nn.Identity()] * len(tokens))
    for factor, expected in ((3.0, 0.0), (-0.2, 2.0)):
        assert prior([layer * factor for layer in tokens], tokens).item() == pytest.approx(expected, abs=1e-6)


def test_repa_can_be_trained(states):
    spatial_states, tokens = states
    prior = repa_prior()
    assert prior(spatial_states, tokens).item() == pytest.approx(1, abs=0.1)
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = prior(spatial_states, tokens)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    assert len(prior.state_dict()) == 2 * 3 * 2  # a perceptron of three layers for each block


def test_the_teacher_of_repa_sees_pixels_as_in_its_training(clips):
    prior = repa_prior()
    inputs = []
    prior.teacher.embeddings.patch_embeddings.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    frames = clips(1, 2, 3, 64, 64)
    prior.extract(frames)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((frames[0].permute(0, 2, 3, 1) + 1) / 2 - mean) / std
    torch.testing.assert_close(inputs[0].permute(0, 2, 3, 1), expected)


def test_repa_knows_the_width_of_its_student(states):
    spatial_states, tokens = states
    with pytest.raises(ValueError, match="spatial_states has 20 channels: expected student_width=16"):
        repa_prior(student_width=16)(spatial_states, tokens)


# --- sizes that the patches do not divide, tokens extracted before


@pytest.mark.parametrize(
    ("patch_size", "size", "expected"),
    [
        (14, (128, 128), (126, 126)),
        (14, (256, 256), (252, 252)),
        (14, (128, 192), (140, 210)),
        (14, (112, 126), (112, 126)),
        (16, (128, 96), (128, 96)),
        (8, (4, 4), (8, 8)),
    ],
)
def test_the_teacher_sees_the_nearest_size_of_the_same_proportions(patch_size, size, expected):
    prior = DinoPrior(ViTConfig(patch_size=patch_size, image_size=224))
    assert prior.teacher_size(*size) == expected
    assert prior.token_shape(*size) == (expected[0] * expected[1] // patch_size**2, 768)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov2_with_registers", "dinov3_vit"])
@pytest.mark.parametrize("objective", ["official", "paper", "repa"])
def test_every_teacher_serves_clips_of_128_pixels(clips, kind, objective):
    teacher = tiny_teacher(kind, num_hidden_layers=1)
    prior = DinoPrior(teacher, (0,), objective=objective, student_width=20, projection_channels=8)
    frames = clips(1, 2, 3, 128, 128)
    tokens = prior.extract(frames)
    assert tokens[0].shape == (1, 2, *prior.token_shape(128, 128))
    assert prior([torch.randn(1, 2, 64, 20)], tokens).isfinite()
    if "dinov2" in kind:
        resized = F.interpolate(frames[0], (126, 126), mode="bicubic", antialias=True)
        torch.testing.assert_close(prior.extract(resized[None]), tokens)


@pytest.mark.parametrize("objective", ["official", "paper", "repa"])
def test_tokens_of_before_train_without_a_teacher(tmp_path, clips, objective):
    tiny_teacher(num_hidden_layers=2).save_pretrained(tmp_path)
    arguments = {"teacher_layers": (1,), "objective": objective, "student_width": 20, "projection_channels": 8}
    whole = DinoPrior.from_pretrained(tmp_path, **arguments)
    tokens = whole.extract(clips(1, 2, 3, 128, 128))
    (tmp_path / "model.safetensors").unlink()
    prior = DinoPrior.from_config(tmp_path, **arguments)
    prior.load_state_dict(whole.state_dict())
    spatial_states = [torch.randn(1, 2, 64, 20)]
    assert torch.equal(prior(spatial_states, tokens), whole(spatial_states, tokens))
    assert prior.token_shape(128, 128) == whole.token_shape(128, 128) == tokens[0].shape[2:]
    assert prior.teacher is None
    assert copy.deepcopy(prior).to(torch.float64).train().teacher is None
    with pytest.raises(ValueError, match="built without its teacher: use from_pretrained"):
        prior.extract(clips(1, 2, 3, 128, 128))


@pytest.mark.parametrize("objective", ["official", "paper", "repa"])
def test_the_loss_reads_nothing_back_from_the_device(monkeypatch, objective):
    """Tensors on the meta device, which has no autocast, have no values to read."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    prior = DinoPrior(ViTConfig(**SIZES), objective=objective, student_width=20).to("meta")
    channels = prior.token_shape(128, 128)[1]
    spatial_states = [torch.empty(2, 3, 64, 20, device="meta", requires_grad=True) for _ in LAYERS]
    loss = prior(spatial_states, [torch.empty(2, 3, 256, channels, device="meta") for _ in LAYERS])
    loss.backward()
    assert loss.shape == spatial_states[0].grad.mean().shape == ()


# --- layers, state, errors


@pytest.mark.parametrize(
    ("num_pairs", "expected"),
    [(14, (2, 5, 8, 11)), (12, (2, 5, 8, 11)), (6, (1, 2, 4, 5)), (4, (1, 1, 2, 3)), (1, (0, 0, 0, 0))],
)
def test_student_layers(num_pairs, expected):
    assert student_layers_for(num_pairs) == expected
    assert DinoPrior(tiny_teacher(), num_layers=num_pairs, projection_channels=1).student_layers == expected


def test_student_layers_may_be_chosen(states):
    prior = small_prior(student_layers=(3, 1))
    assert prior.student_layers == (3, 1)
    with pytest.raises(ValueError, match="have no counterpart among 6 spatial blocks"):
        student_layers_for(6, (2, 23))


def test_the_teacher_is_frozen_and_the_convolution_is_not():
    prior = DinoPrior(tiny_teacher().train())
    assert {name: tuple(value.shape) for name, value in prior.state_dict().items()} == {
        "projection.weight": (1152, 32, 2, 2)
    }
    assert [name for name, _ in prior.named_parameters()] == ["projection.weight"]
    prior.train().requires_grad_(True)
    assert not any(module.training for module in prior.teacher.modules())
    assert not any(parameter.requires_grad for parameter in prior.teacher.parameters())
    prior.to(torch.float64)
    assert {parameter.dtype for parameter in prior.teacher.parameters()} == {torch.float64}


def test_the_convolution_starts_as_pytorch_starts_it():
    torch.manual_seed(5)
    expected = nn.Conv2d(32, 1152, 2, stride=2, bias=False).weight
    teacher = tiny_teacher()
    torch.manual_seed(5)
    assert torch.equal(DinoPrior(teacher).projection.weight, expected)
    assert DinoPrior(teacher, objective="paper").projection.weight.shape == (1152, 4, 3, 3)


def test_a_copy_has_its_own_teacher(clips):
    prior = DinoPrior(tiny_teacher(num_hidden_layers=1), (0,))
    frames = clips(1, 1, 3, 64, 64)
    expected = prior.extract(frames)[0]
    twin = copy.deepcopy(prior)
    nn.init.zeros_(prior.teacher.embeddings.position_embeddings)
    assert torch.equal(twin.extract(frames)[0], expected)


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='objective="best": expected "official", "paper" or "repa"'):
        DinoPrior(tiny_teacher(), objective="best")
    with pytest.raises(ValueError, match='student_width=None with objective="repa"'):
        DinoPrior(tiny_teacher(), objective="repa")
    with pytest.raises(ValueError, match="expected blocks of the teacher, 0 to 3"):
        DinoPrior(tiny_teacher(num_hidden_layers=4))
    with pytest.raises(ValueError, match="expected one for each of teacher_layers"):
        DinoPrior(tiny_teacher(), student_layers=(1, 2))


def test_inputs_that_do_not_fit_are_refused(clips, states):
    spatial_states, tokens = states
    prior = small_prior()
    with pytest.raises(ValueError, match=r"expected \(batch, frames, 3, height, width\)"):
        prior.extract(clips(1, 3, 64, 64))
    with pytest.raises(ValueError, match="expected one for each of the 2 layers"):
        prior(spatial_states[:1], tokens)
    with pytest.raises(ValueError, match="expected equal batch and frames"):
        prior([layer[:, :2] for layer in spatial_states], tokens)
    with pytest.raises(ValueError, match="4x4 spatial tokens"):
        prior([layer[:, :, :9] for layer in spatial_states], tokens)
    with pytest.raises(ValueError, match="60 patches: expected a grid of the proportions of the student's 4x4"):
        prior(spatial_states, [layer[:, :, :60] for layer in tokens])


def test_teachers_that_do_not_load_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not load .*facebook/dino-vits8"):
        DinoPrior.from_pretrained(tmp_path / "absent", local_files_only=True)
    with pytest.raises(ValueError, match=r"does not load .*facebook/dino-vits8"):
        DinoPrior.from_config(tmp_path / "absent", local_files_only=True)
    bert = BertModel(BertConfig(vocab_size=8, **SIZES | {"num_hidden_layers": 1}))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r'its model_type is "bert".*facebook/dino-vits8'):
        DinoPrior.from_pretrained(tmp_path / "bert")
    teacher = tiny_teacher(num_hidden_layers=1)
    weights = {name: value for name, value in teacher.state_dict().items() if name != "layernorm.bias"}
    teacher.save_pretrained(tmp_path / "partial", state_dict=weights)
    with pytest.raises(ValueError, match=r"its weights lack layernorm.bias"):
        DinoPrior.from_pretrained(tmp_path / "partial", (0,))
