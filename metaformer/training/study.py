"""Train the rows of Table 5 on a small task, several seeds each, as many at once as the hardware holds.

bash classification/ablate.sh STUDY --data-dir FOLDER [--rows ROW...] [--seeds N...] [--output FOLDER] [--at-once N]
    [--partition NAME]

STUDY is a file of configs/studies/ or its name there. Every run is one of train.py, in OUTPUT/ROW-SEED with its log
beside it. The same command again continues what was stopped and leaves out what is done; a run that diverged is done.
On a machine with GPUs the runs are spread over them; --partition submits them to a Slurm cluster instead, each as a job
of an array with one GPU. Then

python analysis/records.py OUTPUT && python analysis/make_tables.py && python analysis/make_figures.py

compares the rows.
"""

import argparse
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NamedTuple

import submitit
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from metaformer.errors import InputError, nearest
from metaformer.provenance import cores, write_file
from metaformer.training.config import check, check_key, read_yaml_mapping
from metaformer.training.data import load_data
from metaformer.training.distributed import STOP_SIGNALS
from metaformer.training.slurm import TrainingJob, make_executor
from metaformer.variants import ROWS

STUDIES = Path(__file__).resolve().parents[2] / "configs" / "studies"
TRAIN = Path(__file__).resolve().parents[2] / "classification" / "train.py"
DONE = ("finished", "diverged")
"""What run.json says of a run that is not to be started again."""
PAUSE = 1.0
"""Seconds between two looks at the runs."""
CORES_PER_RUN = 4
"""On a machine with GPUs, for the run's process and its loaders."""

Positive = Annotated[int, Field(ge=1)]
Settings = dict[str, Any]


class Task(BaseModel):
    """The data that a study is on; other data are refused."""

    model_config = ConfigDict(extra="forbid")

    classes: Positive
    train_images: Positive
    val_images: Positive


class Study(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: str
    note: str
    """How the recipe came about."""
    data: Task
    rows: Annotated[list[str], Field(min_length=1)] = list(ROWS)
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0, 1, 2]
    recipe: Settings
    """Of train.py, the same for all rows."""


class Run(NamedTuple):
    row: str
    seed: int
    folder: Path
    arguments: list[str]
    """Of train.py."""

    def record(self) -> dict[str, Any]:
        """What train.py has written of it."""
        file = self.folder / "run.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @property
    def done(self) -> bool:
        return self.record().get("status") in DONE

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")


# What is to be run


