"""Export a trained model, or its backbone, to ONNX or torch.export; the file is compared with the model.

python classification/export.py RUN_FOLDER_OR_CHECKPOINT --to onnx|torch-export --out FILE
    [--model NAME] [--size SIDE | --size HEIGHT WIDTH] [--features]
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from torch import Tensor, nn
from torch.export import Dim

from metaformer.errors import InputError, nearest
from metaformer.formats import StateDict
from metaformer.mixers import Size
from metaformer.model import MetaFormer
from metaformer.training.config import check
from metaformer.training.model import build_model
from metaformer.training.validation import locate
from metaformer.weights import HF_FILES, load_state, read_checkpoint, weights_of
from metaformer.weights.__main__ import build

FORMATS = ("onnx", "torch-export")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
BATCHES = (1, 3)

Exported = Callable[[Tensor], tuple[Tensor, ...]]


class Levels(nn.Module):
    """The backbone alone: images (B, in_chans, H, W) to the stages' maps (B, C, H/4, W/4), (B, C, H/8, W/8), ..."""

    def __init__(self, model: MetaFormer):
        super().__init__()
        model.prune_intermediate_layers(len(model.stages), prune_norm=True)
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.forward_intermediates(images, intermediates_only=True))


def load(source: Path, name: str | None) -> tuple[nn.Module, str, Size]:
    """The model in ``source`` in eval mode, its name, and the height and width of its images.

    Args:
        source: the folder of a run, a checkpoint of one, or what :func:`metaformer.weights.read_checkpoint` reads.
        name: the model's; ``None`` if the checkpoint says.

    Raises:
        InputError: no such checkpoint, or one of another model or of one that nothing names.
    """
    if source.is_dir() and not any((source / file).is_file() for file in HF_FILES):
        source = locate(source)
    checkpoint = read_checkpoint(source)
    settings = checkpoint.get("config")
    if not isinstance(settings, dict):
        if name is None:
            raise InputError(f"{source} does not say what model it is of: give --model poolformer_s12 or another")
        model = build(name, weights_of(checkpoint), source)
        return model, name, tuple(model.pretrained_cfg["input_size"][1:])
    config = check({**settings, "pretrained": False, "checkpoint": None}, source=str(source))
    if name not in (None, config.model):
        raise InputError(f"{source} is a checkpoint of {config.model}, not of {name}: leave out --model")
    weights = weights_of(checkpoint, ema=config.ema_decay > 0)
    model = build_model(config, classes(config.model, weights, source))
    load_state(model, weights, str(source))
    size = config.model_args.get("img_size", config.img_size)
    return model.eval(), config.model, (size, size) if isinstance(size, int) else tuple(size)


def classes(name: str, weights: StateDict, source: Path) -> int:
    if not timm.is_model(name):
        raise InputError(f"there is no model {name!r}{nearest(name, timm.list_models())}")
    classifier = f"{timm.get_pretrained_cfg(name).classifier}.weight"
    if classifier not in weights:
        raise InputError(f"{source} has no classifier {classifier}: only whole models are exported")
    return len(weights[classifier])


def fixes_size(model: nn.Module) -> bool:
    """Whether images can be of one size only; of other architectures than MetaFormer nothing is known."""
    return not isinstance(model, MetaFormer) or any(
        isinstance(getattr(module, "size", None), tuple) for module in model.modules()
    )


def chosen_size(sides: list[int] | None, own: Size, model: nn.Module, name: str) -> Size:
    """Height and width of --size, or else the model's own.

    Raises:
        InputError: neither one side nor two, fewer pixels than a position of the last map has, or another size than the
            one that the model is made for.
    """
    if sides is None:
        return own
    if len(sides) > 2:
        raise InputError(f"--size has {len(sides)} numbers: give the side, or height and width")
    size = (sides[0], sides[-1])
    if fixes_size(model) and size != own:
        why = "its layers fix the number of tokens" if isinstance(model, MetaFormer) else "it is not a MetaFormer"
        raise InputError(f"{name} can be exported for its own {text(own)} pixels only, because {why}: leave out --size")
    smallest = stride(model)
    if isinstance(model, MetaFormer) and min(size) < smallest:
        raise InputError(f"--size {text(size)} is too small: {name} takes images from {smallest} pixels a side upwards")
    return size


def stride(model: nn.Module) -> int:
    return model.feature_info[-1]["reduction"] if isinstance(model, MetaFormer) else 32


def text(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def write_onnx(model: nn.Module, images: Tensor, dims: dict[int, Dim], outputs: list[str], path: Path) -> None:
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=(dims,),
        input_names=["images"],
        output_names=outputs,
        verbose=False,
    )
    program.save(path, external_data=False)


