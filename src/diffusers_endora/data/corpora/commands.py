"""The commands about corpora, `endora prepare` and `endora audit`. What they need is imported when they run."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

# Options of `prepare` that one corpus alone has
ONLY_FOR = {
    "split_protocol": "cholectriplet",
    "fold": "cholectriplet",
    "num_videos": "phantom",
    "num_frames": "phantom",
    "height": "phantom",
    "width": "phantom",
    "seed": "phantom",
}


def prepare(
    corpus: Annotated[
        str,
        typer.Argument(help="cholectriplet, colonoscopic, kvasir_capsule, phantom (is rendered), polypdiag."),
    ],
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Folder for the shards; it appears when it is complete.")
    ],
    data_dir: Annotated[
        Path | None, typer.Option("--data_dir", help="The folder as the owners, or Endo-FM, hand it out.")
    ] = None,
    config: Annotated[
        str,
        typer.Option("--config", help="videos: a row a video. clips: a row a window. For polypdiag labelled_40."),
    ] = "videos",
    clip_length: Annotated[
        int | None, typer.Option("--clip_length", min=1, help="Frames of a window, with --config clips.")
    ] = None,
    transcode: Annotated[
        int | None,
        typer.Option(
            "--transcode",
            min=2,
            help="Pixels of the shorter side; every frame becomes a key frame, which makes training read fast. "
            "Without it, videos stay the files they are.",
        ),
    ] = None,
    quality: Annotated[
        Literal["visually_lossless", "lossless"] | None,
        typer.Option("--quality", help="Of what is encoded; without it visually_lossless, 4 to 10 times smaller."),
    ] = None,
    file_format: Annotated[
        Literal["parquet", "webdataset"], typer.Option("--format", help="Both are read by load_dataset.")
    ] = "parquet",
    num_proc: Annotated[
        int | None, typer.Option("--num_proc", min=1, help="Videos at a time; without it, one per core.")
    ] = None,
    split_protocol: Annotated[
        str | None,
        typer.Option(
            "--split_protocol",
            help="cholectriplet: cholect50, cholect50-challenge, cholect50-crossval or cholect45-crossval.",
        ),
    ] = None,
    fold: Annotated[
        int | None, typer.Option("--fold", help="cholectriplet: test fold of a cross-validation, 1 to 5.")
    ] = None,
    num_videos: Annotated[int | None, typer.Option("--num_videos", help="phantom: how many; default 90.")] = None,
    num_frames: Annotated[int | None, typer.Option("--num_frames", help="phantom: of a video; default 64.")] = None,
    height: Annotated[int | None, typer.Option("--height", help="phantom: pixels; default 128.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="phantom: pixels; default 128.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="phantom: of the first video; default 0.")] = None,
    repo_id: Annotated[
        str | None, typer.Option("--push_to_hub", metavar="REPO", help="Upload to this dataset repository afterwards.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private/--no-private", help="Whether the repository is seen by you alone.")
    ] = True,
    has_the_right: Annotated[
        bool,
        typer.Option("--i_have_the_right", help="The owners allow you to publish what their terms do not."),
    ] = False,
) -> None:
    """Turn a corpus into Parquet or WebDataset shards for training, streaming and the Hub.

    The folder loads with datasets.load_dataset(OUTPUT_DIR). What was interrupted goes on where it stopped, by the
    same command. What is left out is in rejected.jsonl, with reasons.

    \b
    Example:
        endora prepare colonoscopic --data_dir RAW --output_dir colonoscopic_128 --transcode 128
        endora prepare phantom --output_dir phantom --num_videos 300
    """
    given: dict[str, Any] = {
        "clip_length": clip_length,
        "short_side": transcode,
        "quality": quality,
        "split_protocol": split_protocol,
        "fold": fold,
        "num_videos": num_videos,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "seed": seed,
    }
    options = {name: value for name, value in given.items() if value is not None}
    from . import corpus_class

    corpus_class(corpus)  # says what is wrong before the modules below fail to import what is missing
    for name in options:
        if ONLY_FOR.get(name, corpus) != corpus:
            raise ValueError(f"--{name}: is an option of {ONLY_FOR[name]} alone; leave it out for {corpus}.")

    from .prepare import prepare_corpus, report
    from .publishing import check_may_push, push_to_hub

    if repo_id is not None:
        check_may_push(corpus, repo_id, private, has_the_right)
    try:
        prepared = prepare_corpus(corpus, data_dir, output_dir, config, file_format, num_proc, **options)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on where it stopped", err=True)
        raise
    report(prepared, typer.echo)
    if repo_id is not None:
        typer.echo(push_to_hub(prepared.output_dir, repo_id, private))


def audit(
    corpus: Annotated[
        str,
        typer.Argument(
            help="A folder that `endora prepare` wrote, or any folder of videos, splits being its sub-folders train, "
            "validation, test. With --data_dir, a corpus as for `endora prepare`."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder for the report; it appears when it is complete.")],
    data_dir: Annotated[
        Path | None, typer.Option("--data_dir", help="The folder as the owners, or Endo-FM, hand it out.")
    ] = None,
    config: Annotated[str, typer.Option("--config", help="With --data_dir; for polypdiag labelled_40.")] = "videos",
    split_protocol: Annotated[
        str | None, typer.Option("--split_protocol", help="With --data_dir; cholectriplet, as for `endora prepare`.")
    ] = None,
    fold: Annotated[
        int | None, typer.Option("--fold", help="With --data_dir; cholectriplet, as for `endora prepare`.")
    ] = None,
    seconds_between: Annotated[
        float,
        typer.Option(
            "--seconds_between",
            help="Of each video, 64 frames are looked at, or one in this time, whichever is more.",
        ),
    ] = 1.0,
    num_proc: Annotated[
        int | None, typer.Option("--num_proc", min=1, help="Videos at a time; without it, one per core.")
    ] = None,
    is_strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 3 where footage is in more than one split.")
    ] = False,
) -> None:
    """Look for what is wrong with a corpus before training or publishing.

    Footage in more than one split, also encoded anew, resized, cut, mirrored or as images; duplicates within a split;
    black and frozen videos; burned-in text, which may identify a patient; unreadable files; sizes and rates. Writes
    audit.md, audit.json, contact_sheet.png and text_regions.png.

    Exit code: 0 whatever was found, 1 when the audit could not be made, 3 with --strict when footage, or the id of a
    video, is in more than one split.

    \b
    Example:
        endora audit colonoscopic_128 --output audit
        endora audit cholectriplet --data_dir CholecT50 --output audit --strict
    """
    if not (math.isfinite(seconds_between) and seconds_between > 0):
        raise ValueError(f"--seconds_between {seconds_between}: expected a positive number.")
    given = {"split_protocol": split_protocol, "fold": fold}
    options = {name: value for name, value in given.items() if value is not None}
    if data_dir is None and (options or config != "videos"):
        name = next(iter(options), "config")
        raise ValueError(f"--{name}: belongs to a corpus with --data_dir; a folder has its own splits.")
    from . import CORPORA

    if data_dir is None and corpus in CORPORA and not Path(corpus).is_dir():
        raise ValueError(f"{corpus}: give its folder with --data_dir, or name a folder that `endora prepare` wrote.")
    try:
        from ..audit.audit import audit_corpus
        from ..audit.listing import list_corpus, list_folder
        from ..audit.report import summary

        if data_dir is None:
            listing = list_folder(Path(corpus))
        else:
            listing = list_corpus(corpus, data_dir, config, **options)
    except ModuleNotFoundError as error:
        raise ValueError(f'needs {error.name}: pip install "diffusers-endora[metrics,train]"') from error

    found, facts = audit_corpus(listing, output, seconds_between, num_proc)
    for line in summary(facts):
        typer.echo(line)
    typer.echo(f"{output}: audit.md, audit.json and pictures")
    if is_strict and found.num_leaks:
        raise typer.Exit(3)


def prepare_command(corpus: str) -> Callable[..., None]:
    """`prepare` of one corpus: without the argument and without the options of the others."""

    def command(**arguments: Any) -> None:
        prepare(corpus, **arguments)

    absent = {"corpus", *(name for name, of in ONLY_FOR.items() if of != corpus)}
    absent |= {"data_dir"} if corpus == "phantom" else set()
    signature = inspect.signature(prepare)
    kept = [parameter for name, parameter in signature.parameters.items() if name not in absent]
    command.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    source = "--num_videos 300" if corpus == "phantom" else "--data_dir RAW --transcode 128"
    command.__doc__ = (
        f"Turn {corpus} into Parquet or WebDataset shards; `endora prepare {corpus}` is the same.\n\n"
        "What was interrupted goes on where it stopped, by the same command. rejected.jsonl says what is left out.\n\n"
        f"\b\nExample:\n    python datasets_scripts/{corpus}/{corpus}.py --output_dir {corpus} {source}"
    )
    return command
