"""Export a trained model, or its backbone, to ONNX or torch.export, and compare the file with the model."""

import argparse
from pathlib import Path

from metaformer import open_checkpoint
from metaformer.errors import run_command
from metaformer.export import FORMATS, export_opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT", help="run's folder, checkpoint, or model with released weights")
    add("--to", required=True, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    add("--out", required=True, type=Path, metavar="FILE", help="file to write")
    add("--model", metavar="NAME", help="timm's name of the model, if the checkpoint does not tell it")
    add("--size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width (default: as in training)")
    add("--features", action="store_true", help="export the stages' maps level0, level1, ... in place of the logits")
    options = parser.parse_args()
    opened = open_checkpoint(options.source, options.model)
    done = export_opened(opened, options.to, options.out, options.size, options.features)
    print(f"{opened.name} -> {options.out} ({options.to}): {done}")


if __name__ == "__main__":
    run_command(main)
