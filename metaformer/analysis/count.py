"""Count the parameters and multiply-accumulates (MACs) of a model, by operator and by part."""

import hashlib
import json
import math
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from accelerate import init_empty_weights
from timm.layers import to_ntuple
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from metaformer.analysis import baselines  # noqa: F401  (registers models of Table 2)
from metaformer.errors import InputError
from metaformer.mixers import Size
from metaformer.provenance import installed, write_json
from metaformer.weights.opener import create

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # fvcore's import uses it
    from fvcore.nn import FlopCountAnalysis

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "analysis/.cache"
DEFAULT_SIZES = {"mmdet": (800, 1280), "mmseg": (512, 512)}
"""Height and width at which detectors and segmentors are counted, as in get_flops.py of the toolboxes."""
PROPOSALS, MASKS = 1000, 100
"""Boxes and masks in the second stage of a counted detector, as in mmdet's get_flops.py."""
DEVICE = "meta" if TorchVersion(torch.__version__) >= "2.14" else "cpu"
"""Where models are traced. Operators on the meta device compute shapes only. PyTorch 2.11 cannot trace convolutions
there."""
COUNTED = (
    "the model must take images of this size and compute its outputs from them alone, and the second stage of a "
    "detector must be that of Faster or Mask R-CNN"
)


def count(model: str, size: Size | None = None) -> dict[str, Any]:
    """Count a model in evaluation mode on one image.

    fvcore counts the MACs, as in version 3 of the paper: one for each multiplication with its addition, and 5 for each
    element of a norm with weight and bias (2 for a batch norm). fvcore does not know fused attention, which is counted
    as its two matrix products.

    Args:
        model: timm's name of a model, or the path of a config of mmdet or mmseg.
        size: height and width of the image in pixels; ``None`` for the model's own.

    Returns:
        dict: ``size``; ``learnable`` and ``frozen`` parameters; ``layer_scale``, the number in LayerScale; ``macs`` by
        operator; ``parts``, the parameters and MACs of each part; ``uncounted``, the number of calls of operators that
        fvcore does not count. fvcore ignores shapes, copies, ReLU and dropout, and does not list them.

    Raises:
        InputError: the model or config does not exist or does not take this size, or the model of a config needs more
            than images or has other second stages than Faster and Mask R-CNN.
    """
    network, (channels, *size) = build_config(model, size) if model.endswith(".py") else build_timm(model, size)
    analysis = FlopCountAnalysis(network.eval().to(DEVICE), torch.zeros(1, channels, *size, device=DEVICE))
    analysis.set_op_handle(*ATTENTION)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    try:
        with traceable():
            by_operator, by_module = analysis.by_operator(), analysis.by_module()
            uncounted = analysis.unsupported_ops()
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise InputError(f"cannot count {model} at {size[0]} x {size[1]} pixels: {COUNTED} ({reason})") from error
    named = dict(network.named_parameters())
    return {
        "size": size,
        "learnable": sum(p.numel() for p in named.values() if p.requires_grad),
        "frozen": sum(p.numel() for p in named.values() if not p.requires_grad),
        "layer_scale": sum(p.numel() for name, p in named.items() if "layer_scale" in name),
        "macs": {operator: int(macs) for operator, macs in by_operator.most_common()},
        "parts": {
            name: {"parameters": sum(p.numel() for p in part.parameters()), "macs": int(by_module[name])}
            for name, part in parts(network)
        },
        "uncounted": {name.removeprefix("aten::"): times for name, times in uncounted.most_common()},
    }


def cached_count(model: str) -> dict[str, Any]:
    """:func:`count` at the model's own size, cached until the model's definition or a library changes."""
    path = CACHE / f"{definition(model)}.json"
    if path.is_file():
        return json.loads(path.read_text())
    counted = count(str(ROOT / model) if model.endswith(".py") else model)
    write_json(path, counted)
    return counted


def definition(model: str) -> str:
    """A digest of all inputs of a count: the source of the models and of this file, the config, and the libraries."""
    files = [*ROOT.glob("metaformer/*.py"), *ROOT.glob("metaformer/mm/*.py")]
    files += [ROOT / "metaformer/analysis/count.py", ROOT / "metaformer/analysis/baselines.py"]
    if model.endswith(".py"):
        files += [ROOT / model, *(ROOT / model).parent.glob("_base_/*.py")]
    digest = hashlib.sha256(model.encode())
    digest.update(json.dumps(installed()).encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:24]


