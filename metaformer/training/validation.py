"""Validate a checkpoint on a data set and record the result with its provenance."""

from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaformer.errors import InputError
from metaformer.provenance import provenance, sha256
from metaformer.training.batches import Unreadable
from metaformer.training.config import Config
from metaformer.training.data import class_names, load_validation
from metaformer.training.distributed import join
from metaformer.training.evaluation import evaluate
from metaformer.training.loader import naming_killed_loaders, shut_down, val_loader
from metaformer.training.model import autocast, class_order, normaliser, precision_on
from metaformer.weights import Opened


class InOrder(nn.Module):
    """A classifier with its logits (B, classes) in another order."""

    def __init__(self, model: nn.Module, order: list[int]):
        super().__init__()
        self.model, self.order, self.num_classes = model, order, len(order)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[:, self.order]


def validate(
    opened: Opened, config: Config, progress: Callable[..., Iterable]
) -> tuple[dict[str, Any], list[Unreadable]] | None:
    """Evaluate a model on the validation split of ``config``, whose classes may be in another order.

    Args:
        progress: called as ``tqdm`` with the batches and their number ``total``.

    Returns:
        The record and the skipped pictures in the main process, ``None`` in the others.

    Raises:
        InputError: the data cannot be opened or have other classes, or a picture cannot be read.
    """
    processes = join()
    workers = processes.default_workers() if config.workers is None else config.workers
    source = str(opened.path or opened.name)
    split, num_classes, summary = load_validation(config, workers)
    model = opened.model
    if order := class_order(opened.class_names, class_names(split), source):
        model = InOrder(model, order)
    if num_classes != model.num_classes:
        raise InputError(f"the data have {num_classes} classes and the classifier of {source} has {model.num_classes}")
    model.to(processes.device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    loader = val_loader(config, split, processes, workers)
    skipped: list[Unreadable] = []
    try:
        with naming_killed_loaders():
            metrics = evaluate(
                model,
                loader,
                normaliser(config, processes.device),
                autocast(config, processes.device),
                processes,
                lambda batches: progress(batches, total=len(loader)),
                skipped.extend if config.bad_pictures == "skip" else None,
            )
    finally:
        shut_down(loader)
    skipped = [picture for part in processes.gather(skipped) for picture in part]
    if not processes.is_main:
        return None
    run = opened.config
    settings = config.model_copy(update={"precision": precision_on(config, processes.device)}).model_dump(
        mode="json", include={"model_args", "img_size", "crop_pct", "interpolation", "mean", "std", "precision", "seed"}
    )
    record = {
        "kind": "classification",
        "model": config.model,
        "checkpoint": {"file": source.rpartition("/")[2], "sha256": sha256(opened.path) if opened.path else None},
        "training": {"epochs": run["epochs"], "seed": run["seed"]} if run else None,
        "data": summary,
        "settings": settings,
        "metrics": {**metrics, "skipped": len(skipped)},
        **provenance(),
    }
    return record, skipped


def default_record_path(opened: Opened) -> Path:
    """The run's folder for its own checkpoint, and runs/ for others."""
    if opened.path and (opened.path.parent / "run.json").is_file():
        return opened.path.parent / "validation.json"
    folder = Path("runs")
    folder.mkdir(exist_ok=True)
    return folder / f"validation-{opened.name}-{datetime.now():%Y%m%d-%H%M%S}.json"
