"""Convert a run or checkpoint into the format of another library.

SOURCE is opened with the arguments it was trained with. What the target cannot represent is refused with the reason.
Where a run kept a moving average of its weights, that is what is written.
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
    parser.add_argument(
        "source", metavar="SOURCE", help="folder of a run, checkpoint file or folder in any known format, or name of a "
        "model with released weights"
    )  # fmt: skip
    parser.add_argument("target", metavar="TARGET", type=Path, help="file to write; for hf and timm-hf a folder")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"one of {', '.join(TARGETS)}")
    parser.add_argument("--model", metavar="NAME", help="timm's name of the model, if the checkpoint does not tell it")
    options = parser.parse_args()
    opened = open_checkpoint(options.source, options.model)
    remarks = write(opened, options.to, options.target)
    print(f"{options.source} ({opened.format or 'timm'}, {opened.name}) -> {options.target} ({options.to})")
    for remark in remarks:
        print(remark)


if __name__ == "__main__":
    run_command(main)
