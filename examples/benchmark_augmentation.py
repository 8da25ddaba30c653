"""Do generated clips help a classifier? The paper's Table 2: FixMatch with the clips of each generator.

    python examples/benchmark_augmentation.py --train_data TRAIN --test_data TEST --output_dir OUT \
        --row StyleGAN-V=STYLEGAN_CLIPS LVDM=LVDM_PIPELINE Endora=ENDORA_PIPELINE "real clips=rest"

A row is a name and a folder of clips, a dataset, or a pipeline of this package, which then generates the clips
(`bundled` is the one that comes with it); `rest` are the training videos that are left, without their labels: what
real clips would give. The first row is always the training without unlabelled clips; `--legacy_row` makes rows with
the unlabelled loss of the official Endora code. Data, protocol and resumption are those of `train_semi_supervised.py`.

On rendered colons (docs/semi_supervised.md has what came out):

    python examples/render_phantom.py --output_dir outputs/colons/train --num_videos 500 --size 64
    python examples/render_phantom.py --output_dir outputs/colons/test --split test --num_videos 256 \
        --num_frames 16 --size 64
    python examples/benchmark_augmentation.py --train_data outputs/colons/train --test_data outputs/colons/test \
        --positive_class polyp --resolution 64 --output_dir outputs/augmentation \
        --row generated=bundled "real clips=rest"
"""

import argparse

from diffusers_endora.downstream.semi_supervised.arguments import add_arguments, check_arguments
from diffusers_endora.downstream.semi_supervised.experiment import SUPERVISED, Method
from diffusers_endora.downstream.semi_supervised.setup import run_script


def main() -> None:
    """Runs the table that the command line says; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--row", nargs="+", default=[], metavar="NAME=CLIPS", help="FixMatch with these clips")
    parser.add_argument(
        "--legacy_row", nargs="+", default=[], metavar="NAME=CLIPS", help="the official Endora loss with these clips"
    )
    args = parser.parse_args()
    check_arguments(parser, args)
    methods = [Method(SUPERVISED)]
    for rows, endora_legacy in ((args.row, False), (args.legacy_row, True)):
        for row in rows:
            name, equals, source = row.partition("=")
            if not (name and equals and source):
                parser.error(f"--row {row}: expected NAME=CLIPS.")
            if any(method.name == name for method in methods):
                parser.error(f"--row {row}: there is a row {name!r} already.")
            methods.append(Method(name, source, endora_legacy))
    run_script("benchmark_augmentation.py", args, methods)


if __name__ == "__main__":
    main()
