"""Injects faults: kills training runs and makes them fail, corrupts files, and records the losses.

python tests/faults.py [--rounds N] [--quick] [--seed S] [--only SEED] [--record FILE]

Every fault is tried once in a round, those that take milliseconds ten times unless --quick is given, and those of
torchrun in every tenth round. A fault that comes after the end of a run does not count. A run that was killed or failed
continues and must end as an undisturbed run: with the same weights, optimizer, curve and events to the last bit. A
corrupted file must be refused in one sentence or read as before, and nothing in it may be executed. A trial follows
from its seed, and --only SEED repeats it; only kills after a time hit another moment then.
"""

import argparse
import csv
import ctypes
import json
import logging
import os
import pickle
import resource
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # the trials are forked from this process, which must have no threads

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import metaformer
from conftest import EVERYTHING_RANDOM, ROOT, TINY, draw, trained
from metaformer import records
from metaformer.errors import InputError, run_command
from metaformer.provenance import provenance, write_json
from metaformer.training import engine as train
from metaformer.training.config import CONFIGS, load_config
from metaformer.weights import read_checkpoint

SECONDS = 300
"""A trial that takes longer hangs."""
VARIANTS = {
    "plain": [*TINY, "epochs=3"],
    "random": [*TINY, *EVERYTHING_RANDOM, "epochs=2", "workers=1"],
}
TIMES = {"images_per_s", "wall_s"}
"""Columns of metrics.csv that no two runs have in common."""


class Lost(Exception):
    """A fault that was not survived, and how it showed."""


class Ended(NamedTuple):
    status: int
    """As subprocess counts: negative for a signal."""
    error: str
    """What was written to stderr."""


# Processes


def start(work: Callable[[], object], folder: Path) -> int:
    """The process that does ``work``, forked from this one, which has imported all that it needs."""
    (folder / "stderr").write_text("")  # it may be killed before it can
    process = os.fork()
    if process:
        os.setpgid(process, process)
        return process
    status = 1
    try:
        os.setpgid(0, 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        run_command(work)
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(process: int, folder: Path) -> Ended:
    """Wait for a process; end what it started."""
    deadline = time.monotonic() + SECONDS
    done, status = os.waitpid(process, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.005)
        done, status = os.waitpid(process, os.WNOHANG)
    kill_group(process)
    if not done:
        os.waitpid(process, 0)
        raise Lost(f"did not end within {SECONDS} s")
    return Ended(os.waitstatus_to_exitcode(status), (folder / "stderr").read_text(errors="replace"))


def kill_group(process: int) -> None:
    with suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process, signal.SIGKILL)


def do(work: Callable[[], object], folder: Path) -> Ended:
    return finish(start(work, folder), folder)


def sentence(ended: Ended, *statuses: int) -> str:
    """What a process that failed said, which must be one sentence."""
    errors = [line for line in ended.error.splitlines() if line.startswith("error: ")]
    # PyTorch raises where a loader's process dies, which may be where Python ignores it, and says so.
    tracebacks = ended.error.count("Traceback") - ended.error.count("Exception ignored in")
    if ended.status not in statuses or len(errors) != 1 or tracebacks > 0:
        raise Lost(f"status {ended.status}: {ended.error[-2000:]}")
    return errors[0]


# What happens within the process of a run


def at_operation(number: int, output: Path, action: Callable[[], object]) -> list[str]:
    """Do ``action`` right before the operation of that number on the files in ``output``; gives those up to now."""
    seen: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        writes = event in ("os.rename", "os.remove", "os.mkdir") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and str(arguments[0]).startswith(str(output)):
            seen.append(event)
            if len(seen) == number:
                action()

    sys.addaudithook(hook)
    return seen


def at_sync(number: int, share: float) -> list[int]:
    """Kill this process when so much of the file has been written that it syncs in that turn; gives those up to now."""
    original, seen = os.fsync, []

    def fsync(file: int) -> None:
        seen.append(file)
        if len(seen) == number:
            os.ftruncate(file, int(share * os.fstat(file).st_size))
            kill_this()
        original(file)

    os.fsync = fsync
    return seen


