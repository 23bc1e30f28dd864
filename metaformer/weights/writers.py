"""Write an opened checkpoint for another library, and refuse models that the library would compute differently."""

import json
from copy import deepcopy
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save
from timm.data import create_transform
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from metaformer.errors import InputError, check_known
from metaformer.export import TOLERANCE, largest_error
from metaformer.formats import TO, convert
from metaformer.model import MetaFormer
from metaformer.provenance import write_file, write_json, write_torch, writing
from metaformer.variants import POOLFORMERS, VARIANTS
from metaformer.weights.card import write_card
from metaformer.weights.described import architecture
from metaformer.weights.loading import load_state
from metaformer.weights.opener import Opened

TARGETS = (*TO, "timm-hf")


def write(opened: Opened, to: str, target: Path) -> list[str]:
    """Write a MetaFormer for another library; returns sentences on how much its results differ there.

    Args:
        to: one of :data:`TARGETS`; ``"timm-hf"`` also takes other models of timm.
        target: a file; for ``"hf"`` and ``"timm-hf"`` a folder.

    Raises:
        InputError: the format or its library cannot represent the model, or the target cannot be written.
    """
    check_known("format", to, TARGETS)
    if to == "timm-hf":
        return write_timm_folder(opened, target)
    model = opened.model
    if not isinstance(model, MetaFormer):
        raise InputError(f"{to} has no {opened.name}, which is not a MetaFormer: use timm-hf")
    if to == "hf":
        return write_transformers_folder(opened, target)
    name = architecture(opened.name)
    known = [each for each, variant in VARIANTS.items() if variant.release] if to == "official" else POOLFORMERS
    if to != "ours" and name not in known:
        raise InputError(f"{to} has no {opened.name}: it has {', '.join(known)}")
    content, remarks = convert(model.state_dict(), to), []
    if to == "ours":
        own = {"model": opened.name, "model_args": opened.model_args, "img_size": list(opened.size), **opened.inputs}
        content = {
            "arch": opened.name,
            "config": {**own, **(opened.config or {})},
            "num_classes": model.num_classes,
            "class_names": opened.class_names,
            "state_dict": content,
        }
    elif to == "timm":
        theirs = getattr(timm.models.metaformer, name)(num_classes=model.num_classes, in_chans=model.in_chans)
        check_same(opened, theirs, "timm", "timm's class", "forward_features")
        theirs.load_state_dict(content)
        images = random_images(opened)
        with torch.inference_mode():
            error = largest_error([theirs(images)], [model(images)])
        if error > TOLERANCE:
            remarks.append(
                "timm averages before the last norm, where the paper's code norms first: "
                f"its logits differ by {100 * error:.1f} % on random images"
            )
    else:  # these libraries build the model by its name, for 3 channels, and fix numbers of tokens for 224 pixels
        by_name = timm.create_model(opened.name, num_classes=model.num_classes)
        check_same(opened, by_name, "ours", f"the {to} format, which holds weights alone,")
        content = {"state_dict": content} if to == "mmpretrain" else content
    write_torch(target, content)
    return remarks


def write_timm_folder(opened: Opened, folder: Path) -> list[str]:
    """The files of ``timm.models.save_for_hf``, which transformers' ``TimmWrapper`` and timm's ``local-dir:`` load."""
    data = {"img_size": opened.size, "crop_pct": opened.crop_pct}  # the model states the rest
    with writing(folder), NamedTemporaryFile() as file:
        try:
            save_config_for_hf(opened.model, file.name, {"label_names": opened.class_names}, data_config=data)
        except ValueError as error:
            raise InputError(f"timm-hf cannot represent {opened.name} as it was trained: {error}") from error
        config = json.loads(Path(file.name).read_text())
    config["model_args"].pop("num_classes", None)  # TimmWrapper gives it to timm.create_model itself
    write_json(folder / "config.json", config)
    write_file(folder / "model.safetensors", save(opened.model.state_dict()))
    if opened.config and (opened.path.parent / "run.json").is_file():
        write_card(opened, folder)
    return []


