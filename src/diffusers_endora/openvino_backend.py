"""Transformer and decoder of a pipeline run by OpenVINO (https://docs.openvino.ai), behind the same call."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from .models.transformer_endora import EndoraTransformer3DModelOutput

if TYPE_CHECKING:
    from .pipelines.pipeline_endora import EndoraPipeline


def use_openvino(
    pipeline: "EndoraPipeline", precision: Literal["f32", "bf16"] = "f32", num_threads: int | None = None
) -> None:
    """From now on the pipeline's transformer and decoder run as OpenVINO graphs on the CPU.

    The graph of an input's shape is made by `torch.export` when it first comes, which takes seconds, and is kept until
    the weights change. Calls with what the graphs do not know (`output_spatial_states`, still images,
    `attention_kwargs`, gradients, a cache enabled, LoRA layers) run by torch, as before. LoRA has to be fused for
    OpenVINO: `pipe.fuse_lora(); pipe.unload_lora_weights()`.

    Args:
        pipeline: on the CPU, in float32.
        precision: "f32", or "bf16" for what the processor computes faster in it; inputs and outputs stay float32.
        num_threads: of OpenVINO; by default those of torch.

    Raises:
        ValueError: OpenVINO is not installed, there is no such precision, the pipeline is elsewhere or not in float32,
            or has a cache enabled (which may be after this call).
    """
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise ValueError('needs OpenVINO: pip install "openvino>=2026"') from error
    if precision not in ("f32", "bf16"):
        raise ValueError(f"{precision=}: expected f32 or bf16.")
    for name in ("transformer", "vae"):
        model = getattr(pipeline, name)
        if model.device.type != "cpu" or model.dtype != torch.float32:
            raise ValueError(f"the {name} is on {model.device} in {model.dtype}: expected cpu and torch.float32.")
    if pipeline.transformer.is_cache_enabled:
        raise ValueError("the transformer has a cache enabled: disable it, and enable it after use_openvino.")
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": num_threads or torch.get_num_threads()}

    def compiled(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Callable[..., torch.Tensor]:
        graph = openvino.convert_model(torch.export.export(module, inputs))
        run = openvino.Core().compile_model(graph, "CPU", options)
        return lambda *inputs: torch.from_numpy(run([value.contiguous().numpy() for value in inputs])[0].copy())

    transformer: Any = pipeline.transformer
    decoder: Any = pipeline.vae.decoder
    transformer.forward = _TransformerByGraph(transformer, compiled, f"openvino {precision}")
    decoder.forward = _ByGraph(decoder, compiled, f"openvino {precision}")


class _ByGraph:
    """A replacement for a module's `forward`: a graph for each shape of its inputs.

    `backend` is what computes them, for records.
    """

    def __init__(
        self, module: Any, compiled: Callable[..., Callable[..., torch.Tensor]], backend: str, **options: Any
    ) -> None:
        self.module, self.compiled, self.backend = module, compiled, backend
        self.own = _OwnForward(module, **options)
        self.graphs: dict[tuple, Callable[..., torch.Tensor]] = {}
        self.weights = torch.empty(0)  # a sample of those that the graphs hold

    def runs_by_torch(self) -> bool:
        return torch.is_grad_enabled() or bool(getattr(self.module, "peft_config", None))

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if self.runs_by_torch():
            return type(self.module).forward(self.module, *inputs)
        # in place, as LoRA is fused, weights change without a mark: some of each are looked at
        flat = (value.detach().flatten() for value in self.module.parameters())
        weights = torch.cat([value[:: -(-value.numel() // 16)] for value in flat])
        if not torch.equal(weights, self.weights):
            self.graphs, self.weights = {}, weights
        key = tuple((value.shape, value.dtype) for value in inputs)
        if key not in self.graphs:
            self.graphs[key] = self.compiled(self.own, inputs)
        return self.graphs[key](*inputs)


class _TransformerByGraph(_ByGraph):
    def __init__(self, module: Any, compiled: Callable[..., Callable[..., torch.Tensor]], backend: str) -> None:
        super().__init__(module, compiled, backend, return_dict=False)

    def __call__(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        num_still_images: int = 0,
        output_spatial_states: tuple[int, ...] = (),
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> EndoraTransformer3DModelOutput | tuple:
        others = (num_still_images, output_spatial_states, attention_kwargs)
        if any(others) or self.module.is_cache_enabled or self.runs_by_torch():
            forward = type(self.module).forward
            return forward(self.module, hidden_states, timestep, class_labels, *others, return_dict)
        labels = () if class_labels is None else (class_labels,)
        sample = super().__call__(hidden_states, timestep, *labels)
        return EndoraTransformer3DModelOutput(sample=sample) if return_dict else (sample,)


class _OwnForward(nn.Module):
    """The forward of a module's class, whatever its own was replaced by: tensors in, a tensor out."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__()
        self.module, self.options = module, options

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        output = type(self.module).forward(self.module, *inputs, **self.options)
        return output[0] if isinstance(output, tuple) else output