def kill_this() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(size: int) -> None:
    """No file of this process can grow beyond ``size`` bytes any more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def write_protect(folder: Path) -> None:
    """Take away the right to write in a folder, from root as well: it loses the capability to pass over rights."""
    folder.chmod(0o500)
    override, version = 1, 0x20080522  # CAP_DAC_OVERRIDE and _LINUX_CAPABILITY_VERSION_3 of linux/capability.h
    header, sets = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
    system = ctypes.CDLL(None, use_errno=True)
    for call in (system.capget, system.capset):
        if call(header, sets):
            raise OSError(ctypes.get_errno(), "cannot change capabilities")
        sets[0] &= ~(1 << override)  # of the effective ones


# The laboratory


class Reference(NamedTuple):
    """A run that was left alone, with how long it took and what it did to files."""

    folder: Path
    seconds: float
    operations: int
    syncs: int


class Lab:
    """Pictures, undisturbed runs, and good files to spoil, in a folder of its own."""

    def __init__(self, root: Path):
        self.root = root
        self.pictures = draw(root / "pictures", val_images=9)
        (root / "empty.yaml").write_text("")
        self.marker = root / "executed"
        self.references = {name: self._reference(name) for name in VARIANTS}
        self.stopped = self._stopped()
        self.model = partial(
            timm.create_model, "poolformer_s12", num_classes=3, depths=[1, 1, 2, 1], dims=[8, 12, 16, 24]
        )
        self.weights = self.model().state_dict()
        torch.save({"state_dict": self.weights}, root / "weights.pt")
        save_file(self.weights, root / "weights.safetensors", {"format": "pt"})

    def train(self, variant: str, output: Path, pictures: Path | None = None) -> int:
        settings = [f"data_dir={pictures or self.pictures}", f"output={output}", "resume=true", *VARIANTS[variant]]
        return trained(str(self.root / "empty.yaml"), *settings)

    def _reference(self, variant: str) -> Reference:
        folder = self.root / f"undisturbed-{variant}"
        folder.mkdir()
        counts = folder / "counts.json"

        def work() -> None:
            operations, syncs = at_operation(0, folder / "run", kill_this), at_sync(0, 0)
            self.train(variant, folder / "run")
            counts.write_text(json.dumps([len(operations), len(syncs)]))

        began = time.monotonic()
        ended = do(work, folder)
        if ended.status:
            raise Lost(f"the undisturbed run ended with {ended.status}: {ended.error}")
        return Reference(folder / "run", time.monotonic() - began, *json.loads(counts.read_text()))

    def _stopped(self) -> Path:
        """A run that was asked to stop in its last epoch."""
        folder = self.root / "stopped"
        folder.mkdir()
        original, steps = train.Trainer.optimizer_step, []

        def step(trainer: train.Trainer, batches: Any) -> None:
            original(trainer, batches)
            steps.append(None)
            if len(steps) == 8:
                os.kill(os.getpid(), signal.SIGTERM)

        def work() -> int:
            train.Trainer.optimizer_step = step
            return self.train("plain", folder / "run")

        ended = do(work, folder)
        if ended.status != 128 + signal.SIGTERM:
            raise Lost(f"the run to be stopped ended with {ended.status}: {ended.error}")
        return folder / "run"

    @cached_property
    def two_processes(self) -> Path:
        """The run "plain" of two processes that was left alone."""
        folder = self.root / "undisturbed-two"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])

        def work(rank: int) -> int:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            return self.train("plain", folder / "run")

        folders = [folder / str(rank) for rank in range(2)]
        for each in folders:
            each.mkdir(parents=True)
        processes = [start(partial(work, rank), each) for rank, each in enumerate(folders)]
        for ended in [finish(process, each) for process, each in zip(processes, folders, strict=True)]:
            if ended.status:
                raise Lost(f"one of two undisturbed processes ended with {ended.status}: {ended.error}")
        return folder / "run"

    def ends_as_undisturbed(self, variant: str, folder: Path, pictures: Path | None = None) -> None:
        """Continue the run in ``folder``, and compare it with the undisturbed one."""
        output = folder / "run"
        ended = do(lambda: self.train(variant, output, pictures), folder)
        if ended.status:
            raise Lost(f"continued, it ended with {ended.status}: {ended.error[-2000:]}")
        compare(self.references[variant].folder, output)


def compare(one: Path, other: Path) -> None:
    """Two runs that should be the same but for the time they took.

    Raises:
        Lost: what differs.
    """
    for name in ("last.pt", "best.pt"):
        contents = [comparable(read_checkpoint(folder / name)) for folder in (one, other)]
        for key in contents[0].keys() | contents[1].keys():
            if not equal(*(content.get(key) for content in contents)):
                raise Lost(f"{key} of {name} differs")
    tables = [[{k: v for k, v in row.items() if k not in TIMES} for row in rows(folder)] for folder in (one, other)]
    if tables[0] != tables[1]:
        raise Lost(f"metrics.csv differs: {tables[1]}")
    events = [events_of(folder) for folder in (one, other)]
    if events[0] != events[1]:
        raise Lost(f"the events differ: {events[1]}")
    record = json.loads((other / "run.json").read_text())
    if (record["status"], record["error"]) != ("finished", None):
        raise Lost(f"run.json says {record['status']}: {record['error']}")
    if partial_files := [file.name for file in other.glob("*.tmp")]:
        raise Lost(f"{partial_files} are left over")


def comparable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    content = {key: value for key, value in checkpoint.items() if key not in ("starts", "seconds", "wall_s")}
    asked = {"output", "data_dir", "resume"}
    content["config"] = {key: value for key, value in content["config"].items() if key not in asked}
    if "history" in content:
        content["history"] = [{k: v for k, v in row.items() if k not in TIMES} for row in content["history"]]
    return content


def equal(one: Any, other: Any) -> bool:
    """To the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(equal, one, other))
    return one == other


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def events_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "images_per_s" not in tag]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in sorted(tags)}


