"""The folder of a run with its checkpoints last.pt, previous.pt and best.pt."""

import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from metaformer.errors import InputError
from metaformer.provenance import read_json, writing
from metaformer.training.config import Config, check, load_config, save_config
from metaformer.training.data import HASHES
from metaformer.weights import read_checkpoint

MAY_CHANGE = {"output", "resume", "workers", "bad_pictures", "log_interval", "data_dir", "expected_top1"}
"""Settings that may differ when a run continues, because they do not change what it computes."""
PROGRESS = ("epoch", "step", "history", "starts", "skipped", "seconds")
"""Fields of :class:`Progress` in a checkpoint."""
STATE = {*PROGRESS, "wall_s", "state_dict", "optimizer", "amp_scaler", "loss_sum"}
"""Keys of every checkpoint that can continue a run."""


@dataclass
class Progress:
    """The progress of a run as plain data; the other state of a run is the weights and the optimizer."""

    epoch: int = 0
    step: int = 0
    """Optimizer steps taken in this epoch."""
    history: list[dict[str, float]] = field(default_factory=list)
    """A row of metrics.csv for each epoch."""
    starts: list[dict[str, Any]] = field(default_factory=list)
    """The provenance of each process that has worked on the run."""
    skipped: dict[str, list[str]] = field(default_factory=lambda: {"training": [], "validation": []})
    """Names of the unreadable pictures that were left out."""
    seconds: float = 0.0
    """Time spent on training in this epoch."""
    began: float = field(default_factory=time.time)
    """Time of the first start, plus the pauses before the later starts."""

    @property
    def wall_s(self) -> float:
        return time.time() - self.began

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*PROGRESS, "wall_s")}

    def load(self, state: dict[str, Any]) -> None:
        earlier = {name: state[name] for name in PROGRESS}
        vars(self).update(earlier, starts=[*earlier["starts"], *self.starts], began=self.began - state["wall_s"])


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json; empty if it is missing or damaged."""
    try:
        return read_json(folder / "run.json")
    except InputError:
        return {}


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[int]:
    """Create the folder and lock it; yields the lock's file descriptor.

    A program that inherits the descriptor keeps the lock after the end of this process. File systems without locks get
    none.

    Args:
        wait: wait for the process that has the lock instead of raising an error.

    Raises:
        InputError: a run has the lock, or the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    with file:
        # The loader's processes outlive this one for seconds if it is killed.
        os.register_at_fork(after_in_child=file.close)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise InputError(f"a run is under way in {folder}: wait for it or stop it") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        yield file.fileno()


def folder_of(config: Config) -> Path:
    """The run's folder, by default one named after the model, the data and the time."""
    data_name = Path(config.dataset or config.data_dir or "").name
    return Path(config.output or f"runs/{config.model}-{data_name}-{datetime.now():%Y%m%d-%H%M%S}")


def resumable(arguments: list[str]) -> list[str]:
    """The arguments of train.py with the run's folder and ``--resume``, which begin the run and also continue it."""
    return [*arguments, f"output={folder_of(load_config(arguments))}", "--resume"]


def has_state(folder: Path) -> bool:
    """Whether the folder has a checkpoint to continue from, damaged or not."""
    return any(os.path.isfile(folder / name) for name in ("last.pt", "previous.pt"))


def open_folder(config: Config, folder: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Begin a run in the folder, or return the state from which the run in it continues.

    Args:
        facts: properties of the data, which are compared with those in the state.

    Raises:
        InputError: the folder contains a run without ``resume`` or with other settings or data, has no undamaged
            checkpoint, or cannot be written.
    """
    path = folder / "config.yaml"
    if path.is_file() and not config.resume:
        raise InputError(f"{folder} already holds a run: add --resume to continue it, or give another output=")
    with writing(folder):
        for partial in folder.glob("*.tmp"):  # left by a killed process
            partial.unlink()
    if state := load_last(folder):
        check_same_run(state, config, facts, folder)
    else:
        save_config(config, path)
    return state


def check_same_settings(before: Config, now: Config, folder: Path) -> None:
    earlier, given = before.model_dump(mode="json"), now.model_dump(mode="json")
    for key in given:
        if key not in MAY_CHANGE and earlier[key] != given[key]:
            raise InputError(
                f"{folder} was trained with {key}={earlier[key]} and cannot continue with {key}={given[key]}: "
                "give its own settings, or another output="
            )


def check_same_run(state: dict[str, Any], config: Config, facts: dict[str, Any], folder: Path) -> None:
    """Refuse to continue ``state`` with other settings, other classes or another number of pictures.

    Prints a warning if pictures have been replaced.
    """
    check_same_settings(check(state["config"], str(folder / "last.pt")), config, folder)
    changed = {name: state.get(name) for name, value in facts.items() if state.get(name) != value}
    for name in changed.keys() - HASHES:
        raise InputError(
            f"{folder} was trained with {name}={changed[name]}, and its data now have {facts[name]}: continue with the "
            "data as they were, or give another output="
        )
    if changed:
        print(f"warning: pictures have other names or sizes than when {folder} was last trained", file=sys.stderr)


def load_last(folder: Path) -> dict[str, Any] | None:
    """The state to continue from, if there is one.

    If last.pt is damaged, previous.pt replaces it at once, so that the next save keeps the good one.

    Raises:
        InputError: all checkpoints are damaged.
    """
    last, previous = folder / "last.pt", folder / "previous.pt"
    state = read_state(last)
    if isinstance(state, str) and (state != "missing" or previous.exists()):
        problem, state = state, read_state(previous)
        if isinstance(state, str):
            raise InputError(f"{last} is {problem} and {previous} is {state}: start again with another output=")
        print(f"warning: {last} is {problem}: {previous} takes its place", file=sys.stderr)
        with writing(last):
            previous.replace(last)
    return None if isinstance(state, str) else state


def read_state(path: Path) -> dict[str, Any] | str:
    """The content of a checkpoint that can continue a run, or the reason why it cannot."""
    if not path.is_file():
        return "missing"
    try:
        state = read_checkpoint(path)
    except InputError:
        return "damaged"
    return state if state.keys() >= STATE else "not the checkpoint of a run"
