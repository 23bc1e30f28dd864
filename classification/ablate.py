"""Train the rows of Table 5 on a small task with several seeds each, several runs at a time.

Each run is a run of train.py in the folder OUTPUT/ROW-SEED, with its log beside it. The same command again continues
runs that were stopped and skips those that finished or diverged. On a machine with GPUs the runs share them.
--partition submits them to a Slurm cluster instead, each as a job with one GPU. These commands then compare the rows:

    python analysis/records.py OUTPUT && python analysis/make_figures.py && python analysis/make_tables.py
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from metaformer.errors import InputError, run_command
from metaformer.training import study as studies
from metaformer.training.checkpoints import locked
from metaformer.training.slurm import TrainingJob, submit


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="ablate.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", metavar="STUDY", help="file in configs/studies/, or its name")
    parser.add_argument("--data-dir", required=True, help="folder with train/ and val/, each with a folder per class")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"of {', '.join(studies.ROWS)} (default: the study's)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: the study's")
    parser.add_argument("--output", type=Path, help="folder of the runs (default: runs/STUDY)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--at-once", type=int, metavar="N", help="runs at the same time (default: by cores and GPUs)")
    where.add_argument("--partition", help="submit the runs to this partition of a Slurm cluster")
    parser.add_argument("--time", type=int, default=240, help="minutes that such a job may take (default: %(default)s)")
    options = parser.parse_args()
    name, study = studies.read_study(options.study, rows=options.rows, seeds=options.seeds)
    if options.at_once is not None and options.at_once < 1:
        raise InputError(f"--at-once {options.at_once}: at least one run is needed")
    studies.check_data(study, options.data_dir)
    output = (options.output or Path("runs", name)).resolve()
    recipe = studies.prepare_output(output, study)
    places = studies.Places(options.at_once)
    workers = studies.CORES_PER_RUN - 1 if options.partition else places.workers
    runs = studies.make_runs(name, recipe, study.rows, study.seeds, options.data_dir, workers)
    left = [run for run in runs if not run.done]
    print(f"{study.title}: {len(runs)} runs, {len(runs) - len(left)} of them done; {output}/", flush=True)
    os.environ["METAFORMER_COMMAND"] = shlex.join(["bash", "classification/ablate.sh", *sys.argv[1:]])
    if options.partition and left:
        jobs = [TrainingJob(run.arguments, gpus=1) for run in left]
        jobs = submit(jobs, str(output / "slurm"), options.partition, 1, studies.CORES_PER_RUN, options.time)
        print(f"submitted {len(jobs)} jobs, {jobs[0].job_id} to {jobs[-1].job_id}")
        return 0
    with locked(output) as lock:
        return studies.run_all(runs, places, lock)


if __name__ == "__main__":
    run_command(main)
