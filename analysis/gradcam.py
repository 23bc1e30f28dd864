"""Draws Grad-CAM maps of pictures, a row for each picture and a column for each model (the paper's Figure 4).

    python analysis/gradcam.py IMAGE... [--models NAME...] [--weights NAME=FILE...] [--out FILE]

The map is that of the class with the highest score. A model is a MetaFormer, ResNet, MlpMixer or VisionTransformer of
timm. The default ones are the paper's, whose released weights are fetched: RSB-ResNet-50, DeiT-S, ResMLP-S24 and
PoolFormer-S24.
"""

import argparse
from pathlib import Path

from metaformer.analysis.gradcam import PAPER, draw, maps, read_picture
from metaformer.errors import InputError, run_command

OUT = Path(__file__).with_name("figures") / "gradcam.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", type=Path, metavar="IMAGE", help="any format that Pillow reads")
    parser.add_argument(
        "--models", nargs="+", default=PAPER, metavar="NAME", help=f"names that timm knows (default: {' '.join(PAPER)})"
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="checkpoints for these models, of a run of classification/ for example (default: the released weights)",
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="image file (default: %(default)s)")
    options = parser.parse_args()
    weights = {}
    for given in options.weights:
        name, equals, file = given.partition("=")
        if not equals or name not in options.models:
            raise InputError(f"--weights {given}: give NAME=FILE, NAME one of {', '.join(options.models)}")
        weights[name] = file
    pictures = [read_picture(path) for path in options.pictures]
    figure = draw(pictures, {name: maps(name, weights.get(name, name), options.pictures) for name in options.models})
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.out, dpi=150, format=options.out.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {options.out}: {error}") from error
    print(options.out)


if __name__ == "__main__":
    run_command(main)
