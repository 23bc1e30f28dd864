"""Train rows of Table 5 on a small task with several seeds each, several runs at a time."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from metaformer.errors import InputError, check_known
from metaformer.provenance import cores, write_file
from metaformer.training import yaml12
from metaformer.training.checkpoints import check_same_settings, read_run
from metaformer.training.config import Count, Positive, check, check_key, read_yaml, read_yaml_mapping
from metaformer.training.data import load_data
from metaformer.training.distributed import StopSignal
from metaformer.variants import ROWS

STUDIES = Path(__file__).resolve().parents[2] / "configs" / "studies"
TRAIN = Path(__file__).resolve().parents[2] / "classification" / "train.py"
DONE = ("finished", "diverged")
"""Statuses in run.json of runs that are not started again."""
PAUSE = 1.0
"""Seconds between two checks of the runs."""
CORES_PER_RUN = 4
"""Cores for a run and its loader on a machine with GPUs."""


class Task(BaseModel):
    """Sizes of the study's data set; other data are refused."""

    model_config = ConfigDict(extra="forbid")

    classes: Positive
    train_images: Positive
    val_images: Positive


class Study(BaseModel):
    """A file of configs/studies/. ``note`` explains the recipe, and ``recipe`` has the settings of all runs."""

    model_config = ConfigDict(extra="forbid")

    title: str
    note: str
    data: Task
    rows: Annotated[list[Literal[tuple(ROWS)]], Field(min_length=1)] = list(ROWS)
    seeds: Annotated[list[Count], Field(min_length=1)] = [0, 1, 2]
    recipe: dict[str, Any]


class Run(NamedTuple):
    """A run of a study; ``arguments`` are those of train.py."""

    folder: Path
    arguments: list[str]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def done(self) -> bool:
        return read_run(self.folder).get("status") in DONE


def read_study(given: str, **chosen: list | None) -> tuple[str, Study]:
    """Read a study and its name, from a file of configs/studies/ or by its name there.

    Args:
        chosen: ``rows`` and ``seeds`` replace those of the file unless they are ``None``.

    Raises:
        InputError: the study does not exist or is elsewhere, or has a wrong field, row or setting.
    """
    path = Path(given) if given.endswith(".yaml") else STUDIES / f"{given}.yaml"
    if not path.is_file():
        check_known("study", given, sorted(file.stem for file in STUDIES.glob("*.yaml")))
    if path.resolve().parent != STUDIES.resolve():
        raise InputError(f"{path} is not in {STUDIES}, where the tables look for the study of a record: copy it there")
    values = read_yaml_mapping(path) | {name: value for name, value in chosen.items() if value}
    study = check(values, f"the command line and {path}", Study)
    for key in study.recipe:
        check_key(key, str(path))
    check(study.recipe, source=str(path))
    if fixed := {"model", "seed", "output", "data_dir", "study", "row"} & study.recipe.keys():
        raise InputError(f"{path}: the recipe sets {sorted(fixed)[0]}, which is not the same for all runs")
    return path.stem, study


def check_data(study: Study, data_dir: str) -> None:
    """Refuse data of other classes or another size than the study's."""
    found = load_data(check({**study.recipe, "data_dir": data_dir}, source="the study"), workers=0).summary
    for what, expected in study.data:
        if found[what] != expected:
            name = what.replace("_", " ")
            raise InputError(f"{data_dir} has {found[what]:,} {name}, and the study is on {expected:,}: give its data")


def prepare_output(output: Path, study: Study) -> Path:
    """Write the study's recipe to ``output``, where all runs read it; returns the file.

    Raises:
        InputError: the folder contains runs of another recipe, or cannot be written.
    """
    path = output / "recipe.yaml"
    if path.is_file():
        check_same_settings(check(read_yaml(path), str(path)), check(study.recipe, "the study"), output)
    write_file(path, yaml12.dump(study.recipe).encode())
    return path


def make_runs(name: str, recipe: Path, rows: list[str], seeds: list[int], data_dir: str, workers: int) -> list[Run]:
    """All runs, each row and seed once; all rows with the first seed come first."""
    runs = []
    for seed, row in product(dict.fromkeys(seeds), dict.fromkeys(rows)):
        folder = recipe.parent / f"{row}-{seed}"
        settings = {"study": name, "row": row, "seed": seed, "data_dir": Path(data_dir).resolve(), "output": folder}
        settings |= {**ROWS[row], "workers": workers, "resume": True}
        runs.append(Run(folder, [str(recipe), *(f"{key}={value}" for key, value in settings.items())]))
    return runs


class Places:
    """Places for simultaneous runs: one core each, or on a machine with GPUs one or more places per GPU."""

    def __init__(self, at_once: int | None):
        gpus = torch.cuda.device_count()
        self.number = at_once or (max(gpus, cores() // CORES_PER_RUN) if gpus else cores())
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.gpus = visible.split(",")[:gpus] if visible else [str(gpu) for gpu in range(gpus)]
        self.threads = max(1, cores() // self.number)
        self.workers = max(1, self.threads - 1) if gpus else 0

    def environment(self, place: int) -> dict[str, str]:
        # By default, glibc returns the memory of a training step to the kernel and requests it again in the next step.
        environment = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**32), **os.environ}
        environment |= {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[place % len(self.gpus)]
        return environment


def run_all(runs: list[Run], places: Places, lock: int) -> int:
    """Run all that are not done; returns the exit status, 128 + the number of the signal that stopped the study.

    Args:
        lock: file descriptor of the lock of the study's folder, which the runs inherit.
    """
    waiting = deque(run for run in runs if not run.done)
    free = deque(range(places.number))
    active: dict[int, tuple[Run, subprocess.Popen]] = {}
    failed: list[Run] = []
    bar = tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run", dynamic_ncols=True, disable=None)
    with StopSignal() as stop, bar:
        while active or (waiting and not stop.received):
            while waiting and free and not stop.received:
                place, run = free.popleft(), waiting.popleft()
                active[place] = run, start(run, places.environment(place), lock)
            bar.set_description(", ".join(run.name for run, _ in active.values()))
            time.sleep(PAUSE)
            for place, (run, process) in list(active.items()):
                if process.poll() is None:
                    if stop.received:
                        process.send_signal(signal.SIGTERM)  # the first makes it save; later ones have no effect
                    continue
                del active[place]
                free.append(place)
                bar.update()
                if run.done:
                    tqdm.write(outcome(run))
                elif not stop.received:
                    failed.append(run)
                    tqdm.write(f"{run.name}: failed, see {run.log}", file=sys.stderr)
    if stop.received:
        return 128 + stop.received
    if failed:
        names = ", ".join(run.name for run in failed)
        print(f"error: {len(failed)} of {len(runs)} runs failed: {names}; the same command again tries them once more",
              file=sys.stderr)  # fmt: skip
    return 1 if failed else 0


def start(run: Run, environment: dict[str, str], lock: int) -> subprocess.Popen:
    with run.log.open("a", encoding="utf-8") as log:
        command = [sys.executable, str(TRAIN), *run.arguments]
        # In its own process group, so that only this process forwards a Ctrl-C to it.
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, pass_fds=[lock]
        )


def outcome(run: Run) -> str:
    record = read_run(run.folder)
    if record["status"] == "diverged":
        return f"{run.name}: diverged ({record['error'].split(';')[0]})"
    return f"{run.name}: top-1 {record['curve'][-1]['top1']:.2f} % ({record['wall_s'] / 60:.1f} minutes)"
