"""Predict the most likely classes of pictures with a run or a checkpoint.

Unreadable pictures are named and skipped, and the exit status is then 1.
"""

import argparse
import csv
import json
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from metaformer import InputError, open_checkpoint
from metaformer.errors import run_command
from metaformer.prediction import Prediction, find_pictures, predict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pictures", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="folders are searched recursively")
    add("--checkpoint", metavar="RUN_OR_FILE", help="run's folder, or checkpoint (default: --model's released weights)")
    add("--model", metavar="NAME", help="timm's name of the model, if the checkpoint does not tell it")
    add("--top", type=int, default=5, metavar="N", help="classes for each picture (default: 5)")
    add("--batch", type=int, default=32, metavar="N", help="pictures at once (default: 32)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print a JSON list of pictures with their classes")
    output.add_argument("--csv", action="store_true", help="print a CSV table: file, rank, class, index, probability")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be text
    if min(options.top, options.batch) < 1:
        raise InputError("--top and --batch are at least 1")
    paths = find_pictures(options.pictures)
    source = options.checkpoint or options.model
    if source is None:
        raise InputError("give --checkpoint RUN_OR_FILE, or --model NAME for its released weights")
    opened = open_checkpoint(source, options.model)
    progress = partial(tqdm, unit="batch", desc=opened.name, disable=None)
    predictions, unreadable = predict(opened, paths, options.top, options.batch, progress)
    if options.json:
        print(json.dumps(predictions, indent=2, ensure_ascii=False))
    else:
        (print_csv if options.csv else print_text)(predictions)
    for name, reason in unreadable:
        print(f"cannot read {name}: {reason}", file=sys.stderr)
    return 1 if unreadable else 0


def print_csv(predictions: list[Prediction]) -> None:
    table = csv.writer(sys.stdout)
    table.writerow(["file", "rank", "class", "index", "probability"])
    for prediction in predictions:
        for rank, best in enumerate(prediction["classes"], 1):
            table.writerow([prediction["file"], rank, best["class"], best["index"], f"{best['probability']:.6f}"])


def print_text(predictions: list[Prediction]) -> None:
    for prediction in predictions:
        print(prediction["file"])
        for best in prediction["classes"]:
            print(f"  {100 * best['probability']:6.2f} %  {best['class']}")


if __name__ == "__main__":
    run_command(main)
