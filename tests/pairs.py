"""Training runs in processes of their own, which start at once: they are forked from one that has imported all.

The processes import this module, so that it imports no more than they need.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from conftest import ROOT, TINY, trained
from metaformer.errors import run_command
from metaformer.training import engine


class Ended(NamedTuple):
    status: int | None
    """None of a process that had to be killed."""
    printed: str


FRESH = multiprocessing.get_context("forkserver")
"""Starts processes from one that has imported PyTorch and has no threads of it, unlike the one that runs the tests."""
FRESH.set_forkserver_preload(["metaformer.training.engine", "torch.distributed.run", "pytest", "unittest.mock"])


class Signal(NamedTuple):
    """Sent by the process ``rank`` to itself when it calls a method of the trainer for the second time."""

    method: str
    rank: int
    number: int = signal.SIGTERM


def pair(
    *settings: str, folders: tuple[Path, Path], of_one: tuple[str, ...] = (), stop: Signal | None = None
) -> list[Ended]:
    """Train in two processes over gloo, each in its folder; ``of_one`` are settings of the second alone."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    arguments = ["empty.yaml", *TINY, *settings]
    processes = []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        (folder / "empty.yaml").write_text("")
        own = [*arguments, *(of_one if rank else ())]
        processes.append(FRESH.Process(target=work, args=(rank, port, folder, own, stop)))
        processes[-1].start()
    for process in processes:
        process.join(120)
    status = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return [Ended(status[rank], (folders[rank] / f"printed-{rank}").read_text()) for rank in range(2)]


def work(rank: int, port: str, folder: Path, arguments: list[str], stop: Signal | None) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.chdir(folder)
    sys.stdout = sys.stderr = Path(f"printed-{rank}").open("w", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    if stop and stop.rank == rank:
        original, calls = getattr(engine.Trainer, stop.method), []

        def call(self, *arguments):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), stop.number)
            return original(self, *arguments)

        setattr(engine.Trainer, stop.method, call)
    run_command(lambda: trained(*arguments))


class Script:
    """A script of the repository at work in ``folder``, with what study.py uses of ``subprocess.Popen``."""

    def __init__(self, script: Path | str, arguments: list[str], folder: Path, log: Path | None = None, **environment):
        self.out, self.err = (log or folder / f"{name}.txt" for name in ("out", "err"))
        given = (str(ROOT / script), arguments, folder, self.out, self.err, {**os.environ, **environment})
        self.process = FRESH.Process(target=act, args=given)
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def ended(self) -> tuple[int | None, str, str]:
        """The exit status, what it printed, and its errors."""
        self.process.join(300)
        status = self.poll()
        self.process.kill()
        return status, self.out.read_text(), self.err.read_text()


def act(script: str, arguments: list[str], folder: Path, out: Path, err: Path, environment: dict[str, str]) -> None:
    os.setsid()  # so that a Ctrl-C reaches it only from those that started it
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
