"""Submit a run to a Slurm cluster; preempted or out of time, it saves, is queued again and continues where it stood."""

from metaformer.errors import run_command
from metaformer.training.slurm import main

if __name__ == "__main__":
    run_command(main)
