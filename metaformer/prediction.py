"""The most likely classes of pictures, by a run or a checkpoint.

python classification/predict.py IMAGE_OR_FOLDER... [--checkpoint RUN_OR_FILE] [--model NAME] [--top 5] [--json | --csv]

Folders are searched for pictures, with the folders below them. Without --checkpoint the released weights of --model are
fetched. Pictures that cannot be read are named and passed over, and the exit status is 1 then.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo
from timm.data.loader import fast_collate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from metaformer.errors import InputError
from metaformer.training.config import Config, check
from metaformer.training.data import Unreadable, printable, to_rgb, transform
from metaformer.training.distributed import join
from metaformer.training.model import autocast, build_model, normaliser, with_input_of
from metaformer.weights import load_state, read_checkpoint, weights_of

Prediction = dict[str, Any]


class Pictures(Dataset):
    """Index to (index, uint8 array (3, H, W)), upright as the camera says."""

    def __init__(self, paths: list[Path], config: Config):
        self.paths, self.transform = paths, transform(config, is_training=False)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray] | Unreadable:
        try:
            with Image.open(self.paths[index]) as picture:
                return index, self.transform(to_rgb(ImageOps.exif_transpose(picture)))
        except Exception as error:  # decoders fail in their own ways; the batch carries the failure to the main process
            return Unreadable(printable(str(self.paths[index])), printable(f"{type(error).__name__}: {error}"))


def collate(samples: list) -> tuple[list[int], Tensor | None, list[Unreadable]]:
    read = [sample for sample in samples if not isinstance(sample, Unreadable)]
    images = fast_collate([(image, 0) for _, image in read])[0] if read else None
    return [index for index, _ in read], images, [sample for sample in samples if isinstance(sample, Unreadable)]


def find_pictures(given: list[Path]) -> list[Path]:
    """Files as they are; of folders the files whose names end as pictures' do, in order."""
    Image.init()
    endings = {ending for ending, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    found = []
    for path in given:
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in endings and file.is_file()]
            if not inside:
                raise InputError(f"there are no pictures in {path}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"there is no picture or folder {path}")
    return found


def load(checkpoint: str | None, name: str | None) -> tuple[Config, nn.Module, list[str]]:
    """The settings, the model with its weights, and the names of its classes."""
    if checkpoint is None:
        if name is None:
            raise InputError("give --checkpoint RUN_OR_FILE, or --model NAME for its released weights")
        config = check({"model": name, "pretrained": True}, source="the command line")
        model, classes = build_model(config, 1000), None
    else:
        path = Path(checkpoint)
        path = path / "best.pt" if (path / "best.pt").is_file() else path
        content = read_checkpoint(path)
        settings = {**content.get("config", {}), **({"model": name} if name else {})}
        if "model" not in settings:
            raise InputError(f"{path} does not say what model it is of: give --model poolformer_s12 or another")
        start = {"pretrained": False, "checkpoint": None, "replace_head": False}
        config = check({**settings, **start}, source=str(path))
        weights = weights_of(content, ema=config.ema_decay > 0)
        classes = content.get("class_names")
        model = build_model(config, len(classes) if classes else classifier_size(weights, path))
        load_state(model, weights, str(path))
    return with_input_of(config, model), model.eval(), classes or names_of(model.num_classes)


def classifier_size(weights: dict[str, Tensor], path: Path) -> int:
    """Classes of a classifier by the last matrix of its weights, where every format has it."""
    matrices = [tensor for tensor in weights.values() if isinstance(tensor, Tensor) and tensor.ndim == 2]
    if not matrices:
        raise InputError(f"{path} has no classifier")
    return len(matrices[-1])


def names_of(classes: int) -> list[str]:
    if classes != 1000:
        return [str(i) for i in range(classes)]
    imagenet = ImageNetInfo()
    return [imagenet.index_to_description(i) for i in range(classes)]


@torch.inference_mode()
def predict(
    config: Config, model: nn.Module, names: list[str], paths: list[Path], top: int = 5, batch: int = 32
) -> tuple[list[Prediction], list[Unreadable]]:
    """For each picture that can be read its ``top`` classes with probabilities, and those that cannot."""
    processes = join()
    workers = min(processes.default_workers(), len(paths) // batch)
    loader = DataLoader(Pictures(paths, config), batch, num_workers=workers, collate_fn=collate)
    model.to(processes.device)
    normalise = normaliser(config, processes.device)
    predictions, unreadable = [], []
    for indices, images, failed in tqdm(loader, unit="batch", desc=config.model, disable=None):
        unreadable += failed
        if images is None:
            continue
        with autocast(config, processes.device):
            logits = model(normalise(images))
        probabilities, classes = logits.float().softmax(1).topk(min(top, len(names)))
        for index, shares, labels in zip(indices, probabilities.tolist(), classes.tolist(), strict=True):
            best = [{"class": names[i], "index": i, "probability": p} for i, p in zip(labels, shares, strict=True)]
            predictions.append({"file": str(paths[index]), "classes": best})
    return predictions, unreadable


def show(predictions: list[Prediction], kind: str) -> None:
    if kind == "json":
        print(json.dumps(predictions, indent=2, ensure_ascii=False))
        return
    if kind == "csv":
        table = csv.writer(sys.stdout)
        table.writerow(["file", "rank", "class", "index", "probability"])
        for prediction in predictions:
            for rank, best in enumerate(prediction["classes"], 1):
                table.writerow([prediction["file"], rank, best["class"], best["index"], f"{best['probability']:.6f}"])
        return
    for prediction in predictions:
        print(prediction["file"])
        for best in prediction["classes"]:
            print(f"  {100 * best['probability']:6.2f} %  {best['class']}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pictures", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--checkpoint", metavar="RUN_OR_FILE", help="a run's folder, or weights in any known format")
    parser.add_argument("--model", metavar="NAME", help="what the weights are of, where the checkpoint does not say")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes for each picture (default: 5)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="pictures at once (default: 32)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_const", dest="kind", const="json")
    output.add_argument("--csv", action="store_const", dest="kind", const="csv")
    options = parser.parse_args(arguments)
    if min(options.top, options.batch) < 1:
        raise InputError("--top and --batch are at least 1")
    paths = find_pictures(options.pictures)
    predictions, unreadable = predict(*load(options.checkpoint, options.model), paths, options.top, options.batch)
    show(predictions, options.kind or "text")
    for name, reason in unreadable:
        print(f"cannot read {name}: {reason}", file=sys.stderr)
    return 1 if unreadable else 0
