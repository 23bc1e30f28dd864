"""Result records: what runs, benchmarks, studies, campaigns of faults and the toolboxes measured, checked."""

from metaformer.errors import run_command
from metaformer.records import main

if __name__ == "__main__":
    run_command(main)
