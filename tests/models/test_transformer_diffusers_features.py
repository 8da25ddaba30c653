"""What diffusers offers for any transformer works for EndoraTransformer3DModel too."""

import copy
import inspect
import json

import diffusers
import pytest
import torch
import torch.nn as nn
from diffusers import AutoModel
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from diffusers_endora import EndoraTransformer3DModel
from diffusers_endora.models.transformer_endora import EndoraAttention, EndoraAttnProcessor


def tiny_transformer(seed=0, **config) -> EndoraTransformer3DModel:
    """2 pairs, 16 wide, every parameter random: the initialisation itself computes zero."""
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8} | config
    torch.manual_seed(seed)
    transformer = EndoraTransformer3DModel(**config)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return transformer.eval()


def tiny_inputs(seed=0, timestep=500, height=8, width=8, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(2, 4, 4, height, width, generator=generator).to(dtype)
    return {"hidden_states": hidden_states, "timestep": torch.tensor([timestep, timestep])}


def joint_inputs(seed=0) -> dict:
    """A class-conditional batch of 3 video frames and 1 still image, each with its own label."""
    return tiny_inputs(seed) | {"class_labels": torch.tensor([[0, 1], [2, 3]]), "num_still_images": 1}


@torch.no_grad()
def run(transformer, inputs=None, **kwargs) -> torch.Tensor:
    return transformer(**(tiny_inputs() if inputs is None else inputs), **kwargs).sample


def all_blocks(transformer) -> list[nn.Module]:
    return [*transformer.transformer_blocks, *transformer.temporal_transformer_blocks]


@pytest.fixture
def count_calls():
    """Returns `modules -> list` that grows by one index at each call of one of the modules."""

    def count(modules) -> list[int]:
        calls = []
        for index, module in enumerate(modules):
            module.register_forward_hook(lambda *_, index=index: calls.append(index))
        return calls

    return count


# Training


def gradients(transformer, inputs) -> dict[str, torch.Tensor]:
    output = transformer(**inputs, output_spatial_states=(0,))
    (output.sample.square().mean() + output.spatial_states[0].square().mean()).backward()
    return {name: parameter.grad for name, parameter in transformer.named_parameters()}


def test_every_parameter_takes_part_in_training():
    for name, gradient in gradients(tiny_transformer(num_classes=4).train(), joint_inputs()).items():
        assert gradient is not None, name
        assert gradient.any(), name


def test_gradient_checkpointing_recomputes_every_block_and_gives_equal_gradients(count_calls):
    plain, checkpointed = tiny_transformer(num_classes=4), tiny_transformer(num_classes=4)
    assert not checkpointed.is_gradient_checkpointing
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    plain_calls, calls = (count_calls(block.norm1 for block in all_blocks(model)) for model in (plain, checkpointed))
    expected = gradients(plain, joint_inputs())
    actual = gradients(checkpointed, joint_inputs())
    assert len(plain_calls) == 4
    assert sorted(calls) == [0, 0, 1, 1, 2, 2, 3, 3]
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, rtol=0, atol=0)
    calls.clear()
    run(checkpointed, joint_inputs())  # without gradients there is nothing to recompute
    assert sorted(calls) == [0, 1, 2, 3]
    checkpointed.disable_gradient_checkpointing()
    assert not checkpointed.is_gradient_checkpointing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_training(dtype):
    transformer = tiny_transformer(num_classes=4).train()
    expected = run(transformer.eval(), joint_inputs())
    with torch.autocast("cpu", dtype):
        output = transformer(**joint_inputs()).sample
        loss = output.float().square().mean()
    loss.backward()
    assert (output - expected).std() < 0.03 * expected.std()
    assert all(parameter.grad.dtype == torch.float32 for parameter in transformer.parameters())


def test_ema_model_averages_saves_and_loads(tmp_path):
    transformer = tiny_transformer()
    ema = EMAModel(
        transformer.parameters(), decay=0.5, model_cls=EndoraTransformer3DModel, model_config=transformer.config
    )
    before = copy.deepcopy(transformer.state_dict())
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(1)
    ema.optimization_step = 1000  # past the warm-up of the decay
    ema.step(transformer.parameters())
    ema.save_pretrained(tmp_path)
    averaged = EMAModel.from_pretrained(tmp_path, EndoraTransformer3DModel)
    averaged.copy_to(transformer.parameters())
    for name, parameter in transformer.named_parameters():
        assert_close(parameter.data, before[name] + 0.5)
    assert averaged.optimization_step == 1001