def write_transformers_folder(opened: Opened, folder: Path) -> list[str]:
    """The folder of transformers' PoolFormer: ``config.json``, ``preprocessor_config.json``, ``model.safetensors``."""
    try:
        from transformers import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
    except ImportError as error:
        raise InputError("to write a Hugging Face model, transformers is needed: pip install transformers") from error
    model, side = opened.model, opened.size[0]
    if opened.size != (side, side) or model.in_chans != 3 or opened.interpolation in ("box", "hamming"):
        raise InputError(
            "transformers' processor crops squares of 3 channels, and has no filters box and hamming: "
            f"{opened.name} takes images of {opened.size} with {model.in_chans} channels and {opened.interpolation}"
        )
    weights, names = model.state_dict(), opened.class_names or [f"LABEL_{i}" for i in range(model.num_classes)]
    convs = [model.stem, *(stage.downsample for stage in model.stages[1:])]
    theirs = PoolFormerForImageClassification(
        PoolFormerConfig(
            depths=[len(stage.blocks) for stage in model.stages],
            hidden_sizes=[conv.out_channels for conv in convs],
            patch_sizes=[conv.kernel_size[0] for conv in convs],
            strides=[conv.stride[0] for conv in convs],
            padding=[conv.padding[0] for conv in convs],
            num_encoder_blocks=len(convs),
            architectures=["PoolFormerForImageClassification"],
            mlp_ratio=opened.model_args.get("mlp_ratio") or 4.0,
            use_layer_scale="stages.0.blocks.0.layer_scale1" in weights,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
    )
    check_same(opened, theirs, "hf", "transformers' PoolFormer")
    processor = PoolFormerImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        crop_pct=opened.crop_pct,
        resample=int(Image.Resampling[opened.interpolation.upper()]),
        image_mean=opened.mean,
        image_std=opened.std,
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)  # transformers only logs that it is a file
        theirs.config.save_pretrained(folder)
        processor.save_pretrained(folder)
    write_file(folder / "model.safetensors", save(convert(weights, "hf"), {"format": "pt"}))
    # transformers rounds the crop's corner down, torchvision to the nearest even number.
    margin = int(side / opened.crop_pct) - side
    why = ", because its crop lies one pixel further up and left" if round(margin / 2) != margin // 2 else ""
    return [
        f"transformers' image processor changes the logits of a square test picture by "
        f"{100 * difference_by(processor, opened):.2f} %{why}"
    ]


@torch.inference_mode()
def difference_by(processor: Any, opened: Opened) -> float:
    """Relative difference of the logits if ``processor`` prepares a picture instead of timm's transforms."""
    rough = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(rough).resize((2 * opened.size[0],) * 2, Image.Resampling.BICUBIC)
    ours = create_transform(opened.size[0], **opened.inputs)(picture)[None]
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    return largest_error([opened.model(theirs)], [opened.model(ours)])


@torch.inference_mode()
def check_same(opened: Opened, theirs: nn.Module, form: str, library: str, method: str = "forward") -> None:
    """Refuse a model that the class ``theirs`` of ``library``, which names tensors as ``form``, computes differently.

    All weights are replaced by large random ones, because a small LayerScale would hide most of a model.

    Raises:
        InputError: the tensors, or the outputs of ``method`` on random images, differ.
    """
    generator = torch.Generator().manual_seed(0)
    model = deepcopy(opened.model)
    for tensor in filter(Tensor.is_floating_point, model.state_dict().values()):
        if tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
        else:  # not negative, as variances are here too
            tensor.uniform_(0.5, 1.5, generator=generator)
    differing = ", ".join(f"{name}={value}" for name, value in opened.model_args.items()) or opened.name
    refused = f"{library} cannot represent {opened.name} as it was trained ({differing})"
    try:
        load_state(theirs.eval(), convert(model.state_dict(), form), "it")
    except InputError as error:
        raise InputError(f"{refused}: {error}") from error
    images = random_images(opened)
    output = getattr(theirs, method)(images)
    error = largest_error([getattr(output, "logits", output)], [getattr(model, method)(images)])
    if not error <= TOLERANCE:
        raise InputError(f"{refused}: with equal weights, its output would differ by {100 * error:.0f} %")


def random_images(opened: Opened) -> Tensor:
    """(2, in_chans, H, W), large enough that every map has several positions, so that averages matter."""
    smallest = 0 if opened.model.fixed_size else 2 * opened.model.feature_info[-1]["reduction"]
    size = (max(side, smallest) for side in opened.size)
    return torch.randn(2, opened.model.in_chans, *size, generator=torch.Generator().manual_seed(0))
