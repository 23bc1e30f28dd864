"""Top-1, top-5 and images per second of a checkpoint or a run; writes a result record with its provenance.

python classification/validate.py RUN_FOLDER_OR_CHECKPOINT [key=value ...] [--record FILE]
"""

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from metaformer.errors import InputError
from metaformer.provenance import provenance, sha256, write_json
from metaformer.training.config import Config, check, parse_overrides
from metaformer.training.data import Unreadable, load_validation, naming_killed_loaders, shut_down, val_loader
from metaformer.training.distributed import join
from metaformer.training.evaluation import evaluate
from metaformer.training.model import autocast, build_model, normaliser, precision_on, with_input_of
from metaformer.weights import load_state, read_checkpoint, weights_of


def locate(source: Path) -> Path:
    """The checkpoint that ``source`` means: itself, or the best one of a run folder."""
    checkpoint = source / "best.pt" if source.is_dir() else source
    if not checkpoint.is_file():
        raise InputError(f"there is no checkpoint {checkpoint}: give a checkpoint file or the folder of a run")
    return checkpoint


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    record_path = None
    if "--record" in arguments:
        at = arguments.index("--record")
        if at + 1 == len(arguments):
            raise InputError("--record needs the name of a file")
        record_path = Path(arguments[at + 1])
        del arguments[at : at + 2]
    path = locate(Path(arguments[0]))
    checkpoint = read_checkpoint(path)
    # What is trained here carries its settings; of other files the command line says what they are.
    settings = {**checkpoint.get("config", {}), **parse_overrides(arguments[1:])}
    start_only = {"pretrained": False, "checkpoint": None, "replace_head": False}
    config = check({**settings, **start_only}, source=f"{path} and the command line")

    processes = join()
    workers = processes.default_workers() if config.workers is None else config.workers
    split, num_classes, summary = load_validation(config, workers, checkpoint.get("class_names"))
    model = build_model(config, num_classes)
    load_state(model, weights_of(checkpoint, ema=config.ema_decay > 0), str(path))
    config = with_input_of(config, model)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(processes.device, memory_format=layout)
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
                lambda batches: tqdm(batches, total=len(loader), unit="batch", desc=config.model, disable=None),
                skipped.extend if config.bad_pictures == "skip" else None,
            )
    finally:
        shut_down(loader)
    skipped = [picture for part in processes.gather(skipped) for picture in part]
    if not processes.is_main:
        return
    config = config.model_copy(update={"precision": precision_on(config, processes.device)})
    for name, reason in skipped:
        print(f"skipped the picture {name} ({reason})")
    metrics["skipped"] = len(skipped)
    record = result_record(config, path, summary, metrics, trained_here="config" in checkpoint)
    record_path = record_path or default_record_path(path, config.model)
    write_json(record_path, record)
    print(
        f"{config.model}: top-1 {metrics['top1']:.3f} %, top-5 {metrics['top5']:.3f} % of {metrics['images']} images, "
        f"{metrics['skipped']} skipped, {metrics['images_per_s']:.1f} images/s; record: {record_path}"
    )


def result_record(
    config: Config, checkpoint: Path, data: dict[str, Any], metrics: dict[str, float], trained_here: bool
) -> dict[str, Any]:
    return {
        "kind": "classification",
        "model": config.model,
        "checkpoint": {"file": checkpoint.name, "sha256": sha256(checkpoint)},
        "training": {"epochs": config.epochs, "seed": config.seed} if trained_here else None,
        "data": data,
        "settings": config.model_dump(
            mode="json",
            include={"model_args", "img_size", "crop_pct", "interpolation", "mean", "std", "precision", "seed"},
        ),
        "metrics": metrics,
        **provenance(),
    }


def default_record_path(checkpoint: Path, model: str) -> Path:
    """Beside a run's checkpoint; for a checkpoint from elsewhere under runs/."""
    if (checkpoint.parent / "run.json").is_file():
        return checkpoint.parent / "validation.json"
    folder = Path("runs")
    folder.mkdir(exist_ok=True)
    return folder / f"validation-{model}-{datetime.now():%Y%m%d-%H%M%S}.json"
