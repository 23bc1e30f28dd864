"""Convert a run or checkpoint into the format of another library.

SOURCE is opened with the arguments it was trained with. A model that the target cannot represent is refused with the
reason. If a run kept a moving average of its weights, the average is written.
"""

import argparse
from pathlib import Path

from metaformer.errors import run_command
from metaformer.weights import open_checkpoint
from metaformer.weights.writers import TARGETS, write


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m metaformer.weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="run's folder, checkpoint, or model with released weights")
    add("target", metavar="TARGET", type=Path, help="file to write; for hf and timm-hf a folder")
    add("--to", required=True, metavar="FORMAT", help=f"one of {', '.join(TARGETS)}")
    add("--model", metavar="NAME", help="timm's name of the model, if the checkpoint does not tell it")
    options = parser.parse_args()
    opened = open_checkpoint(options.source, options.model)
    remarks = write(opened, options.to, options.target)
    print(f"{options.source} ({opened.format or 'timm'}, {opened.name}) -> {options.target} ({options.to})")
    for remark in remarks:
        print(remark)


if __name__ == "__main__":
    run_command(main)
