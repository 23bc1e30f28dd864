"""Top-1, top-5 and images per second of a checkpoint or a run; writes a result record with its provenance.

python classification/validate.py RUN_FOLDER_OR_CHECKPOINT [key=value ...] [--record FILE]
"""

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import metaformer
from config import Config, check, parse_overrides
from data import Unreadable, checked, load_validation, naming_killed_loaders, shut_down, val_loader
from distributed import Processes, join
from metaformer.errors import InputError, nearest, run_command
from metaformer.provenance import provenance, sha256, write_json
from metaformer.variants import released_file
from metaformer.weights import load_state, read_checkpoint, weights_of


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The model of ``config`` with its released weights, those of ``checkpoint``, or fresh ones."""
    if not timm.is_model(config.model):
        raise InputError(f"there is no model {config.model!r}{nearest(config.model, timm.list_models())}")
    # timm hands on what is not None: a model without drop path need not know the word.
    arguments = {"drop_path_rate": config.drop_path or None, "drop_rate": config.drop or None}
    if config.model in metaformer.VARIANTS:
        arguments["img_size"] = config.img_size  # for token mixers that fix the number of tokens
    try:
        model = timm.create_model(
            config.model, pretrained=config.pretrained, num_classes=num_classes, **{**arguments, **config.model_args}
        )
    except TypeError as error:
        raise InputError(f"{config.model} does not take these arguments: {error}") from error
    except (OSError, RuntimeError) as error:
        if not config.pretrained:
            raise
        raise InputError(f"cannot fetch the released weights of {config.model}: {error}") from error
    if config.checkpoint:
        weights = weights_of(read_checkpoint(config.checkpoint), ema=True)
        load_state(model, weights, config.checkpoint, config.replace_head)
    return model


def released_weights(config: Config) -> dict[str, str] | None:
    """Name and SHA-256 of the released file that training starts from, if it does and the model is one of ours."""
    if not config.pretrained or config.model not in metaformer.VARIANTS:
        return None
    file = released_file(config.model)
    return {"file": file.name, "sha256": sha256(file)}


def with_input_of(config: Config, model: nn.Module) -> Config:
    """The config with what it leaves to the model: normalisation, crop and interpolation of the evaluation."""
    own = resolve_data_config(model=model)
    names = ("crop_pct", "interpolation", "mean", "std")
    return config.model_copy(update={name: own[name] for name in names if getattr(config, name) is None})


def normaliser(config: Config, device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 images (B, 3, H, W) to normalised float32 ones on the device."""
    mean, std = (255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (config.mean, config.std))
    layout = torch.channels_last if config.channels_last else torch.contiguous_format

    def normalise(images: Tensor) -> Tensor:
        images = images.to(device, non_blocking=True).to(torch.float32, memory_format=layout)
        return images.sub_(mean).div_(std)

    return normalise


def precision_on(config: Config, device: torch.device) -> str:
    """The precision of the config; "auto" is bfloat16 on CUDA and float32 on a CPU."""
    if config.precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return config.precision


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    precision = precision_on(config, device)
    if precision == "float16" and device.type == "cpu":
        raise InputError("precision=float16 needs a GPU: use float32 or bfloat16 on a CPU")
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    normalise: Callable[[Tensor], Tensor],
    cast: AbstractContextManager,
    processes: Processes,
    progress: Callable[[Iterable], Iterable] = iter,
    skip: Callable[[list[Unreadable]], None] | None = None,
) -> dict[str, float]:
    """top1 and top5 in percent, mean cross-entropy ``loss``, ``images`` and ``images_per_s``, over all processes.

    ``skip`` as in :func:`data.checked`; the pictures left out count nowhere.

    Raises:
        InputError: a picture or label that :func:`data.checked` refuses, or no picture that can be read.
    """
    model.eval()
    start = time.perf_counter()
    totals = torch.zeros(4, dtype=torch.float64, device=processes.device)  # loss, top-1, top-5, images
    for images, labels in progress(checked(iter(loader), model.num_classes, skip)):
        if not len(labels):  # all of the batch was skipped
            continue
        labels = labels.to(processes.device, non_blocking=True)
        with cast:
            logits = model(normalise(images))
        logits = logits.float()
        top5 = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([loss, top5[:, 0].sum(), top5.sum(), torch.tensor(len(labels), device=loss.device)])
    loss, top1, top5, images = processes.sum(totals).tolist()
    if not images:
        raise InputError("no picture of the validation split can be read")
    seconds = time.perf_counter() - start
    return {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "loss": loss / images,
        "images": int(images),
        "images_per_s": images / seconds,
    }


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


if __name__ == "__main__":
    run_command(main)
