"""Export a trained model, or its backbone, to ONNX or torch.export; the file is compared with the model."""

import argparse
from pathlib import Path

from metaformer import open_checkpoint
from metaformer.errors import run_command
from metaformer.export import FORMATS, export_opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        help="folder of a run, checkpoint file or folder in any known format, or name of a model with released weights",
    )
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--model", metavar="NAME", help="timm's name of the model, if the checkpoint does not tell it")
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="side, or height and width, of the images (default: those that the model was trained on)",
    )
    parser.add_argument(
        "--features", action="store_true", help="export the stages' maps level0, level1, ... in place of the logits"
    )
    options = parser.parse_args()
    opened = open_checkpoint(options.source, options.model)
    done = export_opened(opened, options.to, options.out, options.size, options.features)
    print(f"{opened.name} -> {options.out} ({options.to}): {done}")


if __name__ == "__main__":
    run_command(main)
