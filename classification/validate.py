"""Top-1, top-5 and images per second of a checkpoint or a run; writes a result record with its provenance."""

from metaformer.errors import run_command
from metaformer.training.validation import main

if __name__ == "__main__":
    run_command(main)
