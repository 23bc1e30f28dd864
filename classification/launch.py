"""Start the processes of a training run with torchrun, and report errors in one line; see train.py --help."""

import logging
import os
import runpy
import shlex
import signal
import sys
from pathlib import Path

import torch
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from metaformer.errors import InputError, run_command
from metaformer.provenance import cores
from metaformer.training.checkpoints import resumable
from metaformer.training.distributed import STOP_SIGNALS

TRAIN = Path(__file__).with_name("train.py")


def number(name: str, default: int, least: int = 1) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"{name}={text} in the environment: use a whole number from {least}")
    return int(text)


def main() -> int:
    arguments = sys.argv[1:]
    processes, nodes = number("GPUS", torch.cuda.device_count() or 1), number("NNODES", 1)
    node, port = number("NODE_RANK", 0, least=0), number("PORT", 29500)
    restarts = number("RESTARTS", 0, least=0)
    os.environ["METAFORMER_COMMAND"] = shlex.join(["bash", "classification/dist_train.sh", *arguments])
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, cores() // processes)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)  # because this process has read the environment before
    if (processes == nodes == 1 and not restarts) or {"-h", "--help"} & set(arguments):
        # In this process, because a new one would take seconds to import the same modules again.
        runpy.run_path(str(TRAIN), run_name="__main__")

    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    options = [f"--nnodes={nodes}", f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    options.append("--signals-to-handle=" + ",".join(signal.Signals(number).name for number in STOP_SIGNALS))
    # Seconds to save; Slurm gives 120. Earlier versions of PyTorch do not read this and always give 30.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "110")
    if nodes == 1 and "PORT" not in os.environ:
        options.append("--standalone")  # chooses a free port
    elif restarts:  # this store is new at each restart; a shared one would keep the addresses of dead processes
        options += ["--rdzv_backend=c10d", f"--rdzv_endpoint={address}:{port}"]
    else:
        options += [f"--node_rank={node}", f"--master_addr={address}", f"--master_port={port}"]
    if restarts:
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        arguments = resumable(arguments)
    logging.disable(logging.ERROR)  # report() prints failures in one line instead of torchrun
    try:
        run(parse_args([*options, str(TRAIN), *arguments]))
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as error:
        return report(error)
    except DistNetworkError as error:
        raise InputError(
            f"the processes cannot meet at {address}:{port}: set MASTER_ADDR to machine 0, PORT to a free port there "
            f"({error})"
        ) from error
    return 0


def report(error: ChildFailedError) -> int:
    """Print the error of the first process that failed, and return its exit status."""
    # When a process is killed, the others fail too, and may report it first.
    killed = [item for item in error.failures.items() if item[1].exitcode == -signal.SIGKILL]
    rank, failure = killed[0] if killed else error.get_first_failure()
    status = failure.exitcode
    if status in [128 + number for number in STOP_SIGNALS]:
        return status  # the process saved and printed so
    if status < 0:
        print(f"error: process {rank} was killed by {signal.Signals(-status).name}", file=sys.stderr)
        return 128 - status
    details = failure.message
    if not isinstance(details, dict):
        print(f"error: process {rank} ended with status {status}: {details}", file=sys.stderr)
        return status
    kind, _, sentence = details["message"].partition(": ")
    one_line = kind in ("InputError", "MachineError") and not os.environ.get("METAFORMER_TRACEBACK")
    print(f"error: {sentence}" if one_line else details["extraInfo"]["py_callstack"], file=sys.stderr)
    return status


if __name__ == "__main__":
    run_command(main)
