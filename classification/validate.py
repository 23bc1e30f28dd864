"""Measure top-1, top-5 and images per second of a checkpoint on a validation split.

The result is printed and written to a JSON record with its provenance. SETTING replaces a setting of the checkpoint's
training, for example data_dir=PATH, img_size=PIXELS, precision=bfloat16 or bad_pictures=skip; see `python
classification/train.py --help`. A checkpoint from elsewhere needs data_dir=, and model=NAME if it does not state its
model.
"""

import argparse
from functools import partial
from pathlib import Path

from tqdm import tqdm

from metaformer import open_checkpoint
from metaformer.errors import run_command
from metaformer.provenance import write_json
from metaformer.training.config import parse_overrides
from metaformer.training.evaluation import default_record_path, validate
from metaformer.training.model import settings_of

OF_THE_MODEL = ("model", "model_args", "img_size", "crop_pct", "interpolation", "mean", "std")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s RUN_OR_CHECKPOINT [SETTING=VALUE ...] [--record FILE]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT", help="run's folder, checkpoint, or model with released weights")
    add("--record", type=Path, metavar="FILE", help="JSON file (default: in the run's folder, or else in runs/)")
    options, settings = parser.parse_known_args()
    overrides = parse_overrides(settings)
    opened = open_checkpoint(options.source, **{key: overrides[key] for key in OF_THE_MODEL if key in overrides})
    config = settings_of(opened, overrides)
    record, skipped = validate(opened, config, partial(tqdm, unit="batch", desc=opened.name, disable=None))
    for name, reason in skipped:
        print(f"skipped the picture {name} ({reason})")
    print(
        "{model}: top-1 {metrics[top1]:.3f} %, top-5 {metrics[top5]:.3f} % of {metrics[images]} images, "
        "{metrics[skipped]} skipped, {metrics[images_per_s]:.1f} images/s".format(**record)
    )
    path = options.record or default_record_path(opened)
    write_json(path, record)
    print(f"record: {path}")


if __name__ == "__main__":
    run_command(main)
