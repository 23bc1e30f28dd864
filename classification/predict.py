"""The most likely classes of pictures, by a run or a checkpoint."""

from metaformer.errors import run_command
from metaformer.prediction import main

if __name__ == "__main__":
    run_command(main)
