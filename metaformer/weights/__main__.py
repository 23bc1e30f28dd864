"""Convert weights between libraries.

python -m metaformer.weights SOURCE TARGET --to hf|timm|official|mmpretrain|ours [--model NAME] [--ema]

SOURCE is a checkpoint of any of these formats, which is recognised. TARGET is a file, for hf a folder that transformers
loads.
"""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from metaformer.errors import InputError, nearest, run_command
from metaformer.formats import TO, convert, recognised
from metaformer.provenance import write_file
from metaformer.variants import POOLFORMERS, VARIANTS
from metaformer.weights import load_state, named_for, read_checkpoint, weights_of

WRAPPED = ("mmpretrain", "ours")
"""Formats whose files have the weights under ``state_dict``; the others' have them bare."""


def write_hugging_face(model: nn.Module, crop_pct: float, class_names: list[str] | None, folder: Path) -> None:
    """A folder with ``config.json``, ``preprocessor_config.json`` and ``model.safetensors``."""
    try:
        from transformers import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
    except ImportError as error:
        raise InputError("to write a Hugging Face model, transformers is needed: pip install transformers") from error
    names = class_names or [f"LABEL_{i}" for i in range(model.num_classes)]
    config = PoolFormerConfig(
        depths=[len(stage.blocks) for stage in model.stages],
        hidden_sizes=[info["num_chs"] for info in model.feature_info],
        num_channels=model.in_chans,
        layer_scale_init_value=VARIANTS[model.pretrained_cfg["architecture"]].arguments["layer_scale_init"],
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    theirs = PoolFormerForImageClassification(config)
    theirs.load_state_dict(convert(model.state_dict(), "hf"))
    processor = PoolFormerImageProcessor(crop_pct=crop_pct)
    try:
        theirs.save_pretrained(folder)
        processor.save_pretrained(folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error


def build(name: str, weights: dict[str, Any], source: Path) -> nn.Module:
    """The model ``name`` with as many classes as the weights have, and the weights."""
    if name not in VARIANTS:
        raise InputError(f"there is no model {name!r}{nearest(name, VARIANTS)}: there are {', '.join(VARIANTS)}")
    ours = named_for(weights, timm.create_model(name, num_classes=0))
    if "head.weight" not in ours:
        raise InputError(f"{source} has no classifier: only whole models are converted")
    model = timm.create_model(name, num_classes=len(ours["head.weight"]), in_chans=ours["stem.weight"].shape[1])
    load_state(model, weights, str(source))
    return model.eval()


@torch.inference_mode()
def difference_in_timm(model: nn.Module) -> float:
    """Norm of the difference between timm's logits and the model's on random images, relative to the latter's."""
    theirs = getattr(timm.models.metaformer, model.pretrained_cfg["architecture"])
    theirs = theirs(num_classes=model.num_classes, in_chans=model.in_chans).eval()
    theirs.load_state_dict(convert(model.state_dict(), "timm"))
    images = torch.randn(8, model.in_chans, 224, 224, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    return ((theirs(images) - logits).norm() / logits.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m metaformer.weights", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path, help="checkpoint of any of these formats")
    parser.add_argument("target", type=Path, help="file to write; for hf a folder")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=", ".join(TO))
    parser.add_argument("--model", metavar="NAME", help="what the weights are of; default: what the checkpoint says")
    parser.add_argument("--ema", action="store_true", help="take the moving average, if the checkpoint has one")
    options = parser.parse_args()
    if options.to not in TO:
        raise InputError(f"there is no format {options.to!r}{nearest(options.to, TO)}: there are {', '.join(TO)}")
    checkpoint = read_checkpoint(options.source)
    settings = checkpoint.get("config") if isinstance(checkpoint.get("config"), dict) else {}
    name = options.model or settings.get("model")
    if name is None:
        raise InputError(f"{options.source} does not say what model it is of: give --model poolformer_s12 or another")
    weights = weights_of(checkpoint, options.ema)
    model = build(name, weights, options.source)
    if options.to in ("hf", "timm", "mmpretrain") and name not in POOLFORMERS:
        raise InputError(f"{options.to} has no {name}: it has {', '.join(POOLFORMERS)}")
    if options.to == "hf":
        crop = settings.get("crop_pct") or VARIANTS[name].crop_pct
        write_hugging_face(model, crop, checkpoint.get("class_names"), options.target)
    else:
        converted = convert(model.state_dict(), options.to)
        wrapped = {"state_dict": converted} if options.to in WRAPPED else converted
        options.target.parent.mkdir(parents=True, exist_ok=True)
        write_file(options.target, lambda file: torch.save(wrapped, file))
    print(f"{options.source} ({recognised(weights)}, {name}) -> {options.target} ({options.to})")
    if options.to == "timm":
        print(
            "timm averages before the last norm, where the paper's code norms first: "
            f"its logits differ by {100 * difference_in_timm(model):.1f} % on random images"
        )


if __name__ == "__main__":
    run_command(main)
