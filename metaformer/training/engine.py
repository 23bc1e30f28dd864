"""Train an image classifier. `bash classification/dist_train.sh` starts one such process for each GPU.

python classification/train.py [CONFIG] [key=value ...]
"""

import csv
import io
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from datetime import datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from metaformer.errors import InputError
from metaformer.provenance import provenance, write_file, write_json, writing
from metaformer.training.config import Config, check, load_config, read_yaml, save_config
from metaformer.training.data import (
    Data,
    TrainBatches,
    Unreadable,
    checked,
    load_data,
    naming_killed_loaders,
    seed_everything,
    shut_down,
    train_loader,
    val_loader,
)
from metaformer.training.distributed import Processes, StopSignal, compute_deterministically, join
from metaformer.training.evaluation import evaluate
from metaformer.training.model import autocast, build_model, normaliser, precision_on, released_weights, with_input_of
from metaformer.weights import read_checkpoint

MAY_CHANGE = {"output", "resume", "workers", "bad_pictures", "log_interval", "data_dir", "expected_top1"}
"""Settings that may differ when a run continues: they leave what it computes as it is."""


STATE = {
    "state_dict",
    "optimizer",
    "amp_scaler",
    "epoch",
    "step",
    "history",
    "starts",
    "loss_sum",
    "seconds",
    "wall_s",
}
"""What a run needs to continue."""


class Diverged(InputError):
    """A loss was not finite: of a study a result, of a run of its own a setting to mend."""


class Interrupted(Exception):
    """A signal asked the run to stop."""


