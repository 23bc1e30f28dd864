"""Hooks for mmengine's Runner that check its input and record results."""

import json
import logging
import math
import re
import shlex
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import PolyLR
from mmengine.optim.scheduler.param_scheduler import INF
from mmengine.registry import DATASETS, HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from mmengine.utils import to_2tuple
from torch import nn
from torch.utils.data import Dataset

from metaformer.errors import InputError
from metaformer.mm.backbone import MetaFormerBackbone, checked_weights
from metaformer.mm.config import evaluators, settings_of_test
from metaformer.mm.data import check_equal, check_masks
from metaformer.provenance import provenance, sha256, write_json
from metaformer.weights.loading import listed


@HOOKS.register_module()
class InputChecks(Hook):
    """Refuses what mmengine would take in part or without a word, before it costs time.

    - A checkpoint of another model, which mmengine would load in part, or of other classes. mmengine reads weights
      under ``state_dict`` or bare. The weights that were checked are put there, so that those of a checkpoint that has
      them under ``model`` are loaded as well. For fine-tuning (``load_from`` without ``resume``), heads and classes may
      differ; the log states the differences. A run resumes only from a checkpoint that also has the state of the
      optimizer, without which mmengine would start a new one in the middle of the schedule.
    - A neck for levels of other channels, heads for another number of classes, another label for ignored pixels, data
      sets with other classes, an evaluator of other data, and a schedule that does not fit the training.
    - A loss that is not finite, before a checkpoint is written.
    """

    def __init__(self) -> None:
        # Here, because a config that replaces our custom_imports may not import this module.
        import metaformer.mm.patch_mmengine  # noqa: F401

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        source = str(runner._load_from or runner.work_dir)
        in_training = isinstance(runner._train_loop, BaseLoop)
        fine_tuning = in_training and not runner._resume
        part = "backbone." if fine_tuning else ""
        checkpoint["state_dict"], left_out = checked_weights(bare(runner.model), checkpoint, source, part)
        lost = [part for part in ("optimizer", "message_hub", "meta") if part not in checkpoint]
        if in_training and not fine_tuning and lost:
            raise InputError(
                f"{source} has no {' and no '.join(lost)}, so that no run can be resumed from it: give the checkpoint "
                "of a run (load_from=None for the last one in the work dir), or leave out --resume"
            )
        loader = runner.train_dataloader if in_training else runner.test_dataloader
        classes = checkpoint.get("meta", {}).get("dataset_meta", {}).get("classes")
        other_classes = different_classes(loader.dataset.metainfo["classes"], classes) if classes else None
        if other_classes and not fine_tuning:
            raise InputError(f"{source} was trained on other classes than the config has: {other_classes}")
        if any(left_out.values()):
            warn(f"{source}: not loaded are {listed(left_out)}")
        elif other_classes:
            warn(f"{source}: the heads start from weights for other classes: {other_classes}")

    def before_train(self, runner: Runner) -> None:
        ours = runner.train_dataloader.dataset.metainfo
        check_heads(runner.model, runner.train_dataloader.dataset)
        check_neck(runner.model)
        check_crops(runner)
        check_schedule(runner)
        for split in ("val", "test"):
            if loader := runner.cfg.get(f"{split}_dataloader"):
                check_evaluator(runner.cfg, split, runner.val_dataloader.dataset if split == "val" else None)
                theirs = DATASETS.build({**loader.dataset, "lazy_init": True}).metainfo
                if difference := different_classes(ours["classes"], theirs["classes"]):
                    raise InputError(
                        f"{split}_dataloader has other classes than train_dataloader: {difference}; give both the same "
                        "metainfo=dict(classes=(...))"
                    )
                if ours.get("reduce_zero_label") != theirs.get("reduce_zero_label"):
                    warn(f"only one of train_dataloader and {split}_dataloader has reduce_zero_label=True")

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any, outputs: dict[str, Any]) -> None:
        loss = outputs["loss"].item()
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at iteration {runner.iter + 1}: lower the learning rate "
                f"(optim_wrapper.optimizer.lr) in a new run, since --resume keeps it; the checkpoints in "
                f"{runner.work_dir} are from before"
            )

    def before_test_epoch(self, runner: Runner) -> None:
        dataset = runner.test_dataloader.dataset
        check_evaluator(runner.cfg, "test", dataset)
        check_heads(runner.model, dataset)