def size_of(given: list[int]) -> Size:
    """Height and width from one side or both; raises ``InputError`` for other numbers."""
    if len(given) > 2 or min(given) < 1:
        raise InputError(f"--size {' '.join(map(str, given))}: give one side or height and width, in pixels")
    return given[0], given[-1]


def build_timm(name: str, size: Size | None) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model, and the channels, height and width of its images."""
    try:
        with uninitialised():
            network = create(name, None, {})
    except InputError:  # of a model that computes with its weights as it is built
        network = create(name, None, {})
    settings = timm.get_pretrained_cfg(name) or PretrainedCfg()  # a model of a user may have none
    if size and settings.fixed_input_size:
        network = create(name, None, {"img_size": size})
    channels, *own = settings.input_size
    return network, (channels, *(size or own))


def uninitialised() -> AbstractContextManager:
    """Build models on the meta device if they are traced there, since initialisation then takes no time."""
    return init_empty_weights() if DEVICE == "meta" else nullcontext()


def build_config(path: str, size: Size | None) -> tuple[nn.Module, tuple[int, int, int]]:
    # Imported here, because counting classifiers does not need the toolboxes.
    from metaformer.mm.config import build_model, read_config

    config = read_config(path, DEFAULT_SIZES)
    with uninitialised():
        model = build_model(config)
    if hasattr(model, "roi_head"):
        model.forward = partial(two_stages, model)
    return model, (3, *(size or DEFAULT_SIZES[config.default_scope]))


def two_stages(detector: nn.Module, images: Tensor) -> Any:
    """The forward pass of a two-stage detector with a fixed number of boxes and without RoIAlign."""
    levels, heads = detector.extract_feat(images), detector.roi_head
    outputs = [detector.rpn_head(levels)]
    for number, kind in ((PROPOSALS, "bbox"), (MASKS, "mask")):
        if getattr(heads, f"with_{kind}"):
            extractor = getattr(heads, f"{kind}_roi_extractor")
            regions = images.new_zeros(number, extractor.out_channels, *extractor.roi_layers[0].output_size)
            outputs.append(getattr(heads, f"{kind}_head")(regions))
    return outputs


def parts(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and parts of a network in order; backbones and lists of stages, layers or blocks are split further."""
    for name, module in network.named_children():
        if any(True for _ in module.parameters()):
            opened = parts(module) if name in ("backbone", "stages", "layers", "blocks", "roi_head") else ()
            inner = [(f"{name}.{inside}", part) for inside, part in opened]
            yield from inner or [(name, module)]


def attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """MACs of queries times keys and of weights times values, all (..., positions, channels).

    Keys and values may have one head for several of the queries.
    """
    *heads, queries, values = outputs[0].type().sizes()
    *_, keys, channels = inputs[1].type().sizes()
    return math.prod(heads) * queries * keys * (channels + values)


ATTENTION = ("aten::scaled_dot_product_attention", attention_macs)


@contextmanager
def traceable() -> Iterator[None]:
    """Replace functions that PyTorch or fvcore cannot trace.

    Convolutions are called by the operator that a trace records, since PyTorch cannot trace ``F.conv2d`` on the meta
    device. Attention is traced in its parts, since fvcore does not know the operator that computes it at once.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    traced = {f"conv{dims}d": convolution for dims in (1, 2, 3)}
    traced |= {f"conv_transpose{dims}d": transposed_convolution for dims in (1, 2, 3)}
    try:
        with torch.no_grad(), patch.multiple(F, **traced):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def convolution(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, transposed=False, output_padding=0):
    """``F.conv1d``, ``F.conv2d`` and ``F.conv3d``; with ``transposed``, ``F.conv_transpose1d`` and so on."""
    per_side = to_ntuple(weight.ndim - 2)
    if padding == "same":
        reach = [step * (side - 1) for step, side in zip(per_side(dilation), weight.shape[2:], strict=True)]
        x = F.pad(x, [pad for total in reversed(reach) for pad in (0, total)])  # for the shape, any side will do
    padding = per_side(0 if isinstance(padding, str) else padding)
    geometry = (per_side(stride), padding, per_side(dilation), transposed, per_side(output_padding))
    return torch._convolution(x, weight, bias, *geometry, groups, *[False] * 4)


def transposed_convolution(x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    return convolution(x, weight, bias, stride, padding, dilation, groups, True, output_padding)
