"""Times the training loader beside variants of it: other decoders, PyTorch's resize, and no RandAugment.

python analysis/loader_variants.py --data-dir FOLDER --record FILE [--rounds N]
"""

import argparse
import random
import statistics
import time
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from timm.data.loader import fast_collate
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg

from metaformer.analysis.loader import INPUT_SETTINGS, equal_batches, seconds_of_epoch
from metaformer.errors import run_command
from metaformer.provenance import provenance, write_json
from metaformer.training.batches import Batch, Images, collate, seed_everything, to_rgb, transform
from metaformer.training.config import CONFIGS, load_config
from metaformer.training.data import open_split
from metaformer.training.distributed import join
from metaformer.training.loader import loader_options, shut_down, train_loader

WORKERS = 1


def pillow(data: bytes) -> Image.Image:
    return to_rgb(Image.open(BytesIO(data)))


def pillow_copied(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data)).convert("RGB")


def torchvision(data: bytes) -> torch.Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB).movedim(0, 2)


def with_simplejpeg(data: bytes) -> torch.Tensor:
    return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB", strict=True))


def resized(pixels: torch.Tensor, crop: Any) -> Image.Image:
    """The crop of timm's transform, drawn in the same way, but resized by PyTorch's uint8 kernels."""
    top, left, height, width = crop.get_params(pixels.movedim(2, 0), crop.scale, crop.ratio)
    mode = random.choice(crop.interpolation).value
    part = pixels[top : top + height, left : left + width].movedim(2, 0)[None]
    part = part.contiguous(memory_format=torch.channels_last)
    return Image.fromarray(F.interpolate(part, crop.size, mode=mode, antialias=True)[0].movedim(0, 2).numpy())


class Variant(Images):
    def __init__(self, dataset: Any, transform: Any, seed: int, decode: Any):
        super().__init__(dataset, self.apply, seed)
        self.steps, self.decode = transform.transforms, decode

    def _read(self, index: int) -> tuple[bytes, int]:
        file, label = self.dataset.reader[index]
        with file:
            return file.read(), label

    def apply(self, data: bytes) -> torch.Tensor:
        first, *others = self.steps
        picture = self.decode(data)
        picture = first(picture) if isinstance(picture, Image.Image) else resized(picture, first)
        for step in others:
            picture = step(picture)
        return picture


def old_collate(samples: list) -> Batch:
    return Batch(*fast_collate(samples), [])