# Runs that are killed

Trial = Callable[[Lab, np.random.Generator, Path], bool]
"""Raises Lost, or tells whether the fault has struck: some come when the run has ended."""


def killed(hurt: Callable[[Lab, np.random.Generator, Path, str], bool]) -> Trial:
    """A run hurt up to three times, at its beginning and where it continues, and then left to end."""

    def trial(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
        variant = str(rng.choice(list(VARIANTS)))
        struck = [hurt(lab, rng, folder, variant) for _ in range(rng.integers(1, 4))]
        lab.ends_as_undisturbed(variant, folder)
        return any(struck)

    return trial


def after_a_time(number: int, lab: Lab, rng: np.random.Generator, folder: Path, variant: str) -> bool:
    process = start(lambda: lab.train(variant, folder / "run"), folder)
    time.sleep(rng.uniform(0, 0.7 * lab.references[variant].seconds))  # the first run is slower than those after it
    os.kill(process, number)
    ended = finish(process, folder)
    if ended.status not in (0, -number, 128 + number):
        raise Lost(f"ended with {ended.status}: {ended.error}")
    return ended.status != 0


def between_operations(lab: Lab, rng: np.random.Generator, folder: Path, variant: str) -> bool:
    number = int(rng.integers(1, lab.references[variant].operations + 1))

    def work() -> int:
        at_operation(number, folder / "run", kill_this)
        return lab.train(variant, folder / "run")

    return was_killed(do(work, folder))


def while_writing(lab: Lab, rng: np.random.Generator, folder: Path, variant: str) -> bool:
    number, share = int(rng.integers(1, lab.references[variant].syncs + 1)), float(rng.random())

    def work() -> int:
        at_sync(number, share)
        return lab.train(variant, folder / "run")

    return was_killed(do(work, folder))


def was_killed(ended: Ended) -> bool:
    if ended.status not in (0, -signal.SIGKILL):  # where it continues, there may be fewer files to write
        raise Lost(f"ended with {ended.status}: {ended.error}")
    return ended.status != 0


def one_of_two(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
    """Under torchrun the group starts again from the last checkpoint, by itself."""
    output, undisturbed = folder / "run", lab.two_processes
    settings = [f"data_dir={lab.pictures}", f"output={output}", *VARIANTS["plain"]]
    epochs, worker, wait = int(rng.integers(0, 3)), int(rng.integers(0, 2)), float(rng.uniform(0, 0.2))

    def work() -> None:
        os.environ.update(GPUS="2", RESTARTS="1")
        sys.argv = ["launch.py", str(lab.root / "empty.yaml"), *settings]
        runpy.run_path(str(ROOT / "classification" / "launch.py"), run_name="__main__")

    launcher = start(work, folder)
    deadline = time.monotonic() + SECONDS
    while not (len(workers := workers_of(launcher)) == 2 and epochs_in(output) >= epochs):
        if os.waitid(os.P_PID, launcher, os.WEXITED | os.WNOHANG | os.WNOWAIT) or time.monotonic() > deadline:
            kill_group(launcher)
            raise Lost(f"two processes did not train: {(folder / 'stderr').read_text()}")
        time.sleep(0.01)
    time.sleep(wait)
    os.kill(workers[worker], signal.SIGKILL)
    ended = finish(launcher, folder)
    if ended.status:
        raise Lost(f"the group ended with {ended.status}: {ended.error}")
    compare(undisturbed, output)
    return True


def workers_of(launcher: int) -> list[int]:
    return [child for child, command in children_of(launcher).items() if b"train.py" in command]


def children_of(process: int) -> dict[int, bytes]:
    """The processes that one has started, with their command lines."""
    commands = {}
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            commands[int(child)] = Path(f"/proc/{child}/cmdline").read_bytes()
    return commands


def epochs_in(output: Path) -> int:
    return len(rows(output)) if (output / "metrics.csv").is_file() else 0


# Machines that fail


def full_disk(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
    number = int(rng.integers(1, lab.references["plain"].operations + 1))
    size = int(rng.integers(0, (lab.references["plain"].folder / "last.pt").stat().st_size))

    def work() -> int:
        at_operation(number, folder / "run", lambda: fill_disk(size))
        return lab.train("plain", folder / "run")

    struck = fails(do(work, folder), "cannot write")
    lab.ends_as_undisturbed("plain", folder)
    return struck


def read_only_folder(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
    output = folder / "run"
    # The first two operations make the folder and begin its first file.
    number = int(rng.integers(2, lab.references["plain"].operations + 1))

    def work() -> int:
        at_operation(number, output, lambda: write_protect(output))
        return lab.train("plain", output)

    ended = do(work, folder)
    output.chmod(0o700)
    struck = fails(ended, "cannot write")
    lab.ends_as_undisturbed("plain", folder)
    return struck


def vanished_picture(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
    pictures = folder / "pictures"
    shutil.copytree(lab.pictures, pictures)
    picture = rng.choice(sorted(pictures.rglob("*.png")))
    number = int(rng.integers(1, lab.references["plain"].operations + 1))

    def work() -> int:
        at_operation(number, folder / "run", lambda: picture.rename(folder / "gone"))
        return lab.train("plain", folder / "run", pictures)

    struck = fails(do(work, folder), f"cannot use the picture {picture} (FileNotFoundError")
    if (folder / "gone").exists():
        (folder / "gone").rename(picture)
    lab.ends_as_undisturbed("plain", folder, pictures)
    return struck


def killed_loader(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
    process = start(lambda: lab.train("random", folder / "run"), folder)
    time.sleep(rng.uniform(0, 0.7 * lab.references["random"].seconds))
    own = Path(f"/proc/{process}/cmdline").read_bytes()
    # Others of its children are commands such as git, which it runs at its start.
    loaders = [child for child, command in children_of(process).items() if command == own]
    if loaders:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(int(rng.choice(loaders)), signal.SIGKILL)
    struck = fails(finish(process, folder), "a process of the loader has died", status=1)
    lab.ends_as_undisturbed("random", folder)
    return struck


def fails(ended: Ended, says: str, status: int = 2) -> bool:
    """Unless the fault came too late, the run must end in a sentence with these words."""
    if ended.status and says not in sentence(ended, status):
        raise Lost(f"it says {ended.error}")
    return ended.status != 0


# Files that are corrupted


class Executes:
    """What a pickle may hold: reading it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def flip(path: Path, rng: np.random.Generator, most: int | None = None) -> None:
    """One to eight bits, among the first ``most`` bytes."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 9)):
        content[rng.integers(0, min(len(content), most or len(content)))] ^= 1 << rng.integers(0, 8)
    path.write_bytes(content)


def cut(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes()[: rng.integers(0, path.stat().st_size)])


def blank(path: Path, rng: np.random.Generator) -> None:
    """A block of zeros, as a file system leaves that lost what was to be there."""
    content = bytearray(path.read_bytes())
    first = int(rng.integers(0, len(content)))
    size = min(int(rng.choice([64, 512, 4096])), len(content) - first)
    content[first : first + size] = bytes(size)
    path.write_bytes(content)


def spoil(path: Path, rng: np.random.Generator) -> None:
    [flip, cut, blank][rng.integers(0, 3)](path, rng)


def corrupted_checkpoint(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
    """last.pt: the previous one takes its place, and the run ends as undisturbed."""
    shutil.copytree(lab.stopped, folder / "run")
    spoil(folder / "run" / "last.pt", rng)
    lab.ends_as_undisturbed("plain", folder)
    return True


def corrupted_checkpoints(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
    """Both: unless the damage is where nothing is read, the run does not continue, and nothing is changed."""
    output = folder / "run"
    shutil.copytree(lab.stopped, output)
    for name in ("last.pt", "previous.pt"):
        spoil(output / name, rng)
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    ended = do(lambda: lab.train("plain", output), folder)
    if ended.status == 0:
        compare(lab.references["plain"].folder, output)
        return True
    if "start again with another output=" not in sentence(ended, 2):
        raise Lost(f"it says {ended.error}")
    if {file.name: file.read_bytes() for file in output.iterdir()} != before:
        raise Lost("the folder was changed")
    return True


def executing_checkpoint(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
    shutil.copytree(lab.stopped, folder / "run")
    state = read_checkpoint(folder / "run" / "last.pt")
    place = str(rng.choice(["optimizer", "history", "state_dict"]))
    torch.save({**state, place: Executes(lab.marker)}, folder / "run" / "last.pt")
    lab.ends_as_undisturbed("plain", folder)
    return True


def reads_weights(lab: Lab, folder: Path, path: Path) -> None:
    """The weights are refused in one sentence, or all are there."""

    def work() -> int:
        model = lab.model()
        metaformer.load_weights(model, path)
        return 0 if equal(model.state_dict(), lab.weights) else 3

    ended = do(work, folder)
    if ended.status == 3:
        raise Lost("other weights were loaded")
    if ended.status:
        sentence(ended, 2)


def corrupted_weights(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
    path = folder / "weights.pt"
    shutil.copy(lab.root / "weights.pt", path)
    spoil(path, rng)
    reads_weights(lab, folder, path)
    return True


def executing_weights(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
    content = {"state_dict": {**lab.weights, "stem.bias": Executes(lab.marker)}}
    path = folder / str(rng.choice(["weights.pt", "weights.pth.tar", "pytorch_model.bin", "weights.safetensors"]))
    kind = rng.integers(0, 3)
    if kind == 0:
        path.write_bytes(pickle.dumps(content, protocol=int(rng.integers(0, 6))))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == 1)
    sentence(do(lambda: metaformer.load_weights(lab.model(), path) and 3, folder), 2)
    return True


def lying_safetensors(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
    """The header; the format has no checksum of what follows it."""
    path = folder / "weights.safetensors"
    content = (lab.root / "weights.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    tensor = header[str(rng.choice([name for name in header if name != "__metadata__"]))]
    kind = rng.integers(0, 8)
    if kind == 0:
        tensor["data_offsets"] = [int(offset) for offset in rng.integers(0, 2 * len(data), 2)]
    elif kind == 1:
        tensor["data_offsets"] = [-1, 2**63]
    elif kind == 2:
        tensor["shape"] = [int(side) for side in rng.integers(-1, 2**40, len(tensor["shape"]))]
    elif kind == 3:
        tensor["dtype"] = str(rng.choice(["F64", "F16", "BF16", "I32", "U32", "BOOL", "F8", "object"]))
    elif kind == 4:
        header["one_more"] = dict(tensor)
    text = json.dumps(header).encode()
    lies = [0, 1, len(text) - 1, len(text) + 8, 2**31, 2**63, 2**64 - 1]
    length = lies[rng.integers(0, len(lies))] if kind == 5 else len(text)
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    if kind == 6:
        cut(path, rng)
    elif kind == 7:
        flip(path, rng, most=8 + len(text))
    reads_weights(lab, folder, path)
    return True


def tagged_config(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
    tag = str(
        rng.choice(
            [
                f"!!python/object/apply:os.mkdir [{lab.marker}]",
                f"!!python/object/new:os.mkdir [{lab.marker}]",
                "!!python/object/apply:os.mkdir {args: [" + str(lab.marker) + "]}",
                "!!python/name:os.mkdir",
                "!!python/module:antigravity",
                "!include /etc/passwd",
                "!!python/object:config.Config {}",
            ]
        )
    )
    text = str(rng.choice(["model_args: {key}", "{key}", "epochs: {key}", "? {key}\n: 3", "base: {key}"]))
    (folder / "mine.yaml").write_text(text.replace("{key}", tag))
    if "valid YAML" not in sentence(do(lambda: load_config([str(folder / "mine.yaml")]), folder), 2):
        raise Lost("it says something else")
    return True


def corrupted_config(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
    """There is no checksum in a config: what is not refused must be settings."""
    path = folder / "mine.yaml"
    path.write_bytes((CONFIGS / "imagenet.yaml").read_bytes())
    spoil(path, rng)
    ended = do(lambda: load_config([str(path)]) and None, folder)
    if ended.status:
        sentence(ended, 2)
    return True


def corrupted_record(lab: Lab, rng: np.random.Generator, folder: Path) -> bool:
    """There is no checksum in a record: what is not refused must be a record."""
    path = folder / "run.json"
    shutil.copy(lab.references["plain"].folder / "run.json", path)
    spoil(path, rng)

    def work() -> None:
        for file in records.import_records([path], folder / "results"):
            records.read_record(file)

    ended = do(work, folder)
    if ended.status:
        sentence(ended, 2)
    return True


# The campaign


class Fault(NamedTuple):
    name: str
    trial: Trial
    in_a_round: int = 1
    every: int = 1
    """Rounds from one in which it is tried to the next."""


FAULTS = [
    Fault("SIGKILL at any moment", killed(partial(after_a_time, signal.SIGKILL))),
    Fault("SIGKILL between two operations on files", killed(between_operations)),
    Fault("SIGKILL while a file is written", killed(while_writing)),
    Fault("SIGTERM at any moment", killed(partial(after_a_time, signal.SIGTERM))),
    Fault("SIGKILL of one of two processes under torchrun", one_of_two, every=10),
    Fault("disk full", full_disk),
    Fault("folder read-only", read_only_folder),
    Fault("picture vanishes", vanished_picture),
    Fault("loader process killed", killed_loader),
    Fault("last.pt corrupted", corrupted_checkpoint),
    Fault("last.pt and previous.pt corrupted", corrupted_checkpoints),
    Fault("last.pt executes", executing_checkpoint),
    Fault("weights corrupted", corrupted_weights, 10),
    Fault("weights execute", executing_weights, 10),
    Fault("header of safetensors lies", lying_safetensors, 10),
    Fault("config with tags", tagged_config, 10),
    Fault("config corrupted", corrupted_config, 10),
    Fault("record corrupted", corrupted_record, 10),
]
OF_A_FAULT, OF_A_CAMPAIGN = 10**4, 10**6
"""A trial's seed is the campaign's, the fault's number and the trial's, in these places."""


def attempt(lab: Lab, seed: int) -> tuple[bool, str | None]:
    """Whether the fault of this seed has struck, and how it was lost, if it was."""
    fault = FAULTS[seed % OF_A_CAMPAIGN // OF_A_FAULT]
    folder = Path(tempfile.mkdtemp(dir=lab.root))
    try:
        struck = fault.trial(lab, np.random.default_rng(seed), folder)
        if lab.marker.exists():
            lab.marker.rmdir()
            raise Lost("code in the file was executed")
    except Exception as error:  # whatever else goes wrong, such as a checkpoint that cannot be read in the end
        return True, str(error) if isinstance(error, Lost) else f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder)
    return struck, None


def campaign(lab: Lab, seeds: list[int]) -> list[dict[str, Any]]:
    """A row for each fault: how often it has struck, survived and lost, and the seeds of those lost."""
    counts: dict[str, dict[str, Any]] = {}
    for seed in tqdm(seeds, unit="trial", disable=None):
        name = FAULTS[seed % OF_A_CAMPAIGN // OF_A_FAULT].name
        row = counts.setdefault(name, {"fault": name, "tried": 0, "survived": 0, "lost": 0, "seeds": []})
        struck, lost = attempt(lab, seed)
        row["tried"] += struck
        row["survived"] += struck and lost is None
        row["lost"] += lost is not None
        if lost is not None:
            row["seeds"].append(seed)
            tqdm.write(f"lost: {row['fault']}, --only {seed}: {lost}", file=sys.stderr)
    return list(counts.values())


def seeds_of(rounds: int, seed: int, quick: bool) -> list[int]:
    return [
        seed * OF_A_CAMPAIGN + number * OF_A_FAULT + turn * fault.in_a_round + again
        for turn in range(rounds)
        for number, fault in enumerate(FAULTS)
        if (turn + 1) % fault.every == 0
        for again in range(1 if quick else fault.in_a_round)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Inject faults into training runs and their files, and record losses.")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="each tries every fault (default: 20)")
    parser.add_argument("--quick", action="store_true", help="try every fault once only in a round")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the campaign (default: 0)")
    parser.add_argument("--only", type=int, metavar="SEED", help="repeat the trial of this seed")
    parser.add_argument("--record", type=Path, metavar="FILE", help="where the JSON record goes")
    options = parser.parse_args()
    if not 1 <= options.rounds <= OF_A_FAULT // 10:
        raise InputError(f"--rounds is {options.rounds}: give 1 to {OF_A_FAULT // 10}")
    if options.seed < 0 or (options.only or 0) < 0 or (options.only or 0) % OF_A_CAMPAIGN // OF_A_FAULT >= len(FAULTS):
        raise InputError("--seed and --only take the numbers that a campaign prints")
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every run that continues
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        seeds = seeds_of(options.rounds, options.seed, options.quick) if options.only is None else [options.only]
        table = campaign(Lab(Path(root)), seeds)
    width = max(len(row["fault"]) for row in table)
    print(f"{'fault':{width}}  tried  survived  lost")
    total = {"fault": "all", **{key: sum(row[key] for row in table) for key in ("tried", "survived", "lost")}}
    for row in [*table, total]:
        seeds_lost = " ".join(f"--only {seed}" for seed in row.get("seeds", []))
        print(f"{row['fault']:{width}}  {row['tried']:5}  {row['survived']:8}  {row['lost']:4}  {seeds_lost}".rstrip())
    if options.record:
        record = {"kind": "faults", "model": "poolformer_s12", "seed": options.seed, "rounds": options.rounds}
        write_json(options.record, {**record, "faults": table, "seconds": time.monotonic() - began, **provenance()})
    return 1 if total["lost"] else 0


if __name__ == "__main__":
    run_command(main)
