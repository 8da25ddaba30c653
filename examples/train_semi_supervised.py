"""Trains a video classifier on few labelled videos and many unlabelled clips: FixMatch, beside its baselines.

    python examples/train_semi_supervised.py --train_data TRAIN --test_data TEST --unlabelled CLIPS --output_dir OUT

TRAIN and TEST are folders with a sub-folder of videos per class, datasets that `endora prepare` wrote
(`--train_split`, `--test_split`), or folders of videos with a file of lines `<video>,<label>` (`--train_labels`,
`--test_labels`). CLIPS is a folder of clips, a dataset, a pipeline of this package, by folder or id, which then
generates them (`bundled` is the one that comes with it), or `rest`: the training videos that are left, without their
labels. For PolypDiag as Endo-FM hands it out, with the official labelled
set:

    python examples/train_semi_supervised.py --train_data PolypDiag/videos --train_labels PolypDiag/splits/train.txt \
        --test_data PolypDiag/videos --test_labels PolypDiag/splits/val.txt --first_of_class --unlabelled GENERATED \
        --classifier MCG-NJU/videomae-base --learning_rate 1e-4 --output_dir OUT

Each seed draws its labelled videos, half of each class, and its validation videos among the training videos; the test
videos choose nothing. `table.md` has mean and spread over the seeds, beside classifiers that look at nothing and the
same training without unlabelled clips. Runs that are there are kept: a killed command goes on where it was, and the
same one with more `--seeds` makes only those that are missing.
"""

import argparse

from diffusers_endora.downstream.semi_supervised.arguments import add_arguments, check_arguments
from diffusers_endora.downstream.semi_supervised.experiment import SUPERVISED, Method
from diffusers_endora.downstream.semi_supervised.setup import run_script


def main() -> None:
    """Trains as the command line says; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--unlabelled", help="folder of clips, dataset, pipeline, or rest; none: supervised only")
    parser.add_argument(
        "--endora_legacy",
        action="store_true",
        help="the unlabelled loss of the official Endora code, on the weak view's logits, in place of FixMatch's",
    )
    args = parser.parse_args()
    check_arguments(parser, args)
    if args.endora_legacy and args.unlabelled is None:
        parser.error("--endora_legacy: is about unlabelled clips; add --unlabelled.")
    methods = [Method(SUPERVISED)]
    if args.unlabelled is not None:
        name = "Endora's official loss" if args.endora_legacy else "FixMatch"
        methods.append(Method(name, args.unlabelled, args.endora_legacy))
    run_script("train_semi_supervised.py", args, methods)


if __name__ == "__main__":
    main()
