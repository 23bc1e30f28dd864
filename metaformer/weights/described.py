"""Read the model, the input settings and the class names that a checkpoint states, in each format."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import timm
from PIL import Image

from metaformer import variants
from metaformer.errors import InputError
from metaformer.provenance import read_json
from metaformer.weights.files import HF_FILES

Settings = dict[str, Any]
"""Settings under the names that :class:`metaformer.training.config.Config` has for them, and ``class_names``."""


def described(path: Path, checkpoint: dict, kind: str | None) -> Settings:
    """The settings stated by the checkpoint at ``path``, whose weights have the format ``kind``; empty for bare
    weights."""
    config, arguments, meta, name = (checkpoint.get(key) for key in ("config", "args", "meta", "arch"))
    if isinstance(config, dict):  # of a run here
        return {**config, "num_classes": checkpoint.get("num_classes"), "class_names": checkpoint.get("class_names")}
    if isinstance(arguments, Namespace):
        return of_timm_train(vars(arguments), kind)
    if path.name in HF_FILES and (path.parent / "config.json").is_file():
        return of_folder(path.parent, kind)
    if isinstance(meta, dict) and isinstance(meta.get("dataset_meta"), dict):  # of mmpretrain
        return {"class_names": list(meta["dataset_meta"].get("classes") or ()) or None}
    return {"model": name, "model_args": in_timm(kind, name)} if isinstance(name, str) and timm.is_model(name) else {}


def check_trained_as(model: str, model_args: dict[str, Any], checkpoint: dict, source: str) -> None:
    """Refuse the checkpoint of a run here, or of a detector or segmentor, for another model than was trained.

    Token mixers without weights, and strides, do not show in the names and shapes of the tensors.

    Args:
        model, model_args: the model that is to have the weights.
    """
    run, meta = checkpoint.get("config"), checkpoint.get("meta")
    trained = re.findall(r"\bvariant='(\w+)'", str(meta.get("cfg")) if isinstance(meta, dict) else "")
    if trained and architecture(model) not in trained:
        raise InputError(f"{source} was trained with the backbone {trained[0]}, and the model here is {model}")
    if not isinstance(run, dict) or architecture(run.get("model")) not in variants.VARIANTS:
        return
    theirs, ours = (
        {key: list(value) if isinstance(value, tuple) else value for key, value in each.items() if key != "img_size"}
        for each in (run.get("model_args") or {}, model_args)
    )
    if (architecture(run["model"]), theirs) != (architecture(model), ours):
        raise InputError(
            f"{source} was trained as {run['model']} with model_args {theirs}, and the model here is {model} with "
            f"{ours}: use the same name and arguments, or save the weights alone to start another model from them"
        )


def of_timm_train(arguments: dict[str, Any], kind: str | None) -> Settings:
    """Settings from the arguments of timm's train.py."""
    names = ("model", "num_classes", "img_size", "crop_pct", "interpolation", "mean", "std", "drop", "drop_path")
    settings = {name: arguments.get(name) for name in names}
    model_args = {"in_chans": arguments.get("in_chans"), "global_pool": arguments.get("gp")}
    model_args |= in_timm(kind, arguments.get("model"))
    if size := arguments.get("input_size"):  # (C, H, W)
        settings["img_size"], model_args["in_chans"] = list(size[1:]), size[0]
    return {**settings, "model_args": {**model_args, **(arguments.get("model_kwargs") or {})}}


def in_timm(kind: str | None, model: str | None) -> Settings:
    """The argument that makes our class compute what timm's class computes, if the tensors have timm's names."""
    return {"pool_before_norm": True} if kind == "timm" and architecture(model) in variants.VARIANTS else {}


def architecture(model: str | None) -> str:
    """A model's name without timm's tag, which names the weights."""
    return str(model).partition(".")[0]


def of_folder(folder: Path, kind: str | None) -> Settings:
    """Settings from a Hugging Face folder of timm, or of transformers' PoolFormer with its image processor."""
    config = read_json(folder / "config.json")
    if "architecture" in config:
        cfg = config.get("pretrained_cfg", config)
        model_args = {**in_timm(kind, config["architecture"]), **(config.get("model_args") or {})}
        return {
            "model": config["architecture"],
            "model_args": {key: value for key, value in model_args.items() if key != "num_classes"},
            "num_classes": config.get("num_classes"),
            "class_names": ordered(config.get("label_names")),
            "img_size": (cfg.get("input_size") or ())[-2:] or None,
            **{key: cfg.get(key) for key in ("crop_pct", "crop_mode", "interpolation", "mean", "std")},
        }
    if config.get("model_type") != "poolformer":
        return {}
    strides = config.get("strides", [4, 2, 2, 2])
    (stride, *later), overlap = strides, config.get("patch_sizes") != strides
    fixed = {
        "patch_sizes": [7, *(3 for _ in later)] if overlap else strides,
        "strides": [stride, *(2 for _ in later)],
        "padding": [(8 - stride) // 2, *(1 for _ in later)] if overlap else [0 for _ in strides],
        "pool_size": 3,
        "hidden_act": "gelu",
    }
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise InputError(f"{folder} holds a PoolFormer with {key} {config[key]}: here it is {value}")
    depths = tuple(config.get("depths", variants.S12["depths"]))
    dims = tuple(config.get("hidden_sizes", variants.S12["dims"]))
    shapes = {name: (row.arguments["depths"], row.arguments["dims"]) for name, row in variants.POOLFORMERS.items()}
    scaled = config.get("use_layer_scale", True)
    name = next((name for name, shape in shapes.items() if scaled and shape == (depths, dims)), None)
    model_args = {"stem_stride": stride, "overlap": overlap, "mlp_ratio": config.get("mlp_ratio", 4.0)}
    if name is None:
        name = "poolformer_s12" if scaled else "metaformer_s12_nolayerscale"
        model_args |= {"depths": depths, "dims": dims}
    names = ordered(config.get("id2label"))
    return {"model": name, "model_args": model_args, "class_names": names, **of_processor(folder)}


def of_processor(folder: Path) -> Settings:
    """Settings from the folder's image processor of transformers' PoolFormer, if it has one."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return {}
    processor = read_json(file)
    sizes = (processor.get(key, 224) for key in ("size", "crop_size"))
    sides = {side for size in sizes for side in (size.values() if isinstance(size, dict) else [size])}
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    usual = processor.get("rescale_factor", 1 / 255) == 1 / 255 and all(processor.get(step, True) for step in steps)
    if len(sides) > 1 or not usual:
        raise InputError(f"{file} prepares pictures otherwise than by resizing, cropping to one side and normalising")
    return {
        "img_size": sides.pop(),
        "crop_pct": processor.get("crop_pct", 0.9) or 1.0,  # transformers' default, and its meaning of null
        "interpolation": Image.Resampling(processor.get("resample", Image.Resampling.BICUBIC)).name.lower(),
        "mean": processor.get("image_mean"),
        "std": processor.get("image_std"),
    }


def ordered(names: dict[str, str] | list[str] | None) -> list[str] | None:
    """Class names in the order of the logits; ``None`` without names or with the placeholders of transformers."""
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    return None if not names or names == [f"LABEL_{i}" for i in range(len(names))] else list(names)