def split_batch(global_batch: int, device_batch: int, world: int, even: bool) -> tuple[int, int]:
    """Images in a pass of one device, and passes of each device in an optimizer step: as few as device_batch allows.

    Raises:
        InputError: the processes cannot share the global batch equally, or not in even passes where Mixup needs them.
    """
    share, left = divmod(global_batch, world)
    if left or not share:
        raise InputError(
            f"global_batch={global_batch} cannot be shared equally by {world} processes: "
            f"use a multiple, such as {max(1, share) * world}"
        )
    for passes in range(math.ceil(share / device_batch), share + 1):
        if share % passes == 0 and not (even and share // passes % 2):
            return share // passes, passes
    raise InputError(
        f"each process takes {share} of the {global_batch} images in a step, and Mixup and CutMix need even numbers: "
        f"use global_batch={(share + 1) * world}, or mixup=0 cutmix=0"
    )


def open_output(config: Config, processes: Processes) -> Path:
    """The run's folder, made or found by the main process.

    Raises:
        InputError: it holds a run that was not asked to continue, or with other settings, or whose checkpoints are
            damaged; it cannot be written.
    """
    if not processes.is_main:
        return processes.from_main(None)
    data_name = Path(config.dataset or config.data_dir or "").name
    # The launcher sets the time once for all processes and their restarts.
    stamp = os.environ.get("METAFORMER_START") or f"{datetime.now():%Y%m%d-%H%M%S}"
    output = Path(config.output or f"runs/{config.model}-{data_name}-{stamp}")
    begun = f"# begun {stamp}"  # tells a run that this launcher started from one that it found
    if (output / "config.yaml").is_file():
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and begins_with(output / "config.yaml", begun)
        if not config.resume and not restarted:
            raise InputError(f"{output} already holds a run: add --resume to continue it, or give another output=")
        path = output / "config.yaml"
        before, now = check(read_yaml(path), str(path)).model_dump(mode="json"), config.model_dump(mode="json")
        for key in now:
            if key not in MAY_CHANGE and before[key] != now[key]:
                raise InputError(
                    f"{output} was trained with {key}={before[key]} and cannot continue with {key}={now[key]}: "
                    "give its own settings, or another output="
                )
        with writing(output):
            for partial in output.glob("*.tmp"):  # of a process that was killed
                partial.unlink()
            mend_checkpoint(output)
    else:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
        save_config(config, output / "config.yaml", begun)
    return processes.from_main(output)


def begins_with(file: Path, line: str) -> bool:
    return file.read_text(encoding="utf-8", errors="replace").startswith(line + "\n")


def mend_checkpoint(output: Path) -> None:
    """Put the previous checkpoint in the place of one that is damaged, and say so.

    The damaged one goes, so that the next to be saved does not push out the good one.

    Raises:
        InputError: the previous one cannot take its place.
    """
    last, previous = output / "last.pt", output / "previous.pt"
    problem = flaw(last)
    if problem is None or (problem == "missing" and not previous.exists()):  # nothing was saved yet
        return
    if other := flaw(previous):
        raise InputError(f"{last} is {problem} and {previous} is {other}: start again with another output=")
    print(f"warning: {last} is {problem}: {previous} takes its place", file=sys.stderr)
    previous.replace(last)


def flaw(checkpoint: Path) -> str | None:
    """What keeps a run from continuing from a file, if anything does."""
    if not checkpoint.is_file():
        return "missing"
    try:
        state = read_checkpoint(checkpoint)
    except InputError:
        return "damaged"
    return None if state.keys() >= STATE else "not the checkpoint of a run"


class Trainer:
    """A run. Between two optimizer steps its whole state is (weights, optimizer, epoch, step, history).

    All that is random follows from (seed, epoch, step, pass), never from what ran before: a run that is interrupted
    continues exactly, and a number of devices gives what one device with as many passes gives.
    """

    def __init__(self, config: Config, processes: Processes):
        self.processes, self.started = processes, time.time()
        workers = processes.default_workers() if config.workers is None else config.workers
        self.data: Data = load_data(config, workers)
        seed_everything(config.seed)
        self.model = build_model(config, self.data.num_classes)
        self.released = released_weights(config)
        self.config = config = with_input_of(config, self.model)
        self.device = device = processes.device
        self.model.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
        if config.grad_checkpointing:
            self.model.set_grad_checkpointing()
        if config.compile:
            self.model.compile()
        self.cast = autocast(config, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")

        mixing = config.mixup > 0 or config.cutmix > 0
        self.device_batch, self.passes = split_batch(config.global_batch, config.device_batch, processes.world, mixing)
        images = self.data.summary["train_images"]
        if images < config.global_batch:
            raise InputError(
                f"global_batch={config.global_batch} is larger than the {images} training images: "
                f"use global_batch={images - images % processes.world} or less"
            )
        self.batches = TrainBatches(
            images, self.device_batch, self.passes, processes.rank, processes.world, config.seed
        )
        self.steps = self.batches.steps
        self.train_loader = train_loader(config, self.data.train, self.batches, processes, workers)
        self.val_loader = val_loader(config, self.data.val, processes, workers)
        self.normalise = normaliser(config, device)
        self.erase = RandomErasing(
            config.erase_prob, mode=config.erase_mode, max_count=config.erase_count, device=str(device)
        )
        self.mix = None
        if mixing:
            self.mix = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mixup_prob,
                switch_prob=config.mixup_switch_prob,
                mode=config.mixup_mode,
                label_smoothing=config.smoothing,
                num_classes=self.data.num_classes,
            )

        self.lr = config.lr if config.lr is not None else config.base_lr * config.global_batch / 1024
        self.optimizer = create_optimizer_v2(
            self.model,
            opt=config.opt,
            lr=self.lr,
            weight_decay=config.weight_decay,
            eps=config.opt_eps,
            betas=config.opt_betas,
            layer_decay=config.layer_decay,
        )
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            cooldown_epochs=config.cooldown_epochs,
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            step_on_epochs=not config.sched_on_updates,
            updates_per_epoch=self.steps,
        )
        self.ema = ModelEmaV3(self.model, decay=config.ema_decay) if config.ema_decay else None
        self.parallel = self.model
        if processes.world > 1:
            self.parallel = DistributedDataParallel(
                self.model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )

        self.epoch = self.step = 0
        self.history: list[dict[str, float]] = []
        self.starts = [provenance()]
        self.seconds = 0.0  # of training in this epoch
        self.earlier_seconds = 0.0  # of earlier starts
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # over the passes of this epoch
        self.bad_step = torch.full((), -1, device=device)
        self.unreadable: list[tuple[str, Unreadable]] = []  # split and picture, since the processes last met
        self.skipped: dict[str, list[str]] = {"training": [], "validation": []}  # names of pictures, by split
        self.output = open_output(config, processes)
        if (self.output / "last.pt").is_file():
            self.load(read_checkpoint(self.output / "last.pt"))

    # State

    def state(self) -> dict[str, Any]:
        """Everything that continues the run, as tensors and plain data."""
        return {
            **self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "amp_scaler": self.scaler.state_dict(),
            "step": self.step,
            "history": self.history,
            "starts": self.starts,
            "loss_sum": self.loss_sum.item(),
            "skipped": self.skipped,
            "seconds": self.seconds,
            "wall_s": self.wall_seconds(),
        }

    def weights(self) -> dict[str, Any]:
        """What others need of the run: its weights under timm's names, and what they belong to."""
        weights = {
            "arch": self.config.model,
            "config": self.config.model_dump(mode="json"),
            "num_classes": self.data.num_classes,
            "class_names": self.data.class_names,
            "epoch": self.epoch,
            "state_dict": self.model.state_dict(),
        }
        if self.ema:
            weights["state_dict_ema"] = self.ema.module.state_dict()
        return weights

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["state_dict"])
        if self.ema:
            self.ema.module.load_state_dict(state["state_dict_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["amp_scaler"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        self.starts = [*state["starts"], *self.starts]
        self.seconds, self.earlier_seconds = state["seconds"], state["wall_s"]
        self.skipped = state.get("skipped", self.skipped)  # runs begun before there was the setting have none
        if self.processes.is_main:
            self.loss_sum.fill_(state["loss_sum"])

    def wall_seconds(self) -> float:
        return self.earlier_seconds + time.time() - self.started

    def save(self, name: str, content: dict[str, Any], previous: Path | None = None) -> None:
        if self.processes.is_main:
            write_file(self.output / name, lambda file: torch.save(content, file), previous)

    def save_state(self) -> None:
        """Save what continues the run, after the events up to there, so that they have no gap when it is killed."""
        if not torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all():
            self.diverge(f"a weight was not finite at epoch {self.epoch + 1}, step {self.step}")
        if self.board:
            with writing(self.output):
                self.board.flush()
        self.save("last.pt", self.state(), previous=self.output / "previous.pt")

    # Training

    def run(self) -> int:
        """Train to the end; returns the exit status, 128 + the signal's number if one stopped the run."""
        self.stop = StopSignal()
        main = self.processes.is_main
        first_step = self.epoch * self.steps + self.step
        with writing(self.output):
            self.board = SummaryWriter(str(self.output), purge_step=first_step + 1) if main else None
        self.bar = tqdm(
            total=self.epochs * self.steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=None if main else True,  # None: only where a person watches
        )
        self.write_record("running")
        self.write_metrics()
        try:
            with naming_killed_loaders():
                if not self.train():
                    return 128 + self.stop.received
        except Exception as error:
            with suppress(InputError):  # where nothing can be written, the first error still says why
                self.write_record("diverged" if isinstance(error, Diverged) else "failed", str(error))
            raise
        finally:
            shut_down(self.train_loader, self.val_loader)
            self.bar.close()
            if self.board:
                with writing(self.output):
                    self.board.close()
        self.write_record("finished")
        self.say_result()
        return 0

    def end(self) -> None:
        """Of a run with nothing left to train: what was left to write, if it was killed after its last checkpoint."""
        self.say(f"{self.output} is finished")
        if self.processes.is_main and not is_finished(self.output / "run.json"):
            self.write_metrics()
            self.write_record("finished")
        self.say_result()

    def train(self) -> bool:
        """To the end, or to where a signal asks to stop; tells whether it is the end."""
        try:
            while self.epoch < self.epochs:
                self.train_epoch()
                self.end_epoch(evaluate(**self.evaluation()))
        except Interrupted:
            self.save_state()
            self.write_record("stopped")
            name = signal.Signals(self.stop.received).name
            self.say(
                f"\n{name}: saved epoch {self.epoch + 1}, step {self.step} of {self.steps}; continue with\n"
                f"  bash classification/dist_train.sh {self.output}"
            )
            return False
        return True

    def train_epoch(self) -> None:
        """The rest of this epoch, from the step where it stands."""
        self.parallel.train()
        if self.mix:
            self.mix.mixup_enabled = not (0 < self.config.mixup_off_epoch <= self.epoch)
        self.bar.set_description(f"epoch {self.epoch + 1}/{self.epochs}")
        self.scheduler.step(self.epoch)
        batches = self.epoch_batches()
        logged_loss, logged_step = self.loss_sum.item(), self.step
        start = time.perf_counter() - self.seconds
        while self.step < self.steps:
            self.scheduler.step_update(self.epoch * self.steps + self.step)
            self.optimizer_step(batches)
            self.step += 1
            self.seconds = time.perf_counter() - start
            self.bar.update()
            if self.step % self.config.log_interval == 0 or self.step == self.steps:
                self.gather_loss()
                passes = (self.step - logged_step) * self.passes * self.processes.world
                self.log_step((self.loss_sum.item() - logged_loss) / passes)
                logged_loss, logged_step = self.loss_sum.item(), self.step
            received = self.processes.max(self.stop.received)
            if received:
                self.stop.received = received
                self.gather_loss()
                raise Interrupted

    def epoch_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.batches.epoch, self.batches.first_step = self.epoch, self.step
        dataset = self.data.train
        if not isinstance(dataset, IterableDataset):
            return checked(iter(self.train_loader), self.data.num_classes, self.skip_in("training"))
        dataset.set_epoch(self.epoch)
        batches = checked(iter(self.train_loader), self.data.num_classes, self.skip_in("training"))
        return islice(batches, self.step * self.passes, None)  # a stream can only be read up to where it stood

    def optimizer_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        for turn in range(self.passes):
            images, labels = next(batches, (None, None))
            if images is None:
                raise InputError(
                    f"the data ended at step {self.step + 1} of {self.steps}: its num_samples is too large"
                )
            if self.mix and len(labels) % 2:  # a picture was skipped, and Mixup pairs them
                images, labels = images[:-1], labels[:-1]
            if not len(labels):
                raise InputError(
                    f"of the pictures of a pass in epoch {self.epoch + 1}, step {self.step + 1}, too few can be read: "
                    f"the last was {self.unreadable[-1][1].name}; mend them or take them out"
                )
            number = turn * self.processes.world + self.processes.rank
            seed_everything(self.config.seed, self.epoch, self.step, number)
            images, labels = self.normalise(images), labels.to(self.device, non_blocking=True)
            images = self.erase(images)
            smoothing = self.config.smoothing
            if self.mix:
                images, labels = self.mix(images, labels)  # labels become (B, num_classes), smoothed
                smoothing = 0.0
            last = turn == self.passes - 1
            with nullcontext() if last or self.parallel is self.model else self.parallel.no_sync():
                with self.cast:
                    loss = F.cross_entropy(self.parallel(images), labels, label_smoothing=smoothing)
                self.scaler.scale(loss / self.passes).backward()
            loss = loss.detach()
            self.loss_sum += loss
            # Kept on the device: to look at every loss would make the GPU wait.
            self.bad_step = torch.where((self.bad_step < 0) & ~loss.isfinite(), self.step, self.bad_step)
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)

    def skip_in(self, split: str) -> Callable[[list[Unreadable]], None] | None:
        """What notes the pictures that are skipped, if they are to be skipped.

        The mean of a pass is then that of the pictures left, and every pass still counts the same.
        """
        if self.config.bad_pictures == "stop":
            return None
        return lambda unreadable: self.unreadable.extend((split, picture) for picture in unreadable)

    def gather_skipped(self) -> None:
        """Name the pictures that any process has skipped, each once in a run."""
        if self.config.bad_pictures == "stop":
            return
        for split, (name, reason) in chain.from_iterable(self.processes.gather(self.unreadable)):
            if name not in self.skipped[split]:
                self.skipped[split].append(name)
                self.say(f"skipped the {split} picture {name} ({reason})")
        self.unreadable = []

    def gather_loss(self) -> None:
        """The sum of all processes into the main one's; stops the run if a loss was not finite."""
        total = self.processes.sum(self.loss_sum)
        self.loss_sum.fill_(total.item() if self.processes.is_main else 0)
        self.gather_skipped()
        bad_step = self.processes.max(int(self.bad_step))
        if bad_step >= 0:
            self.diverge(f"the loss was not finite at epoch {self.epoch + 1}, step {bad_step + 1}")

    def diverge(self, problem: str) -> None:
        kept = self.output / "last.pt"
        kept_text = f"the last good checkpoint is {kept}" if kept.is_file() else "there was no checkpoint yet"
        raise Diverged(f"{problem}; {kept_text}; try a lower lr=, clip_grad=1 or precision=float32")

    def evaluation(self) -> dict[str, Any]:
        return {
            "model": self.ema.module if self.ema else self.model,
            "loader": self.val_loader,
            "normalise": self.normalise,
            "cast": self.cast,
            "processes": self.processes,
            "progress": self.interruptible,
            "skip": self.skip_in("validation"),
        }

    def interruptible(self, batches: Iterable) -> Iterator:
        for batch in batches:
            if self.stop.received:
                raise Interrupted
            yield batch

    def end_epoch(self, metrics: dict[str, float]) -> None:
        self.gather_skipped()
        if not math.isfinite(metrics["loss"]):
            self.diverge(f"the validation loss was not finite after epoch {self.epoch + 1}")
        row = {
            "epoch": self.epoch + 1,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train_loss": self.loss_sum.item() / (self.steps * self.passes * self.processes.world),
            "val_loss": metrics["loss"],
            "top1": metrics["top1"],
            "top5": metrics["top5"],
            "images_per_s": self.steps * self.config.global_batch / self.seconds,
            "wall_s": self.wall_seconds(),
        }
        is_best = row["top1"] > max((earlier["top1"] for earlier in self.history), default=-1)
        self.history.append(row)
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.loss_sum.zero_()
        values = {f"val/{name.removeprefix('val_')}": row[name] for name in ("val_loss", "top1", "top5")}
        self.add_scalars(values, self.epoch * self.steps)
        if is_best:
            self.save("best.pt", self.weights())
        self.save_state()
        self.write_metrics()
        self.write_record("running")
        self.say(
            f"epoch {row['epoch']:3d}/{self.epochs}  train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}"
            f"  top-1 {row['top1']:.2f} %  top-5 {row['top5']:.2f} %  {row['images_per_s']:.0f} images/s"
        )

    # Reports

    def say(self, text: str) -> None:
        if self.processes.is_main:
            tqdm.write(text)

    def log_step(self, loss: float) -> None:
        if not self.board:
            return
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        images_per_s = self.step * self.config.global_batch / self.seconds
        self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", images_per_s=f"{images_per_s:.0f}")
        step = self.epoch * self.steps + self.step
        self.add_scalars({"train/loss": loss, "train/lr": lr, "train/images_per_s": images_per_s}, step)

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        if not self.board:
            return
        with writing(self.output):
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def write_metrics(self) -> None:
        """The epochs so far as metrics.csv and curve.png."""
        if not self.processes.is_main or not self.history:
            return
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=self.history[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_file(self.output / "metrics.csv", lambda file: file.write(table.getvalue().encode()))
        figure = plot(self.history, self.output.name)
        write_file(self.output / "curve.png", lambda file: figure.savefig(file, format="png", dpi=120))

    def write_record(self, status: str, error: str | None = None) -> None:
        if not self.processes.is_main:
            return
        best = max(self.history, key=lambda row: row["top1"], default=None)
        speeds = [row["images_per_s"] for row in self.history]
        record = {
            "kind": "training",
            "status": status,
            "error": error,
            "model": self.config.model,
            "parameters": count(self.model),
            "data": self.data.summary,
            "skipped": {split: len(names) for split, names in self.skipped.items()},
            "batch": {"global": self.config.global_batch, "device": self.device_batch, "passes": self.passes},
            "devices": self.processes.world,
            "lr": self.lr,
            "seed": self.config.seed,
            "pretrained": self.released,
            "epochs": {"done": self.epoch, "planned": self.epochs},
            "best": best,
            "curve": self.history,
            "images_per_s": statistics.median(speeds) if speeds else None,
            "wall_s": self.wall_seconds(),
            "settings": self.config.model_dump(mode="json"),
            "starts": self.starts,
        }
        write_json(self.output / "run.json", record)

    def say_plan(self) -> None:
        config, data, world = self.config, self.data.summary, self.processes.world
        hardware = self.starts[-1]["hardware"]
        device = f"{hardware['gpus'][0]}" if hardware["gpus"] else f"CPU ({torch.get_num_threads()} threads each)"
        start = "released weights" if config.pretrained else config.checkpoint or "random weights"
        if self.epoch or self.step:
            start = f"continues at epoch {self.epoch + 1}, step {self.step}"
        rule = "given" if config.lr is not None else f"{config.base_lr:g} for each 1024 images"
        lines = {
            "model": f"{config.model}, {count(self.model) / 1e6:.2f} M parameters; {start}",
            "data": f"{data['data_dir'] or data['dataset']}: {data['train_images']} training and "
            f"{data['val_images']} validation images, {data['classes']} classes, {config.img_size} px",
            "devices": f"{world} x {device}",
            "batch": f"{config.global_batch} = {world} devices x {self.passes} passes x {self.device_batch} images",
            "lr": f"{self.lr:g} ({rule}), {config.opt}, {config.sched}",
            "epochs": f"{self.epochs} of {self.steps} steps",
            "precision": precision_on(config, self.device) + (", channels-last" if config.channels_last else ""),
            "seed": config.seed,
            "output": f"{self.output}/",
        }
        self.say("\n".join(f"{name:10} {value}" for name, value in lines.items()))

    def say_result(self) -> None:
        best = max(self.history, key=lambda row: row["top1"])
        expected = self.config.expected_top1 if self.data.num_classes == 1000 else None
        skipped = {split: len(names) for split, names in self.skipped.items()}
        images = self.data.summary["val_images"] - skipped["validation"]
        lines = [
            f"\ntop-1 {best['top1']:.2f} % of {images} held-out images "
            f"(epoch {best['epoch']} of {self.epochs}, {self.wall_seconds() / 60:.1f} minutes)"
            + (f"; the paper reports {expected} % on ImageNet-1K" if expected is not None else ""),
            f"folder    {self.output}/ (curve.png, metrics.csv, best.pt, last.pt, run.json)",
            f"validate  python classification/validate.py {self.output}",
        ]
        if any(skipped.values()):
            lines.insert(
                1,
                f"skipped   {skipped['training']} training and {skipped['validation']} validation pictures that cannot "
                "be read; the lines above name them",
            )
        if self.config.dataset == "mnist5k":
            lines.append(
                "next      bash classification/dist_train.sh configs/classification/poolformer_s12.yaml "
                "data_dir=/path/to/imagenet"
            )
        self.say("\n".join(lines))


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def is_finished(record: Path) -> bool:
    """Whether a run's record says so."""
    try:
        return json.loads(record.read_text(encoding="utf-8")).get("status") == "finished"
    except (OSError, ValueError):  # none, or damaged
        return False


def plot(history: list[dict[str, float]], title: str) -> Figure:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    figure.suptitle(title)
    losses, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    losses.plot(epochs, [row["train_loss"] for row in history], marker=".", label="training (augmented)")
    losses.plot(epochs, [row["val_loss"] for row in history], ".--", label="validation")
    losses.set(xlabel="epoch", ylabel="cross-entropy")
    losses.legend()
    accuracy.plot(epochs, [row["top1"] for row in history], marker=".", label="top-1")
    accuracy.plot(epochs, [row["top5"] for row in history], ".--", label="top-5")
    accuracy.set(xlabel="epoch", ylabel="validation accuracy (%)")
    accuracy.legend()
    return figure


def print_unless_kept(raised: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread keeps what it raises for the board's next call, where the run says it in its own words."""
    if getattr(raised.thread, "exception", None) is not raised.exc_value:
        threading.__excepthook__(raised)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nSettings: {', '.join(Config.model_fields)}")
        return 0
    threading.excepthook = print_unless_kept
    config = load_config(arguments)
    processes = join()
    if config.deterministic:
        compute_deterministically()
    trainer = Trainer(config, processes)
    trainer.say_plan()
    if trainer.epoch >= trainer.epochs:
        trainer.end()
        return 0
    status = trainer.run()
    processes.leave()
    return status
