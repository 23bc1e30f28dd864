"""Top-1, top-5 and cross-entropy of a model on a validation split, and a record of them with its provenance."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaformer.errors import InputError
from metaformer.provenance import provenance, sha256
from metaformer.training.batches import Batch, Unreadable, checked
from metaformer.training.checkpoints import read_run
from metaformer.training.config import Config
from metaformer.training.data import load_data
from metaformer.training.distributed import Processes, join
from metaformer.training.loader import loader_processes, val_loader
from metaformer.training.model import autocast, enough_memory, match_classes, normaliser, precision_on
from metaformer.weights import Opened


def outputs(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], config: Config, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, classes) in float32 and labels (B,) on ``device``, for batches that are not empty."""
    model.eval()
    normalise, cast = normaliser(config, device), autocast(config, device)
    for images, labels in batches:
        if len(labels):  # otherwise all pictures of the batch were skipped
            with enough_memory(len(labels)), cast:
                logits = model(normalise(images))
            yield logits.float(), labels.to(device, non_blocking=True)


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], number: int, config: Config, processes: Processes, skipped: list | None
) -> dict[str, float]:
    """top1 and top5 in percent, mean cross-entropy ``loss``, ``images`` and ``images_per_s``, over all processes.

    Args:
        batches: those of this process.
        number: pictures of the split.
        skipped: as in :func:`batches.checked`; the pictures left out count nowhere.

    Raises:
        InputError: a picture or label that :func:`batches.checked` refuses, no picture that can be read, or a stream
            that gave more or fewer pictures than the split has.
    """
    start = time.perf_counter()
    totals = torch.zeros(5, dtype=torch.float64, device=processes.device)  # loss, top-1, top-5, images, left out
    readable = checked(batches, model.num_classes, skipped)
    for logits, labels in outputs(model, readable, config, processes.device):
        top5 = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals[:4] += torch.stack([loss, top5[:, 0].sum(), top5.sum(), torch.tensor(len(labels), device=loss.device)])
    totals[4] = len(skipped or ())
    loss, top1, top5, images, left_out = processes.sum(totals).tolist()
    if images + left_out != number:
        raise InputError(
            f"the validation split has {number} pictures, and its stream gave {images + left_out:.0f}: correct the "
            "number where it is stated, repair unreadable pictures, use one process, or give the data as "
            "folders or tars"
        )
    if not images:
        raise InputError("no picture of the validation split can be read")
    seconds = time.perf_counter() - start
    means = {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images}
    return {**means, "images": int(images), "images_per_s": images / seconds}


def validate(opened: Opened, config: Config, progress: Callable) -> tuple[dict[str, Any], list[Unreadable]]:
    """Evaluate a model on the validation split of ``config``, whose classes may be in another order.

    Args:
        progress: called with the loader; returns its batches.

    Returns:
        The record and the skipped pictures.

    Raises:
        InputError: the data cannot be opened or have other classes, or a picture cannot be read.
    """
    processes, model = join(), opened.model
    workers = processes.default_workers() if config.workers is None else config.workers
    source = str(opened.path or opened.name)
    data = load_data(config, workers, training=False)
    match_classes(model, opened.class_names, data.class_names, source)
    if data.num_classes != model.num_classes:
        raise InputError(f"the data have {data.num_classes} classes and the model of {source} has {model.num_classes}")
    model.to(processes.device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    loader = val_loader(config, data.val, processes, workers)
    skipped: list[Unreadable] = []
    skips = skipped if config.bad_pictures == "skip" else None
    with loader_processes(loader):
        metrics = evaluate(model, progress(loader), data.summary["val_images"], config, processes, skips)
    if not math.isfinite(metrics["loss"]):
        raise InputError(f"the outputs of {source} are not finite, so that they rank no classes: use precision=float32")
    names = {"model_args", "img_size", "crop_pct", "interpolation", "mean", "std", "seed"}
    precision = precision_on(config, processes.device)
    training = {name: opened.config[name] for name in Config.model_fields if name in (opened.config or ())} or None
    if training and (run := read_run(opened.path.parent)).get("status", "finished") != "finished":
        training["epochs"] = run["epochs"]["done"]
    record = {
        "kind": "classification",
        "model": config.model,
        "checkpoint": {"file": source.rpartition("/")[2], "sha256": sha256(opened.path) if opened.path else None},
        "training": training,
        "data": data.summary,
        "settings": {**config.model_dump(mode="json", include=names), "precision": precision},
        "metrics": {**metrics, "skipped": len(skipped)},
        **provenance(),
    }
    return record, skipped


def default_record_path(opened: Opened) -> Path:
    """The run's folder for its own checkpoint, and runs/ for others."""
    if opened.path and (opened.path.parent / "run.json").is_file():
        return opened.path.parent / "validation.json"
    return Path("runs") / f"validation-{opened.name}-{datetime.now():%Y%m%d-%H%M%S}.json"
