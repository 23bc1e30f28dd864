"""The same model elsewhere: timm's and transformers' PoolFormer, and the official release's names, filled from ours."""

import re
from pathlib import Path

import timm
import timm.models.metaformer as timm_metaformer
import torch
from torch import Tensor, nn
from transformers import PoolFormerConfig, PoolFormerForImageClassification

from metaformer.training.config import Config
from metaformer.training.model import build_model, with_input_of

TIMM_NAMES = [
    (r"^stem\.", "stem.conv."),
    (r"\.downsample\.", ".downsample.conv."),
    (r"\.layer_scale([12])$", r".layer_scale\1.scale"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)", r"head.fc.\1"),
]
HF_NAMES = [
    (r"^stem\.", "poolformer.encoder.patch_embeddings.0.projection."),
    (r"^stages\.(\d)\.downsample\.", r"poolformer.encoder.patch_embeddings.\1.projection."),
    (r"^stages\.(\d)\.blocks\.(\d+)\.", r"poolformer.encoder.block.\1.\2."),
    (r"\.norm1\.", ".before_norm."),
    (r"\.norm2\.", ".after_norm."),
    (r"\.mlp\.fc([12])\.", r".output.conv\1."),
    (r"\.layer_scale([12])$", r".layer_scale_\1"),
    (r"^head\.", "classifier."),
]
OFFICIAL_NAMES = [
    (r"^stem\.", "patch_embed.proj."),
    (r"^stages\.(\d)\.downsample\.", lambda m: f"network.{2 * int(m[1]) - 1}.proj."),
    (r"^stages\.(\d)\.blocks\.", lambda m: f"network.{2 * int(m[1])}."),
    (r"\.layer_scale([12])$", r".layer_scale_\1"),
]


def renamed(state: dict[str, Tensor], names: list) -> dict[str, Tensor]:
    result = {}
    for name, tensor in state.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def timm_twin(name: str, model: nn.Module) -> nn.Module:
    """timm's class with the weights of ``model``, in the same memory."""
    with torch.device("meta"):
        twin = getattr(timm_metaformer, name)(num_classes=model.num_classes)
    twin.load_state_dict(renamed(model.state_dict(), TIMM_NAMES), assign=True)
    return twin.train(model.training)


def hf_twin(model: nn.Module) -> nn.Module:
    """The class of transformers with the weights of ``model``, in the same memory."""
    config = PoolFormerConfig(
        depths=[len(stage.blocks) for stage in model.stages],
        hidden_sizes=[info["num_chs"] for info in model.feature_info],
        num_labels=model.num_classes,
        drop_path_rate=0.0,
    )
    with torch.device("meta"):
        twin = PoolFormerForImageClassification(config)
    twin.load_state_dict(renamed(model.state_dict(), HF_NAMES), assign=True)
    return twin.train(model.training)


def randomised(name: str, **arguments) -> nn.Module:
    """A registered model with the weights of :func:`randomise`, without the time that its initialisation takes."""
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return randomise(model)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn large enough to matter; at initialisation LayerScale would hide most of the network."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "layer_scale" in name or ("norm" in name and name.endswith("weight")):
            parameter.copy_(1 + 0.3 * noise)
        elif parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.3 * noise)
    return model


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


SMALL = {"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 24]}


def save_run(folder: Path, name: str = "poolformer_s12", classes: str | list[str] = "abc", **settings) -> nn.Module:
    """Write what a run leaves as ``best.pt``, with random weights; returns the model that should be opened."""
    ema = "ema_decay" in settings
    config = Config(**{"model": name, "img_size": 32, "model_args": SMALL, "crop_pct": 0.9, **settings})
    models = [randomise(build_model(config, len(classes)), seed).eval() for seed in range(1 + ema)]
    checkpoint = {
        "arch": name,
        "config": with_input_of(config, models[0]).model_dump(mode="json"),
        "num_classes": len(classes),
        "class_names": list(classes),
        "epoch": 300,
        "state_dict": models[0].state_dict(),
    }
    if ema:
        checkpoint["state_dict_ema"] = models[1].state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / "best.pt")
    return models[-1]
