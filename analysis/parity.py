"""Compares models and training with the official code, imported from a clone of github.com/sail-sg/poolformer.

    python analysis/parity.py CLONE [--record FILE]

Outputs and gradients of the ten released architectures; optimizer, schedule, augmentation, Mixup, CutMix, erasing, loss
and evaluation input; and the official training loop beside ours, step by step. Nothing in the clone is changed, and no
GPU, data set or released weights are needed. Exits with status 1 if anything differs that should not.
"""

import argparse
from pathlib import Path

from metaformer.analysis.cells import markdown
from metaformer.analysis.parity import measure
from metaformer.analysis.speed import parity_rows
from metaformer.errors import run_command
from metaformer.provenance import provenance, write_json
from metaformer.records import Parity


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("clone", type=Path, metavar="CLONE", help="folder of the official repository")
    add("--record", type=Path, metavar="FILE", help="write a JSON record to this file")
    options = parser.parse_args()
    record = {**measure(options.clone), **provenance()}
    rows = parity_rows(Parity.model_validate(record))
    print(markdown(rows))
    if options.record:
        write_json(options.record, record)
    return int(any(row["verdict"] and row["verdict"].kind == "unexplained" for row in rows))


if __name__ == "__main__":
    run_command(main)