# Attention: back ends, processors, fused projections


@pytest.mark.parametrize("over_time", [False, True])
def test_attention_is_the_textbook_formula(over_time):
    torch.manual_seed(0)
    attention = EndoraAttention(16, heads=2, over_time=over_time)
    tokens = torch.randn(2, 3, 5, 16)
    sequence = tokens.transpose(1, 2) if over_time else tokens
    query, key, value = (
        projection(sequence).unflatten(-1, (2, 8)).transpose(2, 3)  # (B, F or N, heads, length, 8)
        for projection in (attention.to_q, attention.to_k, attention.to_v)
    )
    weights = (query @ key.mT / 8**0.5).softmax(-1)
    expected = attention.to_out[0]((weights @ value).transpose(2, 3).flatten(3))
    assert_close(attention(tokens), expected.transpose(1, 2) if over_time else expected)


def test_attention_back_ends_are_used_and_agree(monkeypatch):
    transformer, name = tiny_transformer(), AttentionBackendName._NATIVE_MATH
    expected, calls = run(transformer), []
    back_end = _AttentionBackendRegistry._backends[name]

    def spy(*args, **kwargs):
        calls.append(kwargs["query"].shape)
        return back_end(*args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, spy)
    with attention_backend(name):
        by_context = run(transformer)
    assert sorted(calls) == [(8, 16, 2, 8), (8, 16, 2, 8), (32, 4, 2, 8), (32, 4, 2, 8)]  # (rows, length, heads, 8)
    active, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        transformer.set_attention_backend(name.value)
        by_method = run(transformer)
        assert len(calls) == 8
    finally:
        transformer.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(active)
    assert torch.equal(by_method, by_context)
    assert_close(by_context, expected, rtol=0, atol=1e-5)
    assert torch.equal(run(transformer), expected)
    assert len(calls) == 8


def test_fused_projections_give_the_same_output_and_can_be_undone(count_calls):
    transformer = tiny_transformer()
    expected = run(transformer)
    transformer.fuse_qkv_projections()
    calls = count_calls(block.attn.to_qkv for block in all_blocks(transformer))
    assert_close(run(transformer), expected, rtol=0, atol=1e-5)
    assert sorted(calls) == [0, 1, 2, 3]
    transformer.unfuse_qkv_projections()
    assert not any(hasattr(block.attn, "to_qkv") for block in all_blocks(transformer))
    assert torch.equal(run(transformer), expected)


def test_processors_can_be_listed_and_replaced():
    class Half(EndoraAttnProcessor):
        def __call__(self, attn, hidden_states):
            return super().__call__(attn, hidden_states) / 2

    transformer = tiny_transformer()
    expected = run(transformer)
    processors = transformer.attn_processors
    assert set(processors) == {
        f"{kind}.{index}.attn.processor"
        for kind in ("transformer_blocks", "temporal_transformer_blocks")
        for index in (0, 1)
    }
    transformer.set_attn_processor({name: Half() for name in processors})
    assert all(isinstance(processor, Half) for processor in transformer.attn_processors.values())
    assert not torch.allclose(run(transformer), expected)
    transformer.set_attn_processor(EndoraAttnProcessor())
    assert torch.equal(run(transformer), expected)
    with pytest.raises(ValueError, match="number of processors"):
        transformer.set_attn_processor({next(iter(processors)): Half()})


# LoRA


def lora_config(rank=4) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
    )


def test_lora_is_added_scaled_and_switched_off():
    transformer = tiny_transformer()
    base = run(transformer)
    transformer.add_adapter(lora_config(), adapter_name="first")
    adapted = run(transformer)
    assert not torch.allclose(adapted, base, atol=1e-3)
    assert_close(run(transformer, attention_kwargs={"scale": 0.0}), base, rtol=0, atol=1e-5)
    assert torch.equal(run(transformer), adapted)  # the scale holds for one call
    halved = run(transformer, attention_kwargs={"scale": 0.5})
    transformer.set_adapters("first", 0.5)
    assert_close(run(transformer), halved, rtol=0, atol=1e-5)
    transformer.disable_adapters()
    assert_close(run(transformer), base, rtol=0, atol=1e-5)


