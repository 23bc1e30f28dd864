"""Counts parameters and multiply-accumulates (MACs) of a model, by operator and by part.

python analysis/count.py MODEL [--size SIDE | --size HEIGHT WIDTH] [--json]
"""

import argparse
import json
from typing import Any

from tabulate import tabulate

from metaformer.analysis.count import count, size_of
from metaformer.errors import run_command


def report(name: str, counted: dict[str, Any]) -> str:
    macs, (height, width) = sum(counted["macs"].values()), counted["size"]
    frozen = f" + {counted['frozen']:,} frozen" if counted["frozen"] else ""
    uncounted = ", ".join(f"{operator} x {times}" for operator, times in counted["uncounted"].items())
    parts = [(part, of["macs"], of["parameters"]) for part, of in counted["parts"].items()]
    blocks = [
        f"{name} at {height} x {width}",
        f"parameters: {counted['learnable']:,}{frozen}\nMACs: {macs:,} ({macs / 1e9:.2f} G)",
        tabulate(counted["macs"].items(), ["operator", "MACs"], intfmt=","),
        tabulate(parts, ["part", "MACs", "parameters"], intfmt=","),
        f"not counted: {uncounted or 'nothing'}",
    ]
    return "\n\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a name that timm knows, or a config of mmdet or mmseg")
    sizes = "side, or height and width, of the image (default: the model's own; 800 1280 for mmdet, 512 for mmseg)"
    add("--size", type=int, nargs="+", metavar="PIXELS", help=sizes)
    add("--json", action="store_true", help="print the counts as JSON")
    options = parser.parse_args()
    counted = count(options.model, size_of(options.size) if options.size else None)
    print(json.dumps(counted, indent=2) if options.json else report(options.model, counted))


if __name__ == "__main__":
    run_command(main)
