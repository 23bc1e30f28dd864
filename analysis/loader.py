"""Measures images per second of the training loader and of decoding alone.

    python analysis/loader.py --data-dir FOLDER [--config FILE] [--workers N] [--images N] [--rounds N]
        [--consume IMAGES_PER_S] [--record FILE]

The loader is the one that classification/train.py builds for the config with data_in_memory=false. Normalisation,
random erasing, Mixup and CutMix are not part of it: training applies them to whole batches on the device. The pictures
are the same in all rounds and come from the system's file cache, so that the speed of a disk or network must be
measured separately.
"""

import argparse
import math
from pathlib import Path

import torch

from metaformer.analysis.loader import measure
from metaformer.analysis.speed import loader_rows
from metaformer.errors import InputError, run_command
from metaformer.provenance import provenance, write_json
from metaformer.records import Loading
from metaformer.training.config import CONFIGS, load_config


def report(record: Loading, consume: float | None) -> str:
    (row,) = loader_rows(record)
    if consume:
        rate = record.decoders["pillow"].loader_images_per_s_per_worker.median
        row[f"workers for {consume:,g} images/s"] = math.ceil(consume / rate)
    lines = [f"  {heading}: {cell}" for heading, cell in row.items() if cell is not None]
    return "\n".join([f"{record.images} pictures, median of {record.rounds} rounds (min to max)", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", required=True, metavar="FOLDER", help="folder with train/CLASS/PICTURE")
    add("--config", default=str(CONFIGS / "poolformer_s12.yaml"), help="config of training (default: %(default)s)")
    add("--workers", type=int, default=1, metavar="N", help="loader processes (default: %(default)s)")
    add("--images", type=int, default=500, metavar="N", help="pictures in a round, at most (default: %(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="rounds, of which medians are taken (default: %(default)s)")
    consumed = "images/s that the devices of a node consume; prints the number of workers that deliver as many"
    add("--consume", type=float, metavar="IMAGES_PER_S", help=consumed)
    add("--record", type=Path, metavar="FILE", help="write a JSON record to this file")
    options = parser.parse_args()
    if min(options.workers, options.images, options.rounds) < 1:
        raise InputError("--workers, --images and --rounds: give whole numbers from 1")
    if options.consume is not None and not 0 < options.consume < math.inf:
        raise InputError(f"--consume is {options.consume:g}: give the images/s that the devices take, above 0")
    folder = {"dataset": "", "data_dir": options.data_dir, "dataset_args": {}, "num_classes": None}
    folder |= {"data_in_memory": False, "bad_pictures": "stop"}
    config = load_config([options.config]).model_copy(update=folder)
    torch.set_num_threads(1)  # as in a process of the loader
    record = {**measure(config, options.workers, options.images, options.rounds), **provenance()}
    print(report(Loading.model_validate(record), options.consume))
    if options.record:
        write_json(options.record, record)


if __name__ == "__main__":
    run_command(main)