def test_lora_is_saved_and_loaded(tmp_path):
    transformer = tiny_transformer()
    base = run(transformer)
    transformer.add_adapter(lora_config())
    adapted = run(transformer)
    transformer.save_lora_adapter(tmp_path)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(saved) == 4 * 4 * 2  # blocks x projections x (A, B)
    transformer.unload_lora()
    assert torch.equal(run(transformer), base)
    transformer.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, adapter_name="loaded")
    assert torch.equal(run(transformer), adapted)
    transformer.delete_adapters("loaded")
    assert torch.equal(run(transformer), base)


def test_lora_is_fused_and_unfused():
    transformer = tiny_transformer()
    weight = transformer.transformer_blocks[0].attn.to_q.weight
    before = weight.clone()
    transformer.add_adapter(lora_config())
    adapted = run(transformer)
    transformer.fuse_lora()
    assert not torch.allclose(weight, before, atol=1e-3)
    assert_close(run(transformer), adapted, rtol=0, atol=1e-4)
    transformer.unfuse_lora()
    assert_close(weight, before, rtol=0, atol=1e-5)
    assert_close(run(transformer), adapted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("ranks", [(7, 13), (13, 7)])
def test_lora_is_hotswapped_in_a_compiled_model_without_recompiling(tmp_path, ranks):
    expected = []
    for index, rank in enumerate(ranks):
        transformer = tiny_transformer(num_layers=1)
        transformer.add_adapter(lora_config(rank))
        expected.append(run(transformer))
        transformer.save_lora_adapter(tmp_path / str(index))
    transformer = tiny_transformer(num_layers=1)
    transformer.enable_lora_hotswap(target_rank=13)
    transformer.load_lora_adapter(tmp_path / "0", prefix=None, use_safetensors=True, adapter_name="adapter")
    torch.compiler.reset()
    compiled = torch.compile(transformer, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(run(compiled), expected[0], rtol=0, atol=1e-4)
        transformer.load_lora_adapter(
            tmp_path / "1", prefix=None, use_safetensors=True, adapter_name="adapter", hotswap=True
        )
        assert_close(run(compiled), expected[1], rtol=0, atol=1e-4)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)


# Compilation


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check_compiled_model(backend):
    transformer, inputs = tiny_transformer(num_classes=4), joint_inputs()
    expected = run(transformer, inputs)
    compiled = torch.compile(transformer, backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert_close(run(compiled, inputs), expected, rtol=0, atol=1e-4)


def check_compiled_blocks(backend):
    transformer, inputs = tiny_transformer(num_layers=3), tiny_inputs()
    expected = run(transformer, inputs)
    transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1):  # one graph for each class of blocks
        for _ in range(2):
            assert_close(run(transformer, inputs), expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
def test_the_model_is_one_graph_and_compiles_once():
    check_compiled_model("aot_eager")


@pytest.mark.usefixtures("fresh_compiler")
def test_repeated_blocks_compile_to_one_graph_each():
    check_compiled_blocks("aot_eager")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("check", [check_compiled_model, check_compiled_blocks])
def test_inductor(check):
    check("inductor")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_one_dynamic_graph_serves_every_resolution():
    transformer = tiny_transformer(num_layers=1)
    compiled = torch.compile(transformer, backend="eager", fullgraph=True, dynamic=True)
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        torch.fx.experimental._config.patch(use_duck_shape=False),
    ):
        for height, width in ((8, 8), (12, 6), (4, 10)):
            inputs = tiny_inputs(height=height, width=width)
            assert_close(run(compiled, inputs), run(transformer, inputs), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_a_group_offloaded_model_compiles():
    transformer = tiny_transformer(num_layers=1)
    expected = run(transformer)
    transformer.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    transformer.compile(backend="eager")
    for _ in range(2):
        assert_close(run(transformer), expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_the_model_exports():
    transformer = tiny_transformer(num_layers=1)
    exported = torch.export.export(transformer, args=(), kwargs=tiny_inputs()).module()
    assert_close(run(exported, tiny_inputs(seed=1)), run(transformer, tiny_inputs(seed=1)), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_the_model_is_packaged_ahead_of_time(tmp_path):
    transformer, package = tiny_transformer(num_layers=1), str(tmp_path / "transformer.pt2")
    exported = torch.export.export(transformer, args=(), kwargs=tiny_inputs())
    torch._inductor.aoti_compile_and_package(exported, package_path=package)
    loaded = torch._inductor.aoti_load_package(package)
    assert_close(run(loaded, tiny_inputs(seed=1)), run(transformer, tiny_inputs(seed=1)), rtol=0, atol=1e-4)


# Memory: layerwise casting, offloading


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_layerwise_casting(storage_dtype, compute_dtype):
    transformer = tiny_transformer(num_classes=4)
    inputs = joint_inputs()
    expected = run(transformer, inputs)
    transformer = transformer.to(compute_dtype)
    whole = transformer.get_memory_footprint()
    transformer.enable_layerwise_casting(storage_dtype, compute_dtype)
    for block in all_blocks(transformer):
        assert {parameter.dtype for parameter in block.parameters()} == {storage_dtype}
    for name in ("patch_embed", "time_embedder", "class_embedder", "modulation_out"):
        assert {parameter.dtype for parameter in getattr(transformer, name).parameters()} == {compute_dtype}
    assert transformer.get_memory_footprint() < whole
    inputs["hidden_states"] = inputs["hidden_states"].to(compute_dtype)
    sample = run(transformer, inputs)
    assert sample.dtype == compute_dtype
    assert (sample.float() - expected).std() < 0.3 * expected.std()


def test_layerwise_casting_training():
    transformer = tiny_transformer(num_classes=4).train()
    transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with torch.autocast("cpu"):
        loss = transformer(**joint_inputs()).sample.square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in transformer.parameters())


@pytest.mark.parametrize(
    "options",
    [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}],
    ids=["block_level", "leaf_level"],
)
@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
def test_group_offload(tmp_path, options, to_disk):
    transformer, inputs = tiny_transformer(num_classes=4), joint_inputs()
    expected = run(transformer, inputs)
    if to_disk:
        options = options | {"offload_to_disk_path": str(tmp_path)}
    transformer.enable_group_offload(torch.device("cpu"), offload_device=torch.device("cpu"), **options)
    hooked = [module for module in transformer.modules() if hasattr(module, "_diffusers_hook")]
    assert len(hooked) > 4
    assert all(module._diffusers_hook.get_hook("group_offloading") is not None for module in hooked)
    for _ in range(2):
        assert torch.equal(run(transformer, inputs), expected)


def test_group_offload_with_layerwise_casting():
    transformer = tiny_transformer()
    expected = run(transformer)
    transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    transformer.enable_layerwise_casting(torch.float16, torch.float32)
    assert_close(run(transformer), expected, rtol=0, atol=0.02)


def test_blocks_offloaded_to_disk_by_a_device_map(tmp_path):
    transformer = tiny_transformer()
    transformer.save_pretrained(tmp_path / "model")
    device_map = {name: "cpu" for name, _ in transformer.named_children()} | {"temporal_transformer_blocks": "disk"}
    loaded = EndoraTransformer3DModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert {parameter.device.type for parameter in loaded.temporal_transformer_blocks.parameters()} == {"meta"}
    assert torch.equal(run(loaded), run(transformer))


# Saving and loading


def test_weights_are_saved_and_loaded(tmp_path):
    transformer = tiny_transformer(num_classes=4, class_dropout_prob=0.2, block_order="sequential")
    transformer.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded = EndoraTransformer3DModel.from_pretrained(tmp_path)
    assert not loaded.training
    for name in inspect.signature(EndoraTransformer3DModel).parameters:
        assert loaded.config[name] == transformer.config[name]
    assert torch.equal(run(loaded, joint_inputs()), run(transformer, joint_inputs()))
    assert type(AutoModel.from_pretrained(str(tmp_path))) is EndoraTransformer3DModel


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("parallel", [False, True], ids=["in turn", "in parallel"])
def test_shards_are_saved_and_loaded(tmp_path, monkeypatch, variant, parallel):
    transformer = tiny_transformer()
    transformer.save_pretrained(tmp_path, max_shard_size="30KB", variant=variant)
    infix = "" if variant is None else f".{variant}"
    index = json.loads((tmp_path / f"diffusion_pytorch_model.safetensors.index{infix}.json").read_text())
    shards = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(shards) > 1
    assert set(index["weight_map"].values()) == shards
    assert set(index["weight_map"]) == set(transformer.state_dict())
    monkeypatch.setattr(diffusers.models.modeling_utils, "HF_ENABLE_PARALLEL_LOADING", parallel)
    loaded = EndoraTransformer3DModel.from_pretrained(tmp_path, variant=variant)
    assert torch.equal(run(loaded), run(transformer))


def test_variants_are_loaded_by_their_name_only(tmp_path):
    transformer = tiny_transformer()
    transformer.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").exists()
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        EndoraTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(run(EndoraTransformer3DModel.from_pretrained(tmp_path, variant="fp16")), run(transformer))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_half_precision_weights_are_saved_loaded_and_run(tmp_path, dtype, low_cpu_mem_usage):
    transformer = tiny_transformer()
    expected = run(transformer)
    transformer.to(dtype).save_pretrained(tmp_path)
    loaded = EndoraTransformer3DModel.from_pretrained(tmp_path, dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    sample = run(loaded, tiny_inputs(dtype=dtype))
    assert sample.dtype == dtype
    assert torch.equal(sample, run(transformer, tiny_inputs(dtype=dtype)))
    assert (sample.float() - expected).std() < 0.03 * expected.std()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_checkpoint_that_lacks_parameters_is_an_error(tmp_path, low_cpu_mem_usage):
    tiny_transformer().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state_dict = load_file(weights)
    del state_dict["proj_out.bias"], state_dict["transformer_blocks.1.attn.to_q.weight"]
    save_file(state_dict, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 of .*: proj_out\.bias, transformer_blocks\.1\.attn\.to_q\.weight"):
        EndoraTransformer3DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_loading_info_is_returned_where_asked_for(tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"linear_2.bias": torch.zeros(1)}, weights, metadata={"format": "pt"})
    transformer, info = EndoraTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(transformer, EndoraTransformer3DModel)
    assert info["missing_keys"] == []
    assert info["unexpected_keys"] == ["linear_2.bias"]


# Caches. Blocks 0 and 1 are spatial, 2 and 3 temporal; they run in the order 0, 2, 1, 3


class Clock:
    """The timestep of the denoising loop, as caches ask for it."""

    now = 999

    def __call__(self) -> int:
        return self.now


def cache_configs(clock: Clock) -> dict:
    """Such that the first step at 999 computes everything and the next one at 600 reuses what it can."""
    return {
        "FirstBlockCache": FirstBlockCacheConfig(threshold=1e6),
        "MagCache": MagCacheConfig(num_inference_steps=2, retention_ratio=0.0, threshold=100.0, mag_ratios=[1.0, 1.0]),
        "TaylorSeer": TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1),
        "SeaCache": SeaCacheConfig(
            threshold=100.0,
            retention_steps=0,
            cache_end_steps=0,
            raw_vision_callback=lambda transformer, args, kwargs: list(kwargs["hidden_states"]),
        ),
        "PyramidAttentionBroadcast": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            temporal_attention_block_skip_range=2,
            current_timestep_callback=clock,
        ),
        "FasterCache": FasterCacheConfig(temporal_attention_block_skip_range=2, current_timestep_callback=clock),
    }


CACHES = {  # the blocks and the attentions that the second step computes
    "FirstBlockCache": ([0], [0]),
    "MagCache": ([], []),
    "TaylorSeer": ([0, 2, 1, 3], []),
    "SeaCache": ([], []),
    "PyramidAttentionBroadcast": ([0, 2, 1, 3], []),
    "FasterCache": ([0, 2, 1, 3], []),
}


def step(transformer, clock: Clock, index: int, inputs: dict | None = None, context="cond", **kwargs):
    clock.now = (999, 600, 580)[index]
    inputs = tiny_inputs(seed=index, timestep=clock.now) if inputs is None else inputs
    with transformer.cache_context(context, step_index=index, num_inference_steps=3, sigma=0.9 - 0.3 * index):
        return run(transformer, inputs, **kwargs)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_skips_what_it_says_and_leaves_no_trace(name, count_calls):
    transformer, clock = tiny_transformer(), Clock()
    blocks = count_calls(block.norm1 for block in all_blocks(transformer))
    attentions = count_calls(block.attn.to_v for block in all_blocks(transformer))
    expected = [step(transformer, clock, index) for index in (0, 1)]
    config = cache_configs(clock)[name]
    transformer.enable_cache(config)
    assert transformer.is_cache_enabled
    with pytest.raises(ValueError, match="Caching has already been enabled"):
        transformer.enable_cache(config)

    blocks.clear(), attentions.clear()
    assert torch.equal(step(transformer, clock, 0), expected[0])
    assert (blocks, attentions) == ([0, 2, 1, 3], [0, 2, 1, 3])
    blocks.clear(), attentions.clear()
    approximated = step(transformer, clock, 1)
    assert (blocks, attentions) == CACHES[name]
    assert approximated.shape == expected[1].shape
    assert approximated.isfinite().all()
    assert not torch.allclose(approximated, expected[1], atol=1e-3)

    transformer._reset_stateful_cache()
    assert torch.equal(step(transformer, clock, 0), expected[0])
    transformer.disable_cache()
    assert not transformer.is_cache_enabled
    assert torch.equal(step(transformer, clock, 1), expected[1])


@pytest.mark.parametrize("name", ["FirstBlockCache", "MagCache", "TaylorSeer", "SeaCache"])
def test_cache_contexts_are_kept_apart(name):
    transformer, clock = tiny_transformer(), Clock()
    expected = step(transformer, clock, 0)
    transformer.enable_cache(cache_configs(clock)[name])
    for context in ("cond", "uncond"):
        assert torch.equal(step(transformer, clock, 0, context=context), expected)


@pytest.mark.parametrize("name", ["FirstBlockCache", "TaylorSeer"])
def test_a_cache_that_needs_a_context_asks_for_it(name):
    transformer = tiny_transformer()
    transformer.enable_cache(cache_configs(Clock())[name])
    with pytest.raises(ValueError, match="No cache context is set"):
        run(transformer)


@pytest.mark.parametrize("block_order", ["interleaved", "sequential"])
@pytest.mark.parametrize("name", ["FirstBlockCache", "MagCache", "SeaCache"])
def test_a_block_cache_adds_the_residual_of_the_whole_stack(name, block_order):
    transformer, clock, states = tiny_transformer(block_order=block_order), Clock(), []
    transformer.norm_out.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    transformer.transformer_blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    head = transformer.transformer_blocks[0]
    temb = []
    head.register_forward_pre_hook(lambda _, args: temb.append(args[1]))
    transformer.enable_cache(cache_configs(clock)[name])
    step(transformer, clock, 0)
    step(transformer, clock, 1)
    first_in, first_out, second_in, second_out = states
    transformer.disable_cache()
    if name == "FirstBlockCache":  # computes the first block and reuses the residual of the others
        with torch.no_grad():
            first_in, second_in = head(first_in, temb[0]), head(second_in, temb[1])
    assert_close(second_out, second_in + (first_out - first_in), rtol=0, atol=1e-5)


def test_first_block_cache_recomputes_above_its_threshold():
    transformer, clock = tiny_transformer(), Clock()
    expected = step(transformer, clock, 1)
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    step(transformer, clock, 0)
    assert torch.equal(step(transformer, clock, 1), expected)


def test_taylorseer_lite_predicts_the_last_projection_alone(count_calls):
    transformer, clock = tiny_transformer(), Clock()
    config = TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1, use_lite_mode=True, taylor_factors_dtype=torch.float32
    )
    transformer.enable_cache(config)
    first = step(transformer, clock, 0)
    calls = count_calls(block.norm1 for block in all_blocks(transformer))
    assert torch.equal(step(transformer, clock, 1), first)
    assert calls == []