def read_onnx(path: Path) -> Exported:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: tuple(torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()}))


def write_torch_export(model: nn.Module, images: Tensor, dims: dict[int, Dim], path: Path) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=(dims,))
    with path.open("wb") as file:  # given a name, torch insists on .pt2
        torch.export.save(program, file)


def read_torch_export(path: Path) -> Exported:
    with path.open("rb") as file:
        exported = torch.export.load(file).module()
    return lambda images: as_tuple(exported(images))


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@torch.inference_mode()
def largest_error(exported: Exported, model: nn.Module, channels: int, sizes: list[Size]) -> float:
    """Largest |exported - model| / |model| (Euclidean norms) of any output, on random images."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for size in sizes:
        for batch in BATCHES:
            images = torch.randn(batch, channels, *size, generator=generator)
            pairs = zip(exported(images), as_tuple(model(images)), strict=True)
            errors += [(value - reference).norm() / reference.norm() for value, reference in pairs]
    return torch.stack(errors).max().item()  # unlike max(), it lets nothing pass that is not a number


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``target`` when the block ends without an error, and goes when it does not.

    Raises:
        InputError: it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
            path = Path(folder) / target.name
            yield path
            path.replace(target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error


def export(model: nn.Module, size: Size, to: str, target: Path) -> str:
    """Write ``model`` (in eval mode) to ``target``, compare the file with it, and say what it takes and how it differs.

    The batch can vary, height and width unless the model fixes them. torch.export tells maps of one position from
    larger ones: for images so small that the last map has a side of one, its file is for this ``size`` only.

    Raises:
        InputError: the file cannot be written, or what it holds computes something else.
    """
    backbone = model.model if isinstance(model, Levels) else model
    channels = backbone.in_chans if isinstance(backbone, MetaFormer) else 3
    two_positions = stride(backbone) + 3
    smallest = stride(backbone) if to == "onnx" else two_positions
    varies = not fixes_size(backbone) and min(size) >= smallest
    dims = {0: Dim("batch")}
    if varies:
        dims |= {2: Dim("height", min=two_positions), 3: Dim("width", min=two_positions)}
    # Neither a batch nor a side of one may be taken for a constant.
    traced = tuple(max(side, 2 * stride(backbone)) for side in size) if varies else size
    images = torch.randn(2, channels, *traced)
    sizes = [size, (smallest, size[1] + 45)] if varies else [size]
    with beside(target) as path:
        if to == "onnx":
            levels = [f"level{i}" for i in range(len(backbone.stages))] if isinstance(model, Levels) else ["logits"]
            write_onnx(model, images, dims, levels, path)
            exported = read_onnx(path)
        else:
            write_torch_export(model, images, dims, path)
            exported = read_torch_export(path)
        error = largest_error(exported, model, channels, sizes)
        if not error <= TOLERANCE:
            raise InputError(f"the exported model differs from the model by {error:.1e} of its output: nothing written")
    takes = (
        f"(batch, {channels}, height, width) from {smallest} pixels a side"
        if varies
        else (f"(batch, {channels}, {size[0]}, {size[1]})")
    )
    return (
        f"images {takes}; largest relative error {error:.1e} with batches of {' and '.join(map(str, BATCHES))} "
        f"at {' and '.join(map(text, sizes))} pixels"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path, help="folder of a run, or a checkpoint of any known format")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--model", metavar="NAME", help="what the weights are of, if the checkpoint does not say")
    parser.add_argument("--size", type=int, nargs="+", metavar="SIDE", help="side, or height and width, of the images")
    parser.add_argument("--features", action="store_true", help="the backbone: maps level0, level1, ... and no logits")
    options = parser.parse_args()
    if options.to not in FORMATS:
        raise InputError(
            f"there is no format {options.to!r}{nearest(options.to, FORMATS)}: there are {', '.join(FORMATS)}"
        )
    missing = [package for package in ONNX_PACKAGES if find_spec(package) is None]
    if options.to == "onnx" and missing:
        raise InputError(f"to export to onnx, more packages are needed: pip install {' '.join(missing)}")
    model, name, own = load(options.source, options.model)
    size = chosen_size(options.size, own, model, name)
    if options.features:
        if not isinstance(model, MetaFormer):
            raise InputError(f"{name} is not a MetaFormer: export it without --features")
        model = Levels(model).eval()
    print(f"{name} -> {options.out} ({options.to}): {export(model, size, options.to, options.out)}")
