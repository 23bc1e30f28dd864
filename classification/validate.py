"""Top-1, top-5 and images per second of a checkpoint on a validation split.

The result is printed and written to a JSON record with its provenance. SETTING is any setting of training (see
`python classification/train.py --help`), in place of the one that the checkpoint was trained with: data_dir=PATH,
img_size=PIXELS, precision=bfloat16, bad_pictures=skip. A checkpoint from elsewhere needs data_dir=, and model=NAME
where it does not tell its model.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from metaformer import open_checkpoint
from metaformer.errors import run_command
from metaformer.provenance import write_json
from metaformer.training.config import parse_overrides
from metaformer.training.model import settings_of
from metaformer.training.validation import default_record_path, validate

OF_THE_MODEL = ("model", "model_args", "img_size", "crop_pct", "interpolation", "mean", "std")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s RUN_OR_CHECKPOINT [SETTING=VALUE ...] [--record FILE]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        help="folder of a run, checkpoint file or folder in any known format, or name of a model with released weights",
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="JSON file for the result (default: validation.json in the run's folder, or a new file in runs/)",
    )
    options, settings = parser.parse_known_args()
    overrides = parse_overrides(settings)
    opened = open_checkpoint(options.source, **{key: overrides[key] for key in OF_THE_MODEL if key in overrides})
    config = settings_of(opened, overrides)
    result = validate(
        opened, config, lambda batches, count: tqdm(batches, total=count, unit="batch", desc=opened.name, disable=None)
    )
    if result is None:  # not the main process
        return
    record, skipped = result
    for name, reason in skipped:
        print(f"skipped the picture {name} ({reason})")
    path = options.record or default_record_path(opened)
    write_json(path, record)
    print(
        "{model}: top-1 {metrics[top1]:.3f} %, top-5 {metrics[top5]:.3f} % of {metrics[images]} images, "
        "{metrics[skipped]} skipped, {metrics[images_per_s]:.1f} images/s; record: {path}".format(**record, path=path)
    )


if __name__ == "__main__":
    run_command(main)