def test_pyramid_attention_broadcast_gives_each_axis_its_own_range(count_calls):
    transformer, clock = tiny_transformer(), Clock()
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, temporal_attention_block_skip_range=3, current_timestep_callback=clock
    )
    transformer.enable_cache(config)
    attentions = count_calls(block.attn.to_v for block in all_blocks(transformer))
    computed = []
    clock.now = 500
    for _ in range(4):
        run(transformer)
        computed.append(sorted(attentions))
        attentions.clear()
    assert computed == [[0, 1, 2, 3], [], [0, 1], [2, 3]]


def test_pyramid_attention_broadcast_keeps_the_identifiers_it_is_given(count_calls):
    transformer, clock = tiny_transformer(), Clock()
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=(r"^transformer_blocks\.1",),
        current_timestep_callback=clock,
    )
    transformer.enable_cache(config)
    attentions = count_calls(block.attn.to_v for block in all_blocks(transformer))
    clock.now = 500
    run(transformer)
    attentions.clear()
    run(transformer)
    assert sorted(attentions) == [0, 2, 3]


def test_faster_cache_skips_the_unconditional_half_of_a_guidance_batch():
    transformer, clock = tiny_transformer(num_classes=4), Clock()
    labels = torch.tensor([4, 4, 1, 2])  # the null class first, as the pipeline has it

    def inputs(index, timestep):
        single = tiny_inputs(seed=index)["hidden_states"]
        return {
            "hidden_states": torch.cat([single, single]),
            "timestep": torch.full((4,), timestep),
            "class_labels": labels,
        }

    expected = run(transformer, inputs(1, 600))
    batch_sizes = []
    transformer.patch_embed.register_forward_hook(lambda _, args, output: batch_sizes.append(len(output) // 4))
    transformer.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_skip_range=None,
            temporal_attention_block_skip_range=None,
            current_timestep_callback=clock,
        )
    )
    step(transformer, clock, 0, inputs(0, 999))
    guided = step(transformer, clock, 1, inputs(1, 600))  # as a dictionary, `run` takes `.sample`
    assert batch_sizes == [4, 2]
    assert guided.shape == expected.shape
    assert_close(guided[2:], expected[2:], rtol=0, atol=1e-5)  # the conditional half is exact
    assert not torch.allclose(guided[:2], expected[:2], atol=1e-3)
    with transformer.cache_context("cond"), torch.no_grad():
        (as_tuple,) = transformer(**inputs(1, 600), return_dict=False)
    assert as_tuple.shape == expected.shape
    assert batch_sizes == [4, 2, 2]


