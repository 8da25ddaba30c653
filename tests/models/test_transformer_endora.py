"""The architecture of EndoraTransformer3DModel: official numbers, invariances, sizes beyond training, errors."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffusers_endora import EndoraTransformer3DModel
from diffusers_endora.models.original_checkpoint import load_original_checkpoint
from diffusers_endora.models.transformer_endora import spatial_position_table, temporal_position_table


def tiny_transformer(**config) -> EndoraTransformer3DModel:
    """2 pairs, 16 wide, every parameter random: the initialisation itself computes zero."""
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8} | config
    torch.manual_seed(0)
    transformer = EndoraTransformer3DModel(**config)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer.eval()


def latents(batch_size=2, num_frames=4, height=8, width=8, seed=0) -> torch.Tensor:
    return torch.randn(batch_size, 4, num_frames, height, width, generator=torch.Generator().manual_seed(seed))


def timesteps(*values: int) -> torch.Tensor:
    return torch.tensor(values)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


# Numbers of the official implementation, layout (B, F, C, H, W)


def assert_agrees(sample: torch.Tensor, expected: torch.Tensor):
    """Within 1e-5 of the tensor's standard deviation: the rounding of float32 through 28 blocks is 2e-6."""
    assert sample.shape == expected.shape
    assert (sample - expected).abs().max() < 1e-5 * expected.std()


@pytest.fixture
def load_official(official_checkpoint):
    return lambda name, **kwargs: load_original_checkpoint(
        official_checkpoint(name), num_attention_heads=4, **kwargs
    ).eval()


def test_forward_equals_the_official_one(load_official, golden):
    sample = load_official("unconditional")(golden["forward/x"].transpose(1, 2), golden["forward/t"]).sample
    assert_agrees(sample.transpose(1, 2), golden["forward/out"])


def test_joint_forward_and_its_block_outputs_equal_the_official_ones(load_official, golden):
    output = load_official("unconditional")(
        golden["joint/x"].transpose(1, 2),
        golden["joint/t"],
        num_still_images=8,
        output_spatial_states=(2, 5, 8, 11),
    )
    assert_agrees(output.sample.transpose(1, 2), golden["joint/out"])
    token_means = torch.stack([state[0].mean(-1) for state in output.spatial_states])  # (4, F, N)
    assert_agrees(token_means, golden["joint/block_tokens_mean"])


def test_sequential_order_equals_the_official_ablation(load_official, golden):
    hidden_states = golden["sequential/x"].transpose(1, 2)
    transformer = load_official("sequential", block_order="sequential")
    sample = transformer(hidden_states, golden["sequential/t"], num_still_images=8).sample
    assert_agrees(sample.transpose(1, 2), golden["sequential/out"])


def test_class_conditional_forward_equals_the_official_one(load_official, golden):
    transformer = load_official("class_conditional")
    hidden_states = golden["class/x"].transpose(1, 2)
    sample = transformer(hidden_states, golden["class/t"], class_labels=golden["class/y"]).sample
    assert_agrees(sample.transpose(1, 2), golden["class/out"])
    for label, key in ((3, "class/cfg_cond"), (transformer.null_class, "class/cfg_uncond")):
        sample = transformer(hidden_states[:1], timesteps(400), class_labels=torch.tensor([label])).sample
        assert_agrees(sample.transpose(1, 2), golden[key])


def test_position_tables_equal_those_stored_in_official_checkpoints(official_checkpoint):
    stored = torch.load(official_checkpoint("unconditional"), weights_only=True)["ema"]
    pos_embed, temp_embed = stored["pos_embed"][0], stored["temp_embed"][0]  # (64, 48), (16, 48)
    assert_close(spatial_position_table(8, 8, pos_embed), pos_embed, rtol=0, atol=2e-4)  # the EMA lets them drift
    assert_close(temporal_position_table(16, temp_embed)[:, 0], temp_embed, rtol=0, atol=2e-4)


# Positions


