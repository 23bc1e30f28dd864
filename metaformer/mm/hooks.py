"""Hooks for mmengine's Runner: nothing loaded in part, no training on NaN, a record of each test."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from metaformer.errors import InputError
from metaformer.mm.checkpoint import check_weights, weights_for
from metaformer.provenance import provenance, sha256, write_json
from metaformer.weights import differences, listed


@HOOKS.register_module()
class WholeCheckpoint(Hook):
    """Refuses a checkpoint of another model, of which mmengine would load what fits and pass over the rest.

    To fine-tune (``load_from`` without resuming) the heads may differ, as for other classes; what does is logged.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = bare(runner.model)
        weights = weights_for(model, checkpoint)
        source = str(runner._load_from or runner.work_dir)
        in_training = not isinstance(runner._train_loop, dict | None)
        if not in_training or runner._resume:
            check_weights(model, weights, source)
            return
        check_weights(model, weights, source, part="backbone.")
        problems = differences(model.state_dict(), weights)
        if any(problems.values()):
            print_log(f"{source}: not loaded are {listed(problems)}", logger="current", level=logging.WARNING)


@HOOKS.register_module()
class FiniteLoss(Hook):
    """Stops at the first loss that is not finite, before a checkpoint is made of it."""

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        loss = outputs["loss"].item()
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at iteration {runner.iter + 1}: lower the learning rate "
                f"(optim_wrapper.optimizer.lr); the checkpoints in {runner.work_dir} are from before"
            )


@HOOKS.register_module()
class SameClasses(Hook):
    """Refuses a head for another number of classes than the data set has."""

    def before_train(self, runner: Runner) -> None:
        self._check(runner, runner.train_dataloader.dataset)

    def before_test_epoch(self, runner: Runner) -> None:
        self._check(runner, runner.test_dataloader.dataset)

    def _check(self, runner: Runner, dataset: Any) -> None:
        classes = len(dataset.metainfo["classes"])
        for name, head in bare(runner.model).named_modules():
            known = getattr(head, "num_classes", None)
            if name.endswith("_head") and "rpn" not in name and known not in (None, classes):
                raise InputError(
                    f"model.{name} predicts {known} classes, but the data set has {classes}: "
                    f"use --cfg-options model.{name}.num_classes={classes}"
                )


@HOOKS.register_module()
class ResultRecord(Hook):
    """Writes what a run measured, with its provenance, to its log folder.

    ``result.json`` holds the figures of a test, ``training.json`` the speed of a training run.
    """

    priority = "VERY_LOW"  # after they are printed, so that a full disk does not take them along

    def before_run(self, runner: Runner) -> None:
        self.provenance = provenance()

    def after_train(self, runner: Runner) -> None:
        if not is_main_process():
            return
        loop, config = runner.train_loop, runner.cfg.train_dataloader
        times, _ = runner.message_hub.get_scalar("train/time").data
        images = config.batch_size * runner.world_size
        record = {
            "kind": "training",
            "status": "finished",
            "model": Path(runner.cfg.filename).stem,
            "data": data_of(runner.train_dataloader.dataset, config.dataset),
            "devices": runner.world_size,
            "images_per_s": images / float(np.median(times)),
            "seed": runner.seed,
            "settings": {
                "batch": images,
                "epochs": loop.max_epochs,
                "iterations": loop.max_iters,
                "pipeline": [dict(step) for step in config.dataset.pipeline],
            },
            "starts": [self.provenance],
        }
        self._write(runner, "training.json", record)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if not is_main_process():
            return
        config = runner.cfg
        checkpoint = Path(runner._load_from).expanduser() if runner._load_from else None
        record = {
            "kind": {"mmdet": "detection", "mmseg": "segmentation"}[config.default_scope],
            "model": Path(config.filename).stem,
            "checkpoint": None
            if checkpoint is None
            else {"file": checkpoint.name, "sha256": sha256(checkpoint) if checkpoint.is_file() else None},
            "data": data_of(runner.test_dataloader.dataset, config.test_dataloader.dataset),
            "settings": {
                "pipeline": [dict(step) for step in config.test_dataloader.dataset.pipeline],
                "seed": runner.seed,
                "gpus": runner.world_size if torch.cuda.is_available() else 0,
            },
            "metrics": {name: float(value) for name, value in metrics.items()},
            **self.provenance,
        }
        self._write(runner, "result.json", record)

    def _write(self, runner: Runner, name: str, record: dict[str, Any]) -> None:
        path = Path(runner.log_dir) / name
        write_json(path, record)
        print_log(f"result record: {path}", logger="current")


def data_of(dataset: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": type(dataset).__name__,
        "data_dir": str(dataset.data_root),
        "annotations": str(config.get("ann_file", "")),
        "images": len(dataset),
        "classes": len(dataset.metainfo["classes"]),
    }


def bare(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) or isinstance(model, BaseTTAModel) else model
