"""The training loop."""

import math
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from itertools import chain, islice, repeat
from typing import Any

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from metaformer.errors import InputError
from metaformer.provenance import provenance, write_torch
from metaformer.training import checkpoints, recipe
from metaformer.training.batches import TrainBatches, checked, seed_everything
from metaformer.training.config import Config
from metaformer.training.data import HASHES, load_data
from metaformer.training.distributed import Processes, StopSignal, join
from metaformer.training.evaluation import evaluate
from metaformer.training.loader import loader_processes, train_loader, val_loader
from metaformer.training.model import (
    autocast,
    build_model,
    enough_memory,
    normaliser,
    precision_on,
    released_weights,
    with_input_of,
)
from metaformer.training.runlog import NoLog, RunLog


class Diverged(InputError):
    """The loss became non-finite. A study records this as a result; a standalone run treats it as a user error."""


class Interrupted(Exception):
    """A signal asked the run to stop, and the run has been saved."""


def train(config: Config) -> int:
    """Train, or continue, a run; returns the exit status, 128 + the signal's number if one stopped the run."""
    processes = join()
    if config.deterministic:  # on a GPU, PyTorch raises an error if an operator has no deterministic form
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # must be set before the first product
        torch.backends.cudnn.benchmark = False  # a benchmark may choose another algorithm in each run
        torch.use_deterministic_algorithms(True)
    status = Trainer(config, processes).run()
    processes.leave()
    return status


