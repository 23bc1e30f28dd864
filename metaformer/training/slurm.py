"""Training runs as Slurm jobs. A job that is preempted or out of time saves, is queued again and continues."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import submitit

from metaformer.errors import InputError

SCRIPT = Path(__file__).resolve().parents[2] / "classification" / "dist_train.sh"


class TrainingJob:
    """The task of one node, which runs dist_train.sh.

    Args:
        arguments: arguments of dist_train.sh, with the run's folder and ``--resume``, so that they can continue it.
        gpus: GPUs of each node.
    """

    def __init__(self, arguments: list[str], gpus: int):
        self.arguments, self.gpus = arguments, gpus
        self.process: subprocess.Popen | None = None

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
        if status := self.process.wait():
            raise RuntimeError(f"dist_train.sh ended with status {status}")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Let the run save, and return the job that continues it. submitit calls this when Slurm takes the node
        away."""
        if self.process:  # otherwise Slurm takes the node away before the run has begun
            self.process.send_signal(signal.SIGTERM)
            with suppress(ChildProcessError):  # the run has ended on its own; started again, it ends at once
                # Not Popen.wait(): the call in __call__, which is interrupted here, holds its lock.
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(TrainingJob(self.arguments, self.gpus))


def submit(
    jobs: list[TrainingJob], logs: str, partition: str | None, nodes: int, cpus_per_gpu: int, minutes: int
) -> list[submitit.Job]:
    """Submit all jobs as one array; they fail independently.

    Args:
        logs: folder for the output of the jobs.

    Raises:
        InputError: Slurm is not installed on this machine.
    """
    if not shutil.which("sbatch"):
        raise InputError("there is no Slurm on this machine (no sbatch): submit from a login node")
    # By default, submitit queues a job again after at most three timeouts.
    executor = submitit.AutoExecutor(folder=logs, cluster="slurm", slurm_max_num_timeout=1_000_000)
    executor.update_parameters(
        name="metaformer",
        timeout_min=minutes,
        nodes=nodes,
        tasks_per_node=1,
        gpus_per_node=jobs[0].gpus,
        cpus_per_task=cpus_per_gpu * jobs[0].gpus,
        slurm_partition=partition,
        slurm_signal_delay_s=120,
        slurm_additional_parameters={"requeue": True},
    )
    with executor.batch():
        return [executor.submit(job) for job in jobs]