def read_study(given: str) -> tuple[str, Study]:
    """A study and its name, from a file or its name in configs/studies/.

    Raises:
        InputError: no such study, or one with a wrong field, row or setting.
    """
    path = Path(given) if given.endswith(".yaml") else STUDIES / f"{given}.yaml"
    names = sorted(file.stem for file in STUDIES.glob("*.yaml"))
    if not path.is_file():
        raise InputError(f"there is no study {given!r}{nearest(given, names)}: there are {', '.join(names)}")
    try:
        study = Study(**read_yaml_mapping(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    check_rows(study.rows)
    for key in study.recipe:
        check_key(key, str(path))
    check(study.recipe, source=str(path))
    fixed = {"model", "seed", "output", "data_dir", "study", "row"} & study.recipe.keys()
    if fixed:
        raise InputError(f"{path}: the recipe sets {sorted(fixed)[0]}, which is not the same for all runs")
    return path.stem, study


def check_rows(rows: list[str]) -> None:
    for row in rows:
        if row not in ROWS:
            raise InputError(f"there is no row {row!r}{nearest(row, ROWS)}: there are {', '.join(ROWS)}")


def check_data(study: Study, data_dir: str) -> None:
    """Refuse data of other classes or another size than the study's."""
    config = check({**study.recipe, "data_dir": data_dir}, source="the study")
    found = load_data(config, workers=0).summary
    for what, expected in study.data:
        if found[what] != expected:
            name = what.replace("_", " ")
            raise InputError(f"{data_dir} has {found[what]:,} {name}, and the study is on {expected:,}: give its data")


def prepare_output(output: Path, study: Study) -> Path:
    """The file with the study's recipe in ``output``, which all runs there share.

    Raises:
        InputError: the folder holds runs of another recipe, or cannot be written.
    """
    path = output / "recipe.yaml"
    if path.is_file():
        before = read_yaml_mapping(path)
        for key in sorted(before.keys() | study.recipe.keys()):
            if before.get(key) != study.recipe.get(key):
                raise InputError(
                    f"{output} holds runs with {key}={before.get(key)}, and the study has {study.recipe.get(key)}: "
                    "give another --output"
                )
        return path
    try:
        output.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(study.recipe, sort_keys=False)
        write_file(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise InputError(f"cannot write to the output folder {output}: {error.strerror}") from error
    return path


def make_runs(name: str, recipe: Path, rows: list[str], seeds: list[int], data_dir: str, workers: int) -> list[Run]:
    """All runs, each row and seed once; all rows with the first seed come first."""
    runs = []
    for seed, row in product(dict.fromkeys(seeds), dict.fromkeys(rows)):
        folder = recipe.parent / f"{row}-{seed}"
        settings = {
            **ROWS[row],
            **{"study": name, "row": row, "seed": seed, "data_dir": str(Path(data_dir).resolve())},
            **{"output": str(folder), "workers": workers, "resume": True},
        }
        runs.append(Run(row, seed, folder, [str(recipe), *(f"{key}={json.dumps(settings[key])}" for key in settings)]))
    return runs


# Running


class Slots:
    """Places for runs at the same time: a GPU or a core each, several to a GPU."""

    def __init__(self, at_once: int | None, command: str):
        self.command = command
        gpus = torch.cuda.device_count()
        number = at_once or (max(gpus, cores() // CORES_PER_RUN) if gpus else cores())
        self.free = deque(range(number))
        self.gpus = visible_gpus(gpus)
        self.threads = max(1, cores() // number)
        self.workers = max(1, self.threads - 1) if gpus else 0

    def environment(self, slot: int) -> dict[str, str]:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        environment["METAFORMER_COMMAND"] = self.command  # for the record of the run
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return environment


def visible_gpus(count: int) -> list[str]:
    """How CUDA_VISIBLE_DEVICES calls the GPUs that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


@contextmanager
def alone(output: Path) -> Iterator[int]:
    """A lock on the folder, as a file descriptor that the runs inherit: it lasts until the last of them has ended.

    Raises:
        InputError: another study has it, or runs that outlived theirs.
    """
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{output} has runs under way: wait for them or stop them") from error
        yield lock.fileno()


def run_all(runs: list[Run], slots: Slots, lock: int) -> int:
    """Run all of them; returns the exit status, 128 + the signal's number if one stopped the study."""
    waiting = deque(run for run in runs if not run.done)
    active: dict[int, tuple[Run, subprocess.Popen]] = {}
    failed: list[Run] = []
    epochs = Progress(runs)
    with stop_signal() as stopped, progress_bar(epochs) as bar:
        while active or (waiting and not stopped):
            while waiting and slots.free and not stopped:
                slot, run = slots.free.popleft(), waiting.popleft()
                active[slot] = run, start(run, slots.environment(slot), lock)
            time.sleep(PAUSE)
            if stopped:
                for _, process in active.values():
                    process.send_signal(signal.SIGTERM)  # again and again does no harm: the first makes it save
            for slot, (run, process) in list(active.items()):
                if process.poll() is None:
                    continue
                del active[slot]
                slots.free.append(slot)
                if run.done:
                    tqdm.write(outcome(run))
                elif not stopped:
                    failed.append(run)
                    tqdm.write(f"{run.row}, seed {run.seed}: failed, see {run.log}", file=sys.stderr)
            bar.set_description(", ".join(f"{run.row}-{run.seed}" for run, _ in active.values()))
            bar.update(epochs.done() - bar.n)
    if stopped:
        return 128 + stopped[0]
    if failed:
        names = ", ".join(f"{run.row}-{run.seed}" for run in failed)
        print(f"error: {len(failed)} of {len(runs)} runs failed: {names}; the same command again tries them once more",
              file=sys.stderr)  # fmt: skip
        return 1
    return 0


def start(run: Run, environment: dict[str, str], lock: int) -> subprocess.Popen:
    with run.log.open("a", encoding="utf-8") as log:
        command = [sys.executable, str(TRAIN), *run.arguments]
        # A group of its own, so that a Ctrl-C reaches it once, from here.
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, pass_fds=[lock]
        )


def outcome(run: Run) -> str:
    record = run.record()
    if record["status"] == "diverged":
        return f"{run.row}, seed {run.seed}: diverged ({record['error'].split(';')[0]})"
    return (
        f"{run.row}, seed {run.seed}: top-1 {record['curve'][-1]['top1']:.2f} % ({record['wall_s'] / 60:.1f} minutes)"
    )


def progress_bar(epochs: "Progress") -> tqdm:
    return tqdm(total=epochs.total, initial=epochs.done(), unit="epoch", dynamic_ncols=True, disable=None)


class Progress:
    """Epochs of all runs; a run that is done has no more to do."""

    def __init__(self, runs: list[Run]):
        self.runs = runs
        self.each = check(read_yaml_mapping(Path(runs[0].arguments[0])), source="the recipe").epochs
        self.total = self.each * len(runs)

    def done(self) -> int:
        return sum(self._of(run.record()) for run in self.runs)

    def _of(self, record: dict[str, Any]) -> int:
        return self.each if record.get("status") in DONE else record.get("epochs", {}).get("done", 0)


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that gets the number of a stop signal when one comes."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, remember) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def submit_all(runs: list[Run], executor: submitit.Executor) -> list[submitit.Job]:
    """Each run as a job of an array, with one GPU; a job that is lost is lost alone."""
    with executor.batch():
        return [executor.submit(TrainingJob(run.arguments, gpus=1)) for run in runs]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ablate.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", metavar="STUDY")
    parser.add_argument("--data-dir", required=True, help="folder with train/ and val/, each with a folder per class")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"default: the study's; any of {', '.join(ROWS)}")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: the study's")
    parser.add_argument("--output", type=Path, help="default: runs/STUDY")
    parser.add_argument("--at-once", type=int, metavar="N", help="runs at the same time; default: by cores and GPUs")
    parser.add_argument("--partition", help="submit the runs to this partition of a Slurm cluster")
    parser.add_argument("--time", type=int, default=240, help="minutes of such a job (default: %(default)s)")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    name, study = read_study(options.study)
    rows, seeds = options.rows or study.rows, options.seeds or study.seeds
    check_rows(rows)
    if min(seeds) < 0:
        raise InputError(f"there is no seed {min(seeds)}: seeds are whole numbers from 0")
    if options.at_once is not None and options.at_once < 1:
        raise InputError(f"--at-once {options.at_once}: at least one run is needed")
    check_data(study, options.data_dir)
    output = (options.output or Path("runs", name)).resolve()
    recipe = prepare_output(output, study)
    slots = Slots(options.at_once, command=shlex.join(["bash", "classification/ablate.sh", *arguments]))
    workers = CORES_PER_RUN - 1 if options.partition else slots.workers
    runs = make_runs(name, recipe, rows, seeds, options.data_dir, workers)
    left = [run for run in runs if not run.done]
    print(f"{study.title}: {len(runs)} runs, {len(runs) - len(left)} of them done; {output}/")
    if options.partition and left:
        of_each = {"nodes": 1, "gpus": 1, "cpus_per_gpu": CORES_PER_RUN, "time": options.time}
        jobs = submit_all(left, make_executor("slurm", str(output / "slurm"), options.partition, **of_each))
        print(f"submitted {len(jobs)} jobs, {jobs[0].job_id} to {jobs[-1].job_id}")
        return 0
    with alone(output) as lock:
        return run_all(runs, slots, lock)