def different_classes(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """A phrase that names the first difference of two lists of classes; empty if they are equal."""
    pairs = enumerate(zip_longest(ours, theirs))
    says = "class {} is {!r} of {} here and {!r} of {} there"
    return next((says.format(i, our, len(ours), their, len(theirs)) for i, (our, their) in pairs if our != their), "")


def check_heads(model: nn.Module, dataset: Dataset) -> None:
    """Raise if a head, except the RPN and a semantic head beside box heads, predicts another number of classes, or if a
    head or the padding of label maps has another label for ignored pixels than the data set of mmseg."""
    ignored = getattr(dataset, "ignore_index", None)
    expected = {"num_classes": len(dataset.metainfo["classes"]), "ignore_index": ignored, "seg_pad_val": ignored}
    for name, part in bare(model).named_modules():
        if re.search(r"^data_preprocessor$|(?<!rpn)(?<!semantic)_head(\.\d+)?$", name):
            for key, ours in expected.items():
                check_equal(f"model.{name}.{key}", getattr(part, key, None), "the data set has", ours)


def check_neck(model: nn.Module) -> None:
    """Raise if the neck takes levels of other channels than those of a :class:`MetaFormerBackbone`."""
    backbone, neck = (getattr(bare(model), part, None) for part in ("backbone", "neck"))
    theirs = getattr(neck, "in_channels", None)
    if isinstance(backbone, MetaFormerBackbone) and isinstance(theirs, list):
        ours = [backbone.feature_info[i]["num_chs"] for i in backbone.out_indices]
        # Sorted, because some necks take the last level first.
        check_equal("model.neck.in_channels", sorted(theirs), "the levels of the backbone have", sorted(ours))


def check_crops(runner: Runner) -> None:
    """Raise if batches are padded to another size than that of the crops, so that a batch may be mostly padding."""
    size = getattr(bare(runner.model).data_preprocessor, "size", None)
    for step in runner.cfg.train_dataloader.dataset.get("pipeline", []):
        if size and step["type"] == "RandomCrop":
            crop = tuple(to_2tuple(step["crop_size"]))
            check_equal("model.data_preprocessor.size", tuple(size), "the pipeline makes crops of", crop)


def check_schedule(runner: Runner) -> None:
    """Warn if a scheduler ends after the training, so that a warm-up may keep the learning rate low throughout, if all
    end before it, or if the learning rate is for another number of pictures.

    Raises:
        InputError: the last of them is a ``PolyLR`` that ends before the training at a learning rate of 0, or
            mmengine would scale the learning rate to the pictures of an iteration where a step takes several.
    """
    schedulers = runner.param_schedulers if isinstance(runner.param_schedulers, list) else []
    loop, ends = runner.train_loop, {}
    remedy = "a resumed run keeps the schedule of its checkpoint" if runner._resume else "set its end"
    for scheduler in schedulers:
        length, unit = (loop.max_epochs, "epochs") if scheduler.by_epoch else (loop.max_iters, "iterations")
        name, to_zero = type(scheduler).__name__, isinstance(scheduler, PolyLR) and scheduler.eta_min == 0
        says = f"{name} of param_scheduler ends after {scheduler.end} {unit}, training after {length}"
        ends.setdefault((scheduler.end / length, to_zero), says)
        if length < scheduler.end < INF:
            warn(f"{says}: {remedy}")
    (last, to_zero), says = max(ends.items(), default=((1, False), ""))
    if last < 1 and to_zero:
        raise InputError(f"{says}, and the learning rate is 0 in between: {remedy}")
    if last < 1:
        warn(f"{says}, and the learning rate is constant in between: {remedy}")
    scaling, steps = runner.cfg.get("auto_scale_lr") or {}, runner.cfg.optim_wrapper.get("accumulative_counts", 1)
    batch = runner.cfg.train_dataloader.batch_size * runner.world_size * steps
    base = scaling.get("base_batch_size", batch)
    if scaling.get("enable") and steps > 1:
        raise InputError(f"auto_scale_lr ignores accumulative_counts={steps} of optim_wrapper: scale lr without it")
    if batch != base and not scaling.get("enable"):
        warn(f"the base has a learning rate for {base} pictures and a step takes {batch}: see auto_scale_lr.enable")


def check_evaluator(config: Config, split: str, data: Dataset | None) -> None:
    """Raise if an evaluator reads another annotation file than the data set or more of its pictures, ignores another
    label, or needs masks and ``data`` has none."""
    dataset = config[f"{split}_dataloader"].dataset
    known = Path(dataset.get("data_root") or "", dataset.ann_file).resolve() if dataset.get("ann_file") else None
    ignored = getattr(data, "ignore_index", None)
    for evaluator in evaluators(config, split):
        path = Path(evaluator["ann_file"]).resolve() if evaluator.get("ann_file") else None
        check_equal(f"{split}_evaluator.ann_file", path, f"{split}_dataloader reads", known)
        label = evaluator.get("ignore_index", 255)
        check_equal(f"{split}_evaluator.ignore_index", label, f"{split}_dataloader ignores", ignored)
        if path and dataset.get("indices") is not None:
            raise InputError(
                f"{split}_evaluator reads all pictures of {path}, and {split}_dataloader only those of its indices: "
                "give both an annotation file of fewer pictures"
            )
        if data and "segm" in evaluator.get("metric", ""):
            check_masks([data.get_data_info(index) for index in range(len(data))], f"{split}_dataloader")


@HOOKS.register_module()
class ResultRecord(Hook):
    """Writes the measurements of a run with their provenance to its log folder.

    ``result.json`` has the metrics of a test, ``training.json`` the speed of a training run since its last start.
    """

    priority = "VERY_LOW"  # after the metrics are printed, so that a full disk does not lose them

    def before_run(self, runner: Runner) -> None:
        self.provenance = provenance()
        self.provenance["command"] = mim_command() or self.provenance["command"]

    def before_train(self, runner: Runner) -> None:
        self.begun = runner.iter

    def after_train(self, runner: Runner) -> None:
        done = runner.iter - self.begun  # a checkpoint also has the times of earlier starts, maybe on other hardware
        if done == 0:
            return
        times, _ = runner.message_hub.get_scalar("train/time").data
        batch = runner.cfg.train_dataloader.batch_size * runner.world_size
        loop, steps = runner.train_loop, runner.cfg.train_dataloader.dataset.get("pipeline", [])
        epochs = None if isinstance(loop, IterBasedTrainLoop) else loop.max_epochs  # that loop calls itself one epoch
        record = {
            "kind": "training",
            "status": "finished",
            "devices": runner.world_size,
            "images_per_s": batch / float(np.median(times[-done:])),
            "seed": runner.seed,
            "settings": {"batch": batch, "epochs": epochs, "iterations": loop.max_iters, "pipeline": steps},
            "starts": [self.provenance],
        }
        self._write(runner, "train", "training.json", record)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        # Training in this process has changed the weights since the checkpoint was loaded.
        source = "" if isinstance(runner._train_loop, BaseLoop) else runner._load_from or ""
        checkpoint = Path(source).expanduser()
        digest = sha256(checkpoint) if checkpoint.is_file() else None
        record = {
            "kind": "segmentation" if "reduce_zero_label" in runner.test_dataloader.dataset.metainfo else "detection",
            "checkpoint": {"file": checkpoint.name, "sha256": digest} if source else None,
            "settings": {"seed": runner.seed, **settings_of_test(runner.cfg)},
            "metrics": {name: float(value) for name, value in metrics.items()},
            **self.provenance,
        }
        self._write(runner, "test", "result.json", record)

    @master_only
    def _write(self, runner: Runner, split: str, name: str, record: dict[str, Any]) -> None:
        config, dataset = runner.cfg[f"{split}_dataloader"].dataset, getattr(runner, f"{split}_dataloader").dataset
        record["model"] = Path(runner.cfg.filename or runner.experiment_name).stem
        record["data"] = {
            "name": type(dataset).__name__,
            "data_dir": str(getattr(dataset, "data_root", "")),
            "annotations": str(config.get("ann_file", "")),
            "images": len(dataset),
            "classes": len(dataset.metainfo["classes"]),
        }
        path = Path(runner.log_dir) / name
        write_json(path, json.loads(json.dumps(record, default=str)))  # a config may name classes by themselves
        print_log(f"result record: {path}", logger="current")


def mim_command(process: Path = Path("/proc/self")) -> str | None:
    """The ``mim`` command as it was typed, from the processes that started this one; None without mim or /proc."""
    try:
        while True:
            words = (process / "cmdline").read_text(errors="replace").split("\0")[:-1]
            if len(words) > 1 and Path(words[1]).name == "mim":
                return shlex.join(["mim", *words[2:]])
            process = process.with_name((process / "stat").read_text().rpartition(")")[2].split()[1])  # its parent
    except OSError:  # the first process has no parent, and a system may hide those of other users
        return None


def warn(message: str) -> None:
    print_log(message, logger="current", level=logging.WARNING)


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrappers for several devices and for test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
