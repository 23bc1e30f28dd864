"""Submit a run to a Slurm cluster; preempted or out of time, it saves, is queued again and continues where it stood.

python classification/submit.py --partition NAME [--nodes 1] [--gpus 8] [--time 4320] [CONFIG] [key=value ...]

What follows the options goes to dist_train.sh. --cluster local runs the job on this machine instead.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import cloudpickle
import submitit

from metaformer.errors import InputError

SCRIPT = Path(__file__).resolve().parents[2] / "classification" / "dist_train.sh"
# The job's process finds this module's code in what is submitted, wherever it starts.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class TrainingJob:
    """One task per node: dist_train.sh for the processes of that node."""

    def __init__(self, arguments: list[str], gpus: int):
        self.arguments, self.gpus = arguments, gpus

    def __call__(self) -> None:
        job = submitit.JobEnvironment()
        environment = {
            **os.environ,
            "GPUS": str(self.gpus),
            "NNODES": str(job.num_nodes),
            "NODE_RANK": str(job.node),
            "MASTER_ADDR": job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1",
            "PORT": str(20000 + int(job.raw_job_id) % 20000),  # jobs may share a node
            "PYTHON": sys.executable,
        }
        self.process = subprocess.Popen(["bash", str(SCRIPT), *self.arguments], env=environment)
        self._wait()
        status = self.process.wait()
        if status:
            raise RuntimeError(f"dist_train.sh ended with status {status}")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called when Slurm takes the node away: let the run save, and queue what continues it."""
        self.process.send_signal(signal.SIGTERM)
        self._wait()
        return submitit.helpers.DelayedSubmission(TrainingJob(self.arguments, self.gpus))

    def _wait(self) -> None:
        # Not Popen.wait: checkpoint() is called by a signal while __call__ waits, and would wait for Popen's lock too.
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)


def submit(arguments: list[str]) -> submitit.Job:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", choices=["slurm", "local"], default="slurm")
    parser.add_argument("--partition")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="on each node")
    parser.add_argument("--cpus-per-gpu", type=int, default=12)
    parser.add_argument("--time", type=int, default=4320, help="minutes")
    parser.add_argument("--logs", default="runs/slurm", help="folder of the job's own output")
    options, training = parser.parse_known_args(arguments)
    if options.cluster == "local" and options.nodes > 1:
        raise InputError("--cluster local has one node: leave out --nodes")
    if not any(argument.removeprefix("--").startswith("output=") for argument in training):
        training.append(f"output=runs/{datetime.now():%Y%m%d-%H%M%S}")  # queued again, it must find its folder
    executor = make_executor(
        options.cluster,
        options.logs,
        options.partition,
        nodes=options.nodes,
        gpus=options.gpus,
        cpus_per_gpu=options.cpus_per_gpu,
        time=options.time,
    )
    return executor.submit(TrainingJob([*training, "--resume"], options.gpus))


def make_executor(
    cluster: str, logs: str, partition: str | None, *, nodes: int, gpus: int, cpus_per_gpu: int, time: int
) -> submitit.AutoExecutor:
    """Of a :class:`TrainingJob`; ``gpus`` are those of each node, ``time`` is in minutes.

    Raises:
        InputError: no Slurm on this machine.
    """
    if cluster == "slurm" and not shutil.which("sbatch"):
        raise InputError("there is no Slurm on this machine (no sbatch): submit from a login node, or --cluster local")
    executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
    executor.update_parameters(name="metaformer", timeout_min=time, tasks_per_node=1)
    if cluster == "slurm":
        executor.update_parameters(
            nodes=nodes,
            gpus_per_node=gpus,
            cpus_per_task=cpus_per_gpu * gpus,
            slurm_partition=partition,
            slurm_signal_delay_s=120,
            slurm_additional_parameters={"requeue": True},
        )
    return executor


def main() -> None:
    job = submit(sys.argv[1:])
    print(f"job {job.job_id}; log: {job.paths.stdout}")