def test_faster_cache_of_an_unconditional_model_needs_no_setting_and_changes_no_configuration(count_calls):
    clock = Clock()
    config = FasterCacheConfig(current_timestep_callback=clock)
    before = copy.copy(config)
    for _ in range(2):  # one configuration serves any number of models
        transformer = tiny_transformer()
        transformer.enable_cache(config)
        assert config == before
        attentions = count_calls(block.attn.to_v for block in all_blocks(transformer))
        single = {"hidden_states": torch.ones(1, 4, 4, 8, 8), "timestep": torch.tensor(500)}  # cannot be halved
        samples = [step(transformer, clock, index, single) for index in (0, 1, 2)]
        assert [sample.shape for sample in samples] == [(1, 8, 4, 8, 8)] * 3
        assert sorted(attentions) == [0, 0, 1, 1, 2, 2, 2, 3, 3, 3]  # spatial: the first and the third step


def test_caches_find_every_class_of_blocks():
    from diffusers.hooks._helpers import TransformerBlockRegistry

    classes = {type(block) for block in all_blocks(tiny_transformer())}
    assert {cls.__name__ for cls in classes} == set(EndoraTransformer3DModel._no_split_modules)
    for cls in classes:
        metadata = TransformerBlockRegistry.get(cls)
        assert metadata.return_hidden_states_index == 0
        assert metadata._get_parameter_from_args_kwargs("hidden_states", args=("states", "temb")) == "states"