def sincos(positions: np.ndarray, dim: int) -> np.ndarray:
    angles = positions[:, None] / 10000 ** (2 * np.arange(dim // 2) / dim)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def test_spatial_table_encodes_the_column_then_the_row_of_a_rectangular_grid():
    table = spatial_position_table(3, 5, torch.empty(1, 12))
    rows, columns = np.divmod(np.arange(15), 5)
    expected = np.concatenate([sincos(columns, 6), sincos(rows, 6)], axis=1)
    assert_close(table, torch.from_numpy(expected).float(), rtol=0, atol=1e-6)


def test_temporal_table_encodes_the_frame():
    table = temporal_position_table(20, torch.empty(1, 12))
    assert_close(table, torch.from_numpy(sincos(np.arange(20), 12)).float()[:, None], rtol=0, atol=1e-6)


def test_position_tables_are_rounded_once_to_the_dtype_of_the_model():
    like = torch.empty(1, 12, dtype=torch.bfloat16)
    assert torch.equal(spatial_position_table(3, 5, like), spatial_position_table(3, 5, like.double()).bfloat16())
    assert torch.equal(temporal_position_table(90, like), temporal_position_table(90, like.double()).bfloat16())


def test_frame_order_enters_by_the_temporal_positions_alone():
    transformer, hidden_states = tiny_transformer(), latents()
    reversed_output = transformer(hidden_states.flip(2), timesteps(5, 500)).sample.flip(2)
    assert (reversed_output - transformer(hidden_states, timesteps(5, 500)).sample).abs().max() > 1e-2
    positions = temporal_position_table(4, torch.empty(1, 16))
    first = transformer.temporal_transformer_blocks[0]
    first.register_forward_pre_hook(lambda block, args: (args[0] - positions, *args[1:]))  # take them out again
    reversed_output = transformer(hidden_states.flip(2), timesteps(5, 500)).sample.flip(2)
    assert_close(reversed_output, transformer(hidden_states, timesteps(5, 500)).sample, rtol=0, atol=1e-5)


# Blocks


@pytest.mark.parametrize("axis", ["spatial", "temporal"])
def test_a_block_attends_along_its_own_axis_only(axis):
    transformer = tiny_transformer()
    blocks = {"spatial": transformer.transformer_blocks, "temporal": transformer.temporal_transformer_blocks}
    hidden_states, temb = torch.randn(1, 3, 4, 16), torch.randn(1, 1, 16)
    altered = hidden_states.clone()
    altered[:, 1, 2] = torch.randn(16)  # frame 1, patch 2
    difference = blocks[axis][1](altered, temb) - blocks[axis][1](hidden_states, temb)
    reached = torch.zeros(3, 4, dtype=torch.bool)
    reached[(1, slice(None)) if axis == "spatial" else (slice(None), 2)] = True
    assert torch.equal(difference.abs().amax(dim=(0, 3)) > 1e-6, reached)


def test_spatial_states_are_the_outputs_of_the_blocks_asked_for_in_that_order():
    transformer, outputs = tiny_transformer(num_layers=3), []
    for block in transformer.transformer_blocks:
        block.register_forward_hook(lambda block, args, output: outputs.append(output))
    states = transformer(latents(), timesteps(5, 500), output_spatial_states=(2, 0)).spatial_states
    assert len(states) == 2
    assert torch.equal(states[0], outputs[2])
    assert torch.equal(states[1], outputs[0])
    assert states[0].shape == (2, 4, 16, 16)  # (B, F, N, D)


@pytest.mark.parametrize("order", ["interleaved", "sequential"])
def test_block_order_is_the_order_of_execution(order):
    transformer, names = tiny_transformer(block_order=order), []
    for kind, blocks in (
        ("spatial", transformer.transformer_blocks),
        ("temporal", transformer.temporal_transformer_blocks),
    ):
        for index, block in enumerate(blocks):
            block.register_forward_hook(lambda *_, name=f"{kind} {index}": names.append(name))
    transformer(latents(), timesteps(5, 500))
    assert (
        names
        == {
            "interleaved": ["spatial 0", "temporal 0", "spatial 1", "temporal 1"],
            "sequential": ["spatial 0", "spatial 1", "temporal 0", "temporal 1"],
        }[order]
    )


# Outputs


def test_outputs_as_a_dictionary_and_as_a_tuple():
    transformer, inputs = tiny_transformer(), (latents(), timesteps(5, 500))
    output = transformer(*inputs)
    assert output.sample.shape == (2, 8, 4, 8, 8)
    assert output.spatial_states is None
    (sample,) = transformer(*inputs, return_dict=False)
    assert torch.equal(sample, output.sample)
    sample, states = transformer(*inputs, output_spatial_states=(1,), return_dict=False)
    assert torch.equal(sample, output.sample)
    assert len(states) == 1


def test_a_model_without_variance_channels_predicts_noise_alone():
    assert tiny_transformer(out_channels=4)(latents(), timesteps(5, 500)).sample.shape == (2, 4, 4, 8, 8)


def test_a_scalar_timestep_serves_the_whole_batch():
    transformer, hidden_states = tiny_transformer(), latents()
    expected = transformer(hidden_states, timesteps(7, 7)).sample
    assert_close(transformer(hidden_states, torch.tensor(7)).sample, expected, rtol=0, atol=1e-5)
    assert_close(transformer(hidden_states, timesteps(7)).sample, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(transformer(hidden_states, timesteps(7, 900)).sample[1], expected[1])


def test_samples_of_a_batch_are_independent():
    transformer, hidden_states = tiny_transformer(num_classes=3), latents()
    kwargs = {"num_still_images": 1}
    labels = torch.tensor([[0, 2], [1, 3]])
    together = transformer(hidden_states, timesteps(5, 500), class_labels=labels, **kwargs).sample
    for row, timestep in enumerate((5, 500)):
        single = slice(row, row + 1)
        alone = transformer(hidden_states[single], timesteps(timestep), class_labels=labels[single], **kwargs).sample
        assert_close(together[single], alone, rtol=0, atol=1e-5)


def test_bfloat16_weights_give_bfloat16_output_close_to_float32():
    transformer = tiny_transformer()
    expected = transformer(latents(), timesteps(5, 500)).sample
    sample = transformer.bfloat16()(latents().bfloat16(), timesteps(5, 500)).sample
    assert sample.dtype == torch.bfloat16
    assert (sample.float() - expected).std() < 0.03 * expected.std()


# Beyond the training size


@pytest.mark.parametrize(("num_frames", "height", "width"), [(1, 8, 8), (7, 8, 8), (4, 12, 6), (3, 2, 16)])
def test_other_lengths_and_resolutions_run(num_frames, height, width):
    sample = tiny_transformer()(latents(2, num_frames, height, width), timesteps(5, 500)).sample
    assert sample.shape == (2, 8, num_frames, height, width)
    assert sample.isfinite().all()


def test_patches_of_a_rectangular_frame_return_to_their_place():
    transformer = tiny_transformer(num_layers=1)
    for block in (*transformer.transformer_blocks, *transformer.temporal_transformer_blocks):
        torch.nn.init.zeros_(block.modulation.weight)  # the identity, so that tokens stay apart
        torch.nn.init.zeros_(block.modulation.bias)
    hidden_states = latents(1, 3, 4, 6)
    altered = hidden_states.clone()
    altered[:, :, 2, 3, 4] += 1  # frame 2; row 3, column 4: the patch of rows 2-3, columns 4-5
    difference = transformer(altered, timesteps(5)).sample - transformer(hidden_states, timesteps(5)).sample
    reached = torch.zeros(3, 4, 6, dtype=torch.bool)
    reached[2, 2:4, 4:6] = True
    assert torch.equal(difference.abs().amax(dim=(0, 1)) > 1e-6, reached)


def test_the_pixels_inside_a_patch_are_rows_of_columns_of_channels():
    transformer = tiny_transformer(num_layers=1, out_channels=4)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    transformer.proj_out.bias.copy_(torch.arange(16))  # bias[(row * 2 + column) * 4 + channel]
    sample = transformer(latents(1, 1, 4, 4), timesteps(5)).sample[0, :, 0]
    for row in range(4):
        for column in range(4):
            assert sample[:, row, column].tolist() == [((row % 2) * 2 + column % 2) * 4 + c for c in range(4)]


# Still images: independent images behind the video


@pytest.mark.parametrize("block_order", ["interleaved", "sequential"])
def test_video_and_still_images_do_not_see_each_other(block_order):
    transformer = tiny_transformer(block_order=block_order)
    video, stills = latents(num_frames=4), latents(num_frames=3, seed=1)
    inputs = {"timestep": timesteps(5, 500), "num_still_images": 3}
    joint = transformer(torch.cat([video, stills], dim=2), **inputs).sample

    video_alone = transformer(video, timesteps(5, 500)).sample
    assert_close(joint[:, :, :4], video_alone, rtol=0, atol=1e-5)

    permuted = transformer(torch.cat([video, stills[:, :, [2, 0, 1]]], dim=2), **inputs).sample
    assert_close(permuted[:, :, 4:], joint[:, :, [6, 4, 5]], rtol=0, atol=1e-5)
    assert_close(permuted[:, :, :4], video_alone, rtol=0, atol=1e-5)

    other_video = torch.cat([video + 1, stills], dim=2)
    assert_close(transformer(other_video, **inputs).sample[:, :, 4:], joint[:, :, 4:], rtol=0, atol=1e-5)


def test_frames_of_the_video_do_see_each_other():
    transformer, video = tiny_transformer(), latents()
    altered = video.clone()
    altered[:, :, 3] += 1
    difference = transformer(altered, timesteps(5, 500)).sample - transformer(video, timesteps(5, 500)).sample
    assert (difference.abs().amax(dim=(0, 1, 3, 4)) > 1e-5).all()


# Class labels


def test_equal_labels_may_be_given_once_or_for_every_still_image():
    transformer, inputs = tiny_transformer(num_classes=3), (latents(num_frames=6), timesteps(5, 500))
    once = transformer(*inputs, class_labels=torch.tensor([0, 2]), num_still_images=2).sample
    each = transformer(*inputs, class_labels=torch.tensor([[0, 0, 0], [2, 2, 2]]), num_still_images=2).sample
    assert_close(each, once, rtol=0, atol=1e-5)


def test_each_still_image_and_the_video_have_their_own_label():
    transformer, inputs = tiny_transformer(num_classes=3), (latents(1, num_frames=6), timesteps(5))
    kwargs = {"num_still_images": 2}
    before = transformer(*inputs, class_labels=torch.tensor([[0, 1, 2]]), **kwargs).sample
    for position, frames in ((0, [0, 1, 2, 3]), (1, [4]), (2, [5])):
        labels = torch.tensor([[0, 1, 2]])
        labels[0, position] = 3
        difference = (transformer(*inputs, class_labels=labels, **kwargs).sample - before).abs()
        assert (difference.amax(dim=(0, 1, 3, 4)) > 1e-6).nonzero().flatten().tolist() == frames


def test_training_alone_drops_labels():
    transformer = tiny_transformer(num_classes=3, class_dropout_prob=1.0)
    inputs = (latents(), timesteps(5, 500))
    labelled = transformer(*inputs, class_labels=torch.tensor([0, 1])).sample
    null = transformer(*inputs, class_labels=torch.tensor([3, 3])).sample
    assert not torch.allclose(labelled, null)
    transformer.train()
    with torch.enable_grad():
        assert torch.equal(transformer(*inputs, class_labels=torch.tensor([0, 1])).sample, null)
    with torch.no_grad():  # sampling in the middle of a training
        assert torch.equal(transformer(*inputs, class_labels=torch.tensor([0, 1])).sample, labelled)


def test_without_label_dropout_there_is_no_null_class():
    transformer = tiny_transformer(num_classes=3, class_dropout_prob=0.0)
    assert transformer.null_class is None
    assert transformer.class_embedder.embedding_table.num_embeddings == 3
    labels, inputs = torch.tensor([0, 2]), (latents(), timesteps(5, 500))
    labelled = transformer(*inputs, class_labels=labels).sample
    assert torch.equal(transformer.train()(*inputs, class_labels=labels).sample, labelled)
    with pytest.raises(ValueError, match=r"expected labels from 0 to 2\.$"):
        transformer(*inputs, class_labels=torch.tensor([0, 3]))


def test_the_null_class_follows_the_classes():
    assert tiny_transformer(num_classes=3).null_class == 3
    assert tiny_transformer().null_class is None


# Initialisation


def fresh_transformer(**config) -> EndoraTransformer3DModel:
    torch.manual_seed(0)
    return EndoraTransformer3DModel(num_attention_heads=4, attention_head_dim=16, num_layers=2, **config)


def test_a_fresh_model_computes_zero_and_its_blocks_the_identity():
    transformer = fresh_transformer(num_classes=3)
    output = transformer(latents(), timesteps(5, 500), class_labels=torch.tensor([0, 1]), output_spatial_states=(0,))
    assert torch.equal(output.sample, torch.zeros(2, 8, 4, 8, 8))
    tokens = transformer.patch_embed(latents().transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
    tokens = (tokens + spatial_position_table(4, 4, tokens)).unflatten(0, (2, 4))
    assert torch.equal(output.spatial_states[0], tokens)


def test_fresh_weights_follow_dit():
    transformer = fresh_transformer(num_classes=50)

    def fills(weight: torch.Tensor, bound: float) -> bool:  # uniform over [-bound, bound]
        return 0.99 * bound < weight.abs().max() <= bound and abs(weight.std() / (bound / 3**0.5) - 1) < 0.05

    for block in (*transformer.transformer_blocks, *transformer.temporal_transformer_blocks):
        for projection in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
            assert fills(projection.weight, (6 / (64 + 3 * 64)) ** 0.5)  # as one joint (3 D, D) matrix
        assert fills(block.attn.to_out[0].weight, (6 / (64 + 64)) ** 0.5)
        for linear in (block.ff.net[0].proj, block.ff.net[2]):
            assert fills(linear.weight, (6 / (64 + 256)) ** 0.5)
    assert fills(transformer.patch_embed.weight, (6 / (64 + 16)) ** 0.5)
    for weight in (
        transformer.time_embedder.linear_1.weight,
        transformer.time_embedder.linear_2.weight,
        transformer.class_embedder.embedding_table.weight,
    ):
        assert abs(weight.std() / 0.02 - 1) < 0.05
    assert not transformer.modulation_out.weight.any()
    for name, parameter in transformer.named_parameters():
        assert not name.endswith("bias") or not parameter.any(), name


def test_the_defaults_are_endora_xl_2():
    with torch.device("meta"):
        transformer = EndoraTransformer3DModel()
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 673_681_568  # 673.7 M
    assert len(transformer.transformer_blocks) + len(transformer.temporal_transformer_blocks) == 28
    assert not list(transformer.buffers())  # positions are computed, never stored


# Errors: each names what was given and what is expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layers": 0}, "num_layers=0: expected a positive integer"),
        ({"num_attention_heads": -1}, "num_attention_heads=-1: expected a positive integer"),
        ({"patch_size": 0}, "patch_size=0: expected a positive integer"),
        ({"num_attention_heads": 3, "attention_head_dim": 6}, "18 is the width of the model .* multiple of 4"),
        ({"out_channels": 6}, "out_channels=6: expected in_channels=4 .* or 8"),
        ({"block_order": "random"}, 'block_order="random": expected "interleaved" or "sequential"'),
    ],
)
def test_configurations_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=message):
        EndoraTransformer3DModel(**config)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"hidden_states": latents()[0]},
            r"shape \(4, 4, 8, 8\): expected \(batch, channels, frames, height, width\)",
        ),
        ({"hidden_states": latents().transpose(1, 2)[:, :3]}, r"has 3 channels .* expected in_channels=4"),
        ({"hidden_states": latents(height=7)}, "height 7 and width 8: expected positive multiples of patch_size=2"),
        ({"hidden_states": latents(width=5)}, "height 8 and width 5: expected positive multiples of patch_size=2"),
        ({"num_still_images": 4}, "num_still_images=4: expected at least 0 and fewer than the 4 frames"),
        ({"num_still_images": -1}, "num_still_images=-1: expected at least 0"),
        ({"timestep": timesteps(1, 2, 3)}, r"timestep has shape \(3,\): expected .* the 2 samples"),
        ({"timestep": torch.ones(2, 1)}, r"timestep has shape \(2, 1\)"),
        ({"output_spatial_states": (0, 2)}, r"output_spatial_states=\(0, 2\): .* 0 to 1"),
        ({"output_spatial_states": (-1,)}, r"output_spatial_states=\(-1,\)"),
        ({"class_labels": None}, "class_labels=None: .* each of the 2 samples, 0 to 2; 3 is the null class"),
        ({"class_labels": torch.tensor([0.0, 1.0])}, "class_labels is torch.float32 .* expected integers"),
        ({"class_labels": torch.tensor([0, 1, 2])}, r"of shape \(3,\): expected integers of shape \(2,\)"),
        ({"class_labels": torch.zeros(2, 3).long(), "num_still_images": 1}, r"of shape \(2, 3\): .* \(2, 2\)"),
        ({"class_labels": torch.tensor([0, 4])}, r"class_labels=\[0, 4\]: .* 0 to 2, or 3 for the null class"),
        ({"class_labels": torch.tensor([-1, 0])}, r"class_labels=\[-1, 0\]: expected labels from 0 to 2"),
    ],
)
def test_inputs_that_do_not_fit(inputs, message):
    valid = {"hidden_states": latents(), "timestep": timesteps(5, 500), "class_labels": torch.tensor([0, 1])}
    transformer = tiny_transformer(num_classes=3)
    transformer(**valid)
    with pytest.raises(ValueError, match=message):
        transformer(**valid | inputs)


def test_an_unconditional_model_refuses_labels():
    with pytest.raises(ValueError, match=r"this model is unconditional \(num_classes=None\)"):
        tiny_transformer()(latents(), timesteps(5, 500), class_labels=torch.tensor([0, 1]))
