"""Reports of a run: console, progress bar, TensorBoard events, metrics.csv, curve.png and run.json."""

import io
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from metaformer.provenance import write_file, write_json, writing
from metaformer.training.checkpoints import Progress

BETWEEN_DRAWINGS = 60
"""Seconds between two drawings of the curve, which take longer than a short epoch."""


class RunLog:
    """The reports of a run, made by the main process.

    Args:
        folder: folder of the files.
        facts: entries of run.json that do not change during the run.
        epochs: number of epochs planned.
        steps: optimizer steps in an epoch.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], epochs: int, steps: int):
        self.folder, self.facts, self.epochs, self.steps = folder, facts, epochs, steps
        self.drawn = time.monotonic()

    def plan(self, progress: Progress, precision: str) -> None:
        """Print the plan of the run."""
        facts, settings, data, batch = (self.facts, *(self.facts[name] for name in ("settings", "data", "batch")))
        hardware = progress.starts[-1]["hardware"]
        device = hardware["gpus"][0] if hardware["gpus"] else f"CPU ({hardware['torch_threads']} threads each)"
        start = "released weights" if settings["pretrained"] else settings["checkpoint"] or "random weights"
        if progress.epoch or progress.step:
            start = f"continues at epoch {progress.epoch + 1}, step {progress.step}"
        rule = "given" if settings["lr"] is not None else f"{settings['base_lr']:g} for each 1024 images"
        lines = {
            "model": f"{facts['model']}, {facts['parameters'] / 1e6:.2f} M parameters; {start}",
            "data": f"{data['data_dir'] or data['dataset']}: {data['train_images']} training and "
            f"{data['val_images']} validation images, {data['classes']} classes, {settings['img_size']} px",
            "devices": f"{facts['devices']} x {device}",
            "batch": f"{batch['global']} = {facts['devices']} devices x {batch['passes']} passes x "
            f"{batch['device']} images",
            "lr": f"{facts['lr']:g} ({rule}), {settings['opt']}, {settings['sched']}",
            "epochs": f"{self.epochs} of {self.steps} steps",
            "precision": precision + (", channels-last" if settings["channels_last"] else ""),
            "seed": facts["seed"],
            "output": f"{self.folder}/",
        }
        self.say("\n".join(f"{name:10} {value}" for name, value in lines.items()))

    def open(self, progress: Progress) -> None:
        step = progress.epoch * self.steps + progress.step
        self.events = Events(self.folder, first_step=step + 1)
        # disable=None: the bar is shown only in a terminal.
        self.bar = tqdm(total=self.epochs * self.steps, initial=step, unit="step", dynamic_ncols=True, disable=None)

    def close(self) -> None:
        self.bar.close()
        self.events.close()

    def say(self, text: str) -> None:
        tqdm.write(text)

    def stepped(self, epoch: int) -> None:
        self.bar.set_description(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
        self.bar.update()

    def training(self, progress: Progress, loss: float, lr: float, images_per_s: float) -> None:
        """The mean loss since the last entry, the learning rate and the speed."""
        self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", images_per_s=f"{images_per_s:.0f}")
        scalars = {"train/loss": loss, "train/lr": lr, "train/images_per_s": images_per_s}
        self.events.add(scalars, progress.epoch * self.steps + progress.step)

    def epoch(self, row: dict[str, float]) -> None:
        scalars = {"val/loss": row["val_loss"], "val/top1": row["top1"], "val/top5": row["top5"]}
        self.events.add(scalars, row["epoch"] * self.steps)
        self.say(
            f"epoch {row['epoch']:3d}/{self.epochs}  train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}"
            f"  top-1 {row['top1']:.2f} %  top-5 {row['top5']:.2f} %  {row['images_per_s']:.0f} images/s"
        )

    def record(self, status: str, progress: Progress, error: str | None = None) -> None:
        """Write metrics.csv, curve.png and run.json. ``status`` is running, stopped, failed, diverged or finished.

        While a run is running, its curve is drawn once in :data:`BETWEEN_DRAWINGS` seconds.
        """
        history = progress.history
        if history:
            table = [",".join(map(str, line)) for line in (history[0], *(row.values() for row in history))]
            write_file(self.folder / "metrics.csv", "\n".join([*table, ""]).encode())
        if history and (status != "running" or time.monotonic() > self.drawn + BETWEEN_DRAWINGS):
            curve = io.BytesIO()
            plot(history, self.folder.name).savefig(curve, format="png", dpi=120)
            write_file(self.folder / "curve.png", curve.getbuffer())
            self.drawn = time.monotonic()
        record = {
            "kind": "training",
            "status": status,
            "error": error,
            **self.facts,
            "skipped": {split: len(names) for split, names in progress.skipped.items()},
            "epochs": {"done": progress.epoch, "planned": self.epochs},
            "best": best(history) if history else None,
            "curve": history,
            "images_per_s": statistics.median(row["images_per_s"] for row in history) if history else None,
            "wall_s": progress.wall_s,
            "starts": progress.starts,
        }
        write_json(self.folder / "run.json", record)

    def stopped(self, progress: Progress, name: str) -> None:
        """Record that the signal ``name`` stopped the run, and say how it continues."""
        self.record("stopped", progress)
        self.say(
            f"\n{name}: saved epoch {progress.epoch + 1}, step {progress.step} of {self.steps}; continue with\n"
            f"  bash classification/dist_train.sh {self.folder}"
        )

    def result(self, progress: Progress) -> None:
        """Say what the run has reached and how to validate it."""
        row, settings, data = best(progress.history), self.facts["settings"], self.facts["data"]
        skipped = {split: len(names) for split, names in progress.skipped.items()}
        paper = ""
        if settings["expected_top1"] is not None and data["classes"] == 1000:
            paper = f"; the paper reports {settings['expected_top1']} % on ImageNet-1K"
        lines = [
            f"\ntop-1 {row['top1']:.2f} % of {data['val_images'] - skipped['validation']} held-out images "
            f"(epoch {row['epoch']} of {self.epochs}, {progress.wall_s / 60:.1f} minutes){paper}"
        ]
        if any(skipped.values()):
            lines.append(
                f"skipped   {skipped['training']} training and {skipped['validation']} validation pictures that cannot "
                "be read; the lines above name them"
            )
        lines += [
            f"folder    {self.folder}/ (curve.png, metrics.csv, best.pt, last.pt, run.json)",
            f"validate  python classification/validate.py {self.folder}",
        ]
        self.say("\n".join(lines))


class NoLog:
    """The reports of the other processes: none."""

    def __getattr__(self, report: str) -> Callable[..., None]:
        return lambda *_: None


def best(history: list[dict[str, float]]) -> dict[str, float]:
    """The first of the epochs with the highest top-1."""
    return max(history, key=lambda row: row["top1"])


class Events:
    """A file of TensorBoard events, written by the calling thread.

    TensorBoard's own writer uses another thread, which prints a traceback when the disk is full.
    """

    def __init__(self, folder: Path, first_step: int):
        # TensorBoard reads the files of a folder in alphabetical order.
        name = f"events.out.tfevents.{time.time():.9f}.{socket.gethostname()}.{os.getpid()}"
        self.folder = folder
        with writing(folder):
            self.file = (folder / name).open("wb")
        self.writer = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        # Readers discard events of earlier files from this step on, which a killed process may have written.
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, scalars: dict[str, float], step: int) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(step=step, summary=Summary(value=values))

    def _write(self, **content: Any) -> None:
        with writing(self.folder):
            self.writer.write(Event(wall_time=time.time(), **content).SerializeToString())
            self.file.flush()

    def close(self) -> None:
        with writing(self.folder):
            self.file.close()


def plot(history: list[dict[str, float]], title: str) -> Figure:
    figure = Figure(figsize=(9, 3.5))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.15)  # a computed layout would draw everything twice
    figure.suptitle(title)
    panels = {
        "cross-entropy": {"train_loss": "training (augmented)", "val_loss": "validation"},
        "validation accuracy (%)": {"top1": "top-1", "top5": "top-5"},
    }
    for axes, (title, lines) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for (name, label), style in zip(lines.items(), (".-", ".--"), strict=True):
            axes.plot([row["epoch"] for row in history], [row[name] for row in history], style, label=label)
        axes.set(xlabel="epoch", ylabel=title)
        axes.legend()
    return figure