class Trainer:
    """The training loop of one process.

    Between two optimizer steps, the weights, the optimizer and ``progress`` are its whole state. All random numbers
    follow from (seed, epoch, step, pass) and not from earlier steps. So an interrupted run continues exactly, and
    several devices give the results of one device with as many passes.
    """

    def __init__(self, config: Config, processes: Processes):
        self.processes, self.device = processes, processes.device
        workers = processes.default_workers() if config.workers is None else config.workers
        self.data = load_data(config, workers)
        hashes = {name: self.data.summary[name] for name in sorted(HASHES)}
        self.progress = checkpoints.Progress(starts=[{**provenance(), **hashes}])
        seed_everything(config.seed)
        self.output = processes.from_main(lambda: checkpoints.folder_of(config))
        # The main process alone has the folder, and then the weights.
        self.continues = processes.from_main(lambda: config.resume and checkpoints.has_state(self.output))
        start = config.model_copy(update={"pretrained": False, "checkpoint": None}) if self.continues else config
        self.model = model = build_model(start, self.data.num_classes, self.data.class_names)
        self.config = config = with_input_of(config, model)
        settings = config.model_dump(mode="json", exclude=checkpoints.MAY_CHANGE - {"bad_pictures", "log_interval"})
        # Those two determine when the processes communicate.
        processes.check_same({**settings, **self.data_facts()})
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model.to(self.device, memory_format=layout)
        if config.grad_checkpointing:
            try:
                model.set_grad_checkpointing()
            except (AssertionError, AttributeError) as error:  # timm's models without it
                raise InputError(f"{config.model} does not take grad_checkpointing=true: leave it out") from error
        if config.compile:
            model.compile(dynamic=False)  # else the kernels would depend on the sizes seen before
        self.cast = autocast(config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")

        self.mix = recipe.build_mixing(config, self.data.num_classes)
        self.device_batch, self.passes = recipe.split_batch(
            config.global_batch, config.device_batch, processes.world, even=self.mix is not None
        )
        images = self.data.summary["train_images"]
        if images < config.global_batch:
            raise InputError(
                f"global_batch={config.global_batch} is larger than the {images} training images: "
                f"use global_batch={images - images % (2 * processes.world)} or less"  # even passes, for Mixup
            )
        self.batches = TrainBatches(
            images, self.device_batch, self.passes, processes.rank, processes.world, config.seed
        )
        self.steps = self.batches.steps
        self.train_loader = train_loader(config, self.data.train, self.batches, processes, workers)
        self.val_loader = val_loader(config, self.data.val, processes, workers)
        self.normalise = normaliser(config, self.device)
        self.erase = recipe.build_erasing(config, self.device)
        self.lr = config.lr if config.lr is not None else config.base_lr * config.global_batch / 1024
        self.optimizer = recipe.build_optimizer(config, model, self.lr)
        self.scheduler, self.epochs = recipe.build_scheduler(config, self.optimizer, self.steps)
        self.ema = ModelEmaV3(model, decay=config.ema_decay) if config.ema_decay else None
        self.parallel = processes.parallel(model)

        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)  # over the steps of this epoch
        # Pictures skipped since the processes last communicated. None: nothing is skipped.
        self.skipped = {split: [] if config.bad_pictures == "skip" else None for split in self.progress.skipped}
        self.stop = StopSignal()
        self.log = RunLog(self.output, self.facts(), self.epochs, self.steps) if processes.is_main else NoLog()

    def data_facts(self) -> dict[str, Any]:
        """Properties of the data that all processes must share, and that are compared when a run continues."""
        summary = {key: value for key, value in self.data.summary.items() if key not in ("dataset", "data_dir")}
        return {**summary, "class_names": self.data.class_names}

    # State

    def state(self) -> dict[str, Any]:
        """Everything that continues the run, as tensors and plain data."""
        return {
            **self.weights(),
            **self.data_facts(),
            **self.progress.state(),
            "optimizer": self.optimizer.state_dict(),
            "amp_scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum.item(),
        }

    def weights(self) -> dict[str, Any]:
        """The contents of best.pt: the weights, under the keys of timm's checkpoints, and the settings of the model."""
        weights = {
            "arch": self.config.model,
            "config": self.config.model_dump(mode="json"),
            "num_classes": self.data.num_classes,
            "class_names": self.data.class_names,
            "epoch": self.progress.epoch,
            "state_dict": self.model.state_dict(),
        }
        if self.ema:
            weights["state_dict_ema"] = self.ema.module.state_dict()
        return weights

    def load(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        self.model.load_state_dict(state["state_dict"])
        if self.ema:
            self.ema.module.load_state_dict(state["state_dict_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["amp_scaler"])
        self.progress.load(state)
        if self.processes.is_main:
            self.loss_sum.fill_(state["loss_sum"])

    def save(self) -> None:
        if not torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all():
            self.diverge(f"a weight was not finite at epoch {self.progress.epoch + 1}, step {self.progress.step}")
        if self.processes.is_main:
            write_torch(self.output / "last.pt", self.state(), previous=self.output / "previous.pt")

    # Loop

    def run(self) -> int:
        """Train to the end; returns the exit status, 128 + the signal's number if one stopped the run."""
        with checkpoints.locked(self.output) if self.processes.is_main else nullcontext():
            facts = self.data_facts()
            # The state has no name here, so that its memory is freed before training.
            self.load(self.processes.from_main(lambda: checkpoints.open_folder(self.config, self.output, facts)))
            return self.finish()

    def finish(self) -> int:
        """Train from the loaded state to the end; returns the exit status."""
        self.log.plan(self.progress, precision_on(self.config, self.device))
        if self.progress.epoch == self.epochs and checkpoints.read_run(self.output).get("status") == "finished":
            self.log.say(f"{self.output} is finished")
            self.log.result(self.progress)
            return 0
        with self.stop:
            self.log.open(self.progress)
            self.log.record("running", self.progress)
            try:
                with loader_processes(self.train_loader, self.val_loader):
                    while self.progress.epoch < self.epochs:
                        self.train_epoch()
                        self.end_epoch(self.evaluate())
            except Interrupted:
                self.log.stopped(self.progress, signal.Signals(self.stop.received).name)
                return 128 + self.stop.received
            except Exception as error:
                with suppress(InputError):  # if nothing can be written, the first error still says why
                    self.log.record("diverged" if isinstance(error, Diverged) else "failed", self.progress, str(error))
                raise
            finally:
                self.log.close()
        self.log.record("finished", self.progress)
        self.log.result(self.progress)
        return 0

    def train_epoch(self) -> None:
        """Train the rest of this epoch."""
        progress = self.progress
        self.parallel.train()
        if self.mix:
            self.mix.mixup_enabled = not (0 < self.config.mixup_off_epoch <= progress.epoch)
        self.scheduler.step(progress.epoch)
        batches = self.epoch_batches()
        logged_loss, logged_step = self.loss_sum.item(), progress.step
        start = time.perf_counter() - progress.seconds
        while progress.step < self.steps:
            self.scheduler.step_update(progress.epoch * self.steps + progress.step)
            with enough_memory(self.device_batch):
                self.optimizer_step(batches)
            progress.step += 1
            progress.seconds = time.perf_counter() - start
            self.log.stepped(progress.epoch)
            if progress.step % self.config.log_interval == 0 or progress.step == self.steps:
                self.gather_loss()
                loss = (self.loss_sum.item() - logged_loss) / (progress.step - logged_step)
                images_per_s = progress.step * self.config.global_batch / progress.seconds
                self.log.training(progress, loss, self.current_lr(), images_per_s)
                logged_loss, logged_step = self.loss_sum.item(), progress.step
            self.agree_on_stop()

    def epoch_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.batches.epoch, self.batches.first_step = self.progress.epoch, self.progress.step
        is_stream = isinstance(self.data.train, IterableDataset)
        if is_stream:
            self.data.train.set_epoch(self.progress.epoch)
        batches = checked(iter(self.train_loader), self.data.num_classes, self.skipped["training"])
        # A stream cannot start in the middle: the batches used so far are read again.
        return islice(batches, self.progress.step * self.passes, None) if is_stream else batches

    def optimizer_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        epoch, step = self.progress.epoch, self.progress.step
        for turn in range(self.passes):
            images, labels = next(batches, (None, None))
            if images is None:
                readers = self.processes.world * max(1, self.train_loader.num_workers)
                raise InputError(
                    f"the stream ended at step {step + 1} of {self.steps}: it has fewer pictures than stated, or fewer "
                    f"shards than the {readers} loader processes: correct the number, or use fewer workers="
                )
            if self.mix and len(labels) % 2:  # a picture was skipped, and Mixup needs pairs
                images, labels = images[:-1], labels[:-1]
            if not len(labels):
                raise InputError(
                    f"of the pictures of a pass in epoch {epoch + 1}, step {step + 1}, too few can be read: "
                    f"the last was {self.skipped['training'][-1].name}; repair or remove them"
                )
            seed_everything(self.config.seed, epoch, step, turn * self.processes.world + self.processes.rank)
            images, labels = (part.to(self.device, non_blocking=True) for part in (images, labels))
            smoothing = self.config.smoothing
            if self.mix:
                images, labels = self.mix(images, labels)  # labels become (B, num_classes), smoothed
                smoothing = 0.0
            images = self.erase(self.normalise(images))
            last = turn == self.passes - 1
            with nullcontext() if last or self.parallel is self.model else self.parallel.no_sync():
                try:
                    with self.cast:
                        loss = F.cross_entropy(self.parallel(images), labels, label_smoothing=smoothing)
                except ValueError as error:  # batch norm of maps of one pixel, with one image
                    if len(images) > 1:
                        raise
                    raise InputError(f"{error}: use a larger device_batch= or img_size=") from error
                self.scaler.scale(loss / self.passes).backward()
            # The mean of the passes, on the device: looking at every loss would make the GPU wait.
            self.loss_sum += loss.detach() / (self.passes * self.processes.world)
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)

    def evaluate(self) -> dict[str, float]:
        model = self.ema.module if self.ema else self.model
        if self.processes.world > 1:  # each process has seen other batches; the main process's statistics are saved
            distribute_bn(model, self.processes.world)
        batches, number = self.interruptible(self.val_loader), self.data.summary["val_images"]
        return evaluate(model, batches, number, self.config, self.processes, self.skipped["validation"])

    def end_epoch(self, metrics: dict[str, float]) -> None:
        progress = self.progress
        self.gather_skipped()
        if not math.isfinite(metrics["loss"]):
            self.diverge(f"the validation loss was not finite after epoch {progress.epoch + 1}")
        row = {
            "epoch": progress.epoch + 1,
            "lr": self.current_lr(),
            "train_loss": self.loss_sum.item() / self.steps,
            "val_loss": metrics["loss"],
            "top1": metrics["top1"],
            "top5": metrics["top5"],
            "images_per_s": self.steps * self.config.global_batch / progress.seconds,
            "wall_s": progress.wall_s,
        }
        is_best = all(row["top1"] > earlier["top1"] for earlier in progress.history)
        progress.history.append(row)
        progress.epoch, progress.step, progress.seconds = progress.epoch + 1, 0, 0.0
        self.loss_sum.zero_()
        self.log.epoch(row)
        if is_best and self.processes.is_main:
            write_torch(self.output / "best.pt", self.weights())
        self.save()
        self.log.record("running", progress)

    # Decisions of all processes

    def agree_on_stop(self, more: bool = False) -> bool:
        """Save and stop in all processes if any has received a signal; tells whether ``more`` is true in any."""
        signals, more = zip(*self.processes.gather((self.stop.received, more)), strict=True)
        self.stop.received = max(signals)
        if self.stop.received:
            self.gather_loss()
            self.save()
            raise Interrupted
        return any(more)

    def interruptible(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, in step with the other processes, of which some may have one more."""
        for batch in chain(batches, repeat(None)):
            if not self.agree_on_stop(more=batch is not None):
                return
            if batch is not None:
                yield batch

    def gather_loss(self) -> None:
        """Sum the losses of all processes in the main one; stop the run if one was not finite."""
        total = self.processes.sum(self.loss_sum).item()
        self.loss_sum.fill_(total if self.processes.is_main else 0)
        self.gather_skipped()
        if not math.isfinite(total):
            self.diverge(f"the loss was not finite by epoch {self.progress.epoch + 1}, step {self.progress.step}")

    def gather_skipped(self) -> None:
        """Name the pictures that any process has skipped, each once in a run.

        The loss of a pass is the mean over the pictures left in it, and every pass still counts the same.
        """
        if self.config.bad_pictures == "stop":
            return
        for split, names in self.progress.skipped.items():
            for name, reason in chain.from_iterable(self.processes.gather(self.skipped[split])):
                if name not in names:
                    names.append(name)
                    self.log.say(f"skipped the {split} picture {name} ({reason})")
            self.skipped[split].clear()

    def diverge(self, problem: str) -> None:
        last = self.output / "last.pt"
        kept = f"the last good checkpoint is {last}" if last.is_file() else "there was no checkpoint yet"
        raise Diverged(f"{problem}; {kept}; try a lower lr=, clip_grad=1 or precision=float32")

    # Reports

    def current_lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def facts(self) -> dict[str, Any]:
        """The entries of run.json that stay the same throughout the run."""
        # A run that continues needs the file of the released weights no longer.
        earlier = checkpoints.read_run(self.output) if self.continues else {}
        return {
            "model": self.config.model,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "data": self.data.summary,
            "batch": {"global": self.config.global_batch, "device": self.device_batch, "passes": self.passes},
            "devices": self.processes.world,
            "lr": self.lr,
            "seed": self.config.seed,
            "pretrained": earlier.get("pretrained") or released_weights(self.config),
            "settings": self.config.model_dump(mode="json"),
        }
