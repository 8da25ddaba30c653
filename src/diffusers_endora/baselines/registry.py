"""The pipelines of the package: which class a folder is of, what its folder holds, which method it implements."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# What of `from_pretrained`'s arguments says where on the Hub a model is
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


@dataclass(frozen=True)
class PipelineKind:
    """What is known of a pipeline class without importing it.

    Attributes:
        class_name: in `model_index.json` and in `diffusers_endora`.
        models: component -> the model's class; None where the component may be of any.
        main: the component that tells one model from another: its weights are hashed, its configuration says the
            clip's length and the classes.
        has_scheduler: whether `scheduler/` belongs to the folder.
        optional_models: those of `models` that a folder may lack.
        method: of the paper.
        paper: its address.
        venue: where and when it appeared.
        code: address of the official code.
        official_license: what the official weights may be used for, for the card of a converted checkpoint.
        citation: in BibTeX.
    """

    class_name: str
    models: dict[str, str | None]
    main: str
    has_scheduler: bool
    method: str
    paper: str
    venue: str
    code: str
    official_license: str
    citation: str
    optional_models: tuple[str, ...] = field(default=())

    @property
    def required_models(self) -> list[str]:
        return [name for name in self.models if name not in self.optional_models]


ENDORA = PipelineKind(
    class_name="EndoraPipeline",
    models={"transformer": "EndoraTransformer3DModel", "vae": None},
    main="transformer",
    has_scheduler=True,
    method="Endora",
    paper="https://arxiv.org/abs/2403.11050",
    venue="MICCAI 2024",
    code="https://github.com/CUHK-AIM-Group/Endora",
    official_license="the official code and weights state no licence",
    citation="",  # in `model_card.md`
)
STYLEGAN_V = PipelineKind(
    class_name="StyleGANVPipeline",
    models={"generator": "StyleGANVGenerator"},
    main="generator",
    has_scheduler=False,
    method="StyleGAN-V",
    paper="https://arxiv.org/abs/2112.14683",
    venue="CVPR 2022",
    code="https://github.com/universome/stylegan-v",
    official_license="the official code builds on StyleGAN2-ADA, whose licence allows non-commercial use only",
    citation="""@inproceedings{skorokhodov2022styleganv,
  title     = {StyleGAN-V: A Continuous Video Generator with the Price, Image Quality and Perks of StyleGAN2},
  author    = {Skorokhodov, Ivan and Tulyakov, Sergey and Elhoseiny, Mohamed},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022}
}""",
)
MOSTGAN_V = PipelineKind(
    class_name="MoStGANVPipeline",
    models={"generator": "MoStGANVGenerator"},
    main="generator",
    has_scheduler=False,
    method="MoStGAN-V",
    paper="https://arxiv.org/abs/2304.02777",
    venue="CVPR 2023",
    code="https://github.com/xiaoqian-shen/MoStGAN-V",
    official_license="the official code builds on StyleGAN2-ADA, whose licence allows non-commercial use only",
    citation="""@inproceedings{shen2023mostganv,
  title     = {MoStGAN-V: Video Generation with Temporal Motion Styles},
  author    = {Shen, Xiaoqian and Li, Xiang and Elhoseiny, Mohamed},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2023}
}""",
)
LVDM = PipelineKind(
    class_name="LVDMPipeline",
    models={
        "autoencoder": "LVDMAutoencoder",
        "unet": "LVDMUNet3DModel",
        "prediction_unet": "LVDMUNet3DModel",
        "interpolation_unet": "LVDMUNet3DModel",
    },
    main="unet",
    has_scheduler=True,
    method="LVDM",
    paper="https://arxiv.org/abs/2211.13221",
    venue="2022",
    code="https://github.com/YingqingHe/LVDM",
    official_license="the official code is under the MIT licence, which does not name the weights",
    citation="""@article{he2022lvdm,
  title   = {Latent Video Diffusion Models for High-Fidelity Long Video Generation},
  author  = {He, Yingqing and Yang, Tianyu and Zhang, Yong and Shan, Ying and Chen, Qifeng},
  journal = {arXiv preprint arXiv:2211.13221},
  year    = {2022}
}""",
    optional_models=("prediction_unet", "interpolation_unet"),
)

PIPELINES = {kind.class_name: kind for kind in (ENDORA, STYLEGAN_V, MOSTGAN_V, LVDM)}


def load_pipeline(path_or_repo: str | Path, **kwargs: Any) -> Any:
    """A pipeline of this package, of the class that its folder names.

    Args:
        path_or_repo: a pipeline folder, or the id of one on the Hub.
        kwargs: for the class's `from_pretrained`.

    Returns:
        An `EndoraPipeline`, `StyleGANVPipeline`, `MoStGANVPipeline` or `LVDMPipeline`.

    Raises:
        ValueError: the folder has no `model_index.json`, or is of another class.
        OSError: the Hub does not have it.
    """
    hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    return pipeline_class(kind_of(path_or_repo, **hub_arguments)).from_pretrained(path_or_repo, **kwargs)


def pipeline_class(kind: PipelineKind) -> "type[DiffusionPipeline]":
    """The class itself, imported."""
    import diffusers_endora

    return getattr(diffusers_endora, kind.class_name)


def kind_of(path_or_repo: str | Path, **hub_arguments: Any) -> PipelineKind:
    """What `model_index.json` says that a folder, or a model on the Hub, is.

    Raises:
        ValueError: there is no index, or it names a class that is not of this package.
        OSError: the Hub does not have it.
    """
    folder = Path(path_or_repo)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HFValidationError

        try:
            folder = Path(hf_hub_download(str(path_or_repo), "model_index.json", **hub_arguments)).parent
        except HFValidationError as error:
            raise ValueError(f"{path_or_repo}: is no folder, and not owner/name on the Hub.") from error
    index = read_index(folder)
    name = class_name_of(index)
    if name not in PIPELINES:
        first, *others, last = PIPELINES
        raise ValueError(f"{path_or_repo}: is a {name}; expected an {', '.join([first, *others])} or {last}.")
    return PIPELINES[name]


def kind_of_pipeline(pipeline: Any) -> PipelineKind:
    """What a pipeline, or one of a class derived from those of the package, is."""
    return next(PIPELINES[part.__name__] for part in type(pipeline).__mro__ if part.__name__ in PIPELINES)


def class_name_of(index: dict[str, Any]) -> str:
    """The pipeline's class in a `model_index.json`, whichever module it names beside it."""
    name = index.get("_class_name")
    return str(name[-1]) if isinstance(name, list) and name else str(name).rpartition(".")[2]


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json` of a folder.

    Raises:
        ValueError: it is not there, or no JSON object.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(f"{folder}: has no model_index.json; expected a pipeline folder.")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}).") from error
    if not isinstance(index, dict):
        raise ValueError(f"{path}: holds a {type(index).__name__}; expected a JSON object.")
    return index