def split(images: Images, batches: Any) -> dict[str, float]:
    """Milliseconds per picture."""
    names = {"RandomResizedCropAndInterpolation": "crop and resize", "RandomHorizontalFlip": "flip"}
    spent: Counter[str] = Counter()
    last = [0.0]

    def mark(name: str) -> None:
        now = time.perf_counter()
        spent[name] += now - last[0]
        last[0] = time.perf_counter()

    count = 0
    for batch in batches:
        samples = []
        for epoch, index in batch:
            last[0] = time.perf_counter()
            seed_everything(images.seed, epoch, index)
            mark("seed")
            file, label = images.dataset.reader[index]
            with file:
                image = Image.open(file)
                mark("open")
                image = to_rgb(image)
            mark("decode")
            for step in images.transform.transforms:
                image = step(image)
                name = type(step).__name__
                mark(names.get(name, "to tensor" if name == "MaybePILToTensor" else name))
            samples.append((image, label))
        last[0] = time.perf_counter()
        images_of_batch = collate(samples).images
        images_of_batch.share_memory_()
        mark("collate to shared memory")
        count += len(samples)
    return {name: 1000 * seconds / count for name, seconds in spent.items()}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = {"dataset": "", "data_dir": options.data_dir, "dataset_args": {}, "num_classes": None}
    inputs = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    config = load_config([str(CONFIGS / "poolformer_s12.yaml")]).model_copy(update={**folder, **inputs})
    dataset = open_split(config, config.train_split, WORKERS, is_training=True)
    batches = equal_batches(len(dataset), len(dataset), 64, WORKERS, config.seed)
    augment, plain = transform(config, True), transform(config.model_copy(update={"auto_augment": None}), True)
    plain.transforms = [step for step in plain.transforms if type(step).__name__ != "ColorJitter"]
    of = {
        "pillow": (pillow, augment),
        "pillow, timm's fast_collate": (pillow_copied, augment),
        "torchvision, PyTorch's resize": (torchvision, augment),
        "simplejpeg, PyTorch's resize": (with_simplejpeg, augment),
        "pillow, no RandAugment": (pillow, plain),
        "simplejpeg, PyTorch's resize, no RandAugment": (with_simplejpeg, plain),
    }
    loaders = {}
    for name, (decode, steps) in of.items():
        kind = loader_options(join(), WORKERS)
        if name == "pillow, timm's fast_collate":
            kind["collate_fn"] = old_collate
        variant = Variant(dataset, steps, config.seed, decode)
        loaders[name] = DataLoader(variant, batch_sampler=batches, **kind)
    loaders["pillow"] = train_loader(config, dataset, batches, join(), WORKERS)
    files = []
    for index in range(len(dataset)):
        file, _ = dataset.reader[index]
        with file:
            files.append(file.read())
    pixels = {}
    reference = Images(dataset, augment, config.seed)
    for name in list(of)[2:4]:
        variant = loaders[name].dataset
        differences = [variant[0, i][0].int() - reference[0, i][0].int() for i in range(len(dataset))]
        differences = torch.stack(differences)
        pixels[name] = {
            "share_differing": (differences != 0).double().mean().item(),
            "share_differing_by_more_than_1": (differences.abs() > 1).double().mean().item(),
            "mean_difference": differences.double().mean().item(),
        }
    rates, decoding, splits = [], [], []
    number = len(batches) * batches.device_batch
    try:
        for loader in loaders.values():
            seconds_of_epoch(loader, 2)
        for number_of_round in range(options.rounds):
            batches.epoch = number_of_round
            rates.append({name: number / seconds_of_epoch(loader, 2) for name, loader in loaders.items()})
            alone = {}
            for decode in dict.fromkeys(decode for decode, _ in of.values()):
                start = time.perf_counter()
                for data in files:
                    decode(data)
                alone[decode] = len(files) / (time.perf_counter() - start)
            decoding.append(alone)
            splits.append(split(reference, batches))
    finally:
        shut_down(*loaders.values())
    sizes = [(*Image.open(BytesIO(data)).size, len(data)) for data in files]
    width, height, size = (float(np.mean(values)) for values in zip(*sizes, strict=True))
    means = {"mean_width": width, "mean_height": height, "mean_bytes": size}
    record = {
        "kind": "loader",
        "data": {"data_dir": config.data_dir, "classes": 2, "images": len(dataset), **means},
        "settings": config.model_dump(mode="json", include=INPUT_SETTINGS),
        "workers": WORKERS,
        "images": number,
        "batch": batches.device_batch,
        "rounds": options.rounds,
        "consume_images_per_s": None,
        "decoders": {
            name: {
                "decode_images_per_s": spread([each[decode] for each in decoding]),
                "loader_images_per_s_per_worker": spread([each[name] for each in rates]),
                "loader_relative_to_pillow": spread([each[name] / each["pillow"] for each in rates]),
                "pixels": pixels.get(name),
                "workers_needed": None,
            }
            for name, (decode, _) in of.items()
        },
        "split_ms": {name: spread([each[name] for each in splits]) for name in splits[0]},
        "simplejpeg": simplejpeg.__version__,
        **provenance(),
    }
    write_json(options.record, record)
    for name, found in record["decoders"].items():
        print(name, found)
    print(record["split_ms"])


if __name__ == "__main__":
    run_command(main)
