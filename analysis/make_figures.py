"""Draws the paper's figures from its tables, figures of measurements, and training curves, as PNG and SVG.

python analysis/make_figures.py [FIGURE...] [--runs FOLDER...] [--out FOLDER]
"""

import argparse
from pathlib import Path

import matplotlib as mpl

from metaformer.analysis.figures import FIGURES, STYLE, curves, save
from metaformer.errors import InputError, check_known, run_command

OUT = Path(__file__).with_name("figures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(FIGURES)
    runs = "runs whose curves are drawn: run folders of classification/, or work dirs of mmdet or mmseg"
    add = parser.add_argument
    add("figures", nargs="*", metavar="FIGURE", help=f"any of {names} and curves (default: {names})")
    add("--runs", nargs="+", type=Path, default=[], metavar="FOLDER", help=runs)
    add("--out", type=Path, default=OUT, metavar="FOLDER", help="default: analysis/figures")
    options = parser.parse_args()
    for figure in options.figures:
        check_known("figure", figure, [*FIGURES, "curves"])
    wanted = options.figures or (["curves"] if options.runs else list(FIGURES))
    if ("curves" in wanted) != bool(options.runs):
        raise InputError("curves and --runs FOLDER... go together: give both, or neither")
    with mpl.rc_context(STYLE):
        for name in wanted:
            figure = curves(options.runs) if name == "curves" else FIGURES[name]()
            print(*(save(figure, name, options.out) if figure else [f"{name}: not measured"]), sep="\n")


if __name__ == "__main__":
    run_command(main)
