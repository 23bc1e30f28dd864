"""Export a model or its backbone to ONNX or torch.export, and compare the file with the model."""

import json
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import torch
from timm.models import get_model_input_config
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.export import Dim

from metaformer.errors import InputError, check_known, explained
from metaformer.mixers import Size
from metaformer.model import MetaFormer
from metaformer.provenance import write_file
from metaformer.weights import Opened

FORMATS = ("onnx", "torch-export")
TOLERANCE = 1e-4
"""Largest relative difference of float32 outputs (Euclidean norms) that is attributed to rounding."""
Exported = Callable[[Tensor], tuple[Tensor, ...]]


def export_opened(opened: Opened, to: str, target: Path, sides: list[int] | None, features: bool = False) -> str:
    """Export an opened checkpoint; returns the report of :func:`export`.

    Args:
        to: one of :data:`FORMATS`.
        sides: side, or height and width, of the images in pixels; ``None`` for the model's own.
        features: export the maps of the stages instead of the logits.

    Raises:
        InputError: the format is unknown, a package is missing, or the model cannot be exported for this size.
    """
    check_known("format", to, FORMATS)
    missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]
    if to == "onnx" and missing:
        raise InputError(f"to export to onnx, more packages are needed: pip install {' '.join(missing)}")
    size, model = chosen_size(sides, opened), opened.model
    if features and not isinstance(model, MetaFormer):
        raise InputError(f"{opened.name} is not a MetaFormer: export it without --features")
    model = FeatureGetterNet(model, out_indices=len(model.stages)).eval() if features else model
    facts = {"model": opened.name, "size": size, **opened.inputs, "class_names": opened.class_names}
    return export(model, size, to, target, json.dumps(facts))


def chosen_size(sides: list[int] | None, opened: Opened) -> Size:
    """Height and width from ``sides``, or else the model's own.

    Raises:
        InputError: there are more than two sides, or the model is made for another size.
    """
    if sides is None:
        return opened.size
    if len(sides) > 2:
        raise InputError(f"--size has {len(sides)} numbers: give the side, or height and width")
    model, size = opened.model, (sides[0], sides[-1])
    if getattr(model, "fixed_size", True) and size != opened.size:  # assumed of all models but MetaFormers
        why = "its layers fix the number of tokens" if isinstance(model, MetaFormer) else "it is not a MetaFormer"
        raise InputError(
            f"{opened.name} can be exported for its own {text(opened.size)} pixels only, because {why}: "
            "leave out --size"
        )
    return size


def text(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def export(model: nn.Module, size: Size, to: str, target: Path, facts: str = "{}") -> str:
    """Write ``model`` (in eval mode) to ``target``; returns a report of the input shapes and of the largest error.

    The batch size is dynamic, and so are height and width unless the model fixes them. torch.export treats maps of one
    position differently from larger ones. If the last map has a side of one, its file is for this ``size`` only.

    Args:
        facts: JSON that the file keeps under the name ``metaformer``.

    Raises:
        InputError: PyTorch cannot export the model, or the file cannot be written or computes something else.
    """
    backbone = model.model if isinstance(model, FeatureGetterNet) else model
    channels, stride, overlap = get_model_input_config(backbone)["input_size"][0], 1, False
    if isinstance(backbone, MetaFormer):
        stride, overlap = backbone.feature_info[-1]["reduction"], backbone.stem.kernel_size != backbone.stem.stride
    # Overlapping patch embeddings have a second position as soon as the image reaches over the first one.
    two_positions = stride + 3 if overlap else 2 * stride
    smallest = stride if to == "onnx" else two_positions
    varies = not getattr(backbone, "fixed_size", True) and min(size) >= smallest
    dims = {0: Dim("batch")}
    if varies:
        dims |= {2: Dim("height", min=two_positions), 3: Dim("width", min=two_positions)}
    # Neither the batch nor a side of the last map is one, since tracing would make such a dimension a constant.
    traced = tuple(max(side, 2 * stride) for side in size) if varies else size
    sizes = [size, (smallest, size[1] + 45)] if varies else [size]
    # A model is code, and PyTorch refuses what it cannot trace in many ways.
    with explained(f"PyTorch cannot export this {type(backbone).__name__} to {to}"):
        images = torch.randn(2, channels, *traced)
        content, exported = (onnx if to == "onnx" else torch_export)(model, images, dims, facts)
    draw = torch.Generator().manual_seed(0)
    tested = [torch.randn(batch, channels, *size, generator=draw) for size in sizes for batch in (1, 3)]
    with torch.inference_mode():
        errors = [largest_error(exported(images), as_tuple(model(images))) for images in tested]
    error = torch.tensor(errors).max().item()  # unlike Python's max(), this propagates NaN
    if not error <= TOLERANCE:
        raise InputError(f"the exported model differs from the model by {error:.1e} of its output: nothing written")
    write_file(target, content)
    takes = f"height, width) from {smallest} pixels a side" if varies else f"{size[0]}, {size[1]})"
    return (
        f"images (batch, {channels}, {takes}; largest relative error {error:.1e} with batches of 1 and 3 at "
        f"{' and '.join(map(text, sizes))} pixels"
    )


def onnx(model: nn.Module, images: Tensor, dims: dict[int, Dim], facts: str = "{}") -> tuple[bytes, Exported]:
    """The content of an ONNX file, and a function that runs it."""
    import onnxruntime

    outputs = [f"level{i}" for i in model.out_indices] if isinstance(model, FeatureGetterNet) else ["logits"]
    names = {"input_names": ["images"], "output_names": outputs}
    program = torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=(dims,), verbose=False, **names)
    proto = program.model_proto
    proto.metadata_props.add(key="metaformer", value=facts)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda given: tuple(map(torch.from_numpy, session.run(None, {"images": given.numpy()})))


def torch_export(model: nn.Module, images: Tensor, dims: dict[int, Dim], facts: str) -> tuple[bytes, Exported]:
    """The content of a file of ``torch.export.save``, and a function that runs it."""
    file = BytesIO()
    program = torch.export.export(model, (images,), dynamic_shapes=(dims,))
    torch.export.save(program, file, extra_files={"metaformer": facts})
    exported = torch.export.load(BytesIO(file.getvalue())).module()
    return file.getvalue(), lambda given: as_tuple(exported(given))


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def largest_error(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest |found - expected| / |expected| (Euclidean norms) of any tensor; NaN if any value is."""
    errors = [(value.float() - right).norm() / right.norm() for value, right in zip(found, expected, strict=True)]
    return torch.stack(errors).max().item()
