"""Checks the records of runs and copies them to analysis/results/, from which the tables are made.

    python analysis/records.py RECORD_OR_FOLDER...

A record must be of a model, data set and input in the paper's tables, or of a study. If one record is wrong, none is
copied. Absolute paths in the records are cut to their last part.
"""

import argparse
from pathlib import Path

from metaformer.analysis.measured import check_record
from metaformer.errors import run_command
from metaformer.records import import_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = (
        "a record file (of benchmark.py, loader.py, validate.py); a run folder of classification/ (run.json and "
        "validation.json); an output folder of ablate.sh (run.json of every finished run); or a work dir of mmdet or "
        "mmseg (result.json and training.json beside the logs)"
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="RECORD_OR_FOLDER", help=sources)
    for target in import_records(parser.parse_args().sources, check=check_record):
        print(target)


if __name__ == "__main__":
    run_command(main)
