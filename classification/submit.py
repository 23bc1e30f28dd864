"""Submit a training run to a Slurm cluster. A preempted or timed-out job saves, is queued again and continues."""

import argparse

from metaformer.errors import InputError, run_command
from metaformer.training.checkpoints import resumable
from metaformer.training.slurm import TrainingJob, submit


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="submit.py [options] [CONFIG] [key=value ...]",
        epilog="CONFIG and key=value are those of dist_train.sh, see its --help.",
        allow_abbrev=False,
    )
    parser.add_argument("--partition", help="partition of the cluster (default: the cluster's own)")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each machine (default: %(default)s)")
    parser.add_argument("--cpus-per-gpu", type=int, default=12, help="CPU cores per GPU (default: %(default)s)")
    parser.add_argument("--time", type=int, default=4320, help="time limit in minutes (default: %(default)s)")
    parser.add_argument("--logs", default="runs/slurm", help="folder for the output of the job (default: %(default)s)")
    options, settings = parser.parse_known_args()
    if min(options.nodes, options.gpus, options.cpus_per_gpu, options.time) < 1:
        raise InputError("--nodes, --gpus, --cpus-per-gpu and --time are whole numbers from 1")
    job = TrainingJob(resumable(settings), options.gpus)
    [submitted] = submit([job], options.logs, options.partition, options.nodes, options.cpus_per_gpu, options.time)
    print(f"job {submitted.job_id}; log: {submitted.paths.stdout}")


if __name__ == "__main__":
    run_command(main)
