"""The contestants of a benchmark: forms of the same model with the same weights and images, in different runtimes.

This package has three forms: the equations as printed (``plain``), computed in fewer passes over memory (``fused``),
and with the norms folded into the weights for inference (``folded``). timm and transformers have classes for the
PoolFormers. PyTorch runs a form ``eager`` or ``compiled``; onnxruntime and openvino run its ONNX file on a CPU.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import timm
import timm.models.metaformer
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metaformer
from metaformer import export
from metaformer.errors import InputError
from metaformer.formats import StateDict
from metaformer.mixers import Size
from metaformer.model import MetaFormer
from metaformer.variants import variant_arguments

OURS, OTHERS = ("plain", "fused", "folded"), ("timm", "transformers")
BEST = {"inference": "folded", "training": "fused"}
"""Our fastest form for each task."""
TASKS = ("inference", "training")
EXPORTED = ("onnxruntime", "openvino")
RUNTIMES = ("eager", "compiled", *EXPORTED)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = dict.fromkeys(("float32", "tf32", "mkldnn_bf16"), torch.float32)
DTYPES |= {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Type of maps and products by precision. tf32 and mkldnn_bf16 round the factors of float32 products."""
PRECISIONS = {"cpu": ("float32", "bfloat16", "mkldnn_bf16"), "cuda": ("float32", "tf32", "bfloat16", "float16")}
TOLERANCES = {"float32": 1e-4, "tf32": 0.01, "float16": 0.01, "bfloat16": 0.05, "mkldnn_bf16": 0.05}
"""Largest relative error of logits and gradient up to which a contestant computes the same as the plain form."""
SEED = 0


class Cell(NamedTuple):
    """The task, model and batch that the contestants of one comparison share."""

    task: str
    model: str
    batch: int
    size: Size
    precision: str
    device: str
    """``cpu`` or ``cuda``."""

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.task} of {self.model}, {self.batch} x {height} x {width}, {self.precision}"


class Entry(NamedTuple):
    """The fields in which the contestants of a comparison differ."""

    form: str
    runtime: str
    memory_format: str


class Given(NamedTuple):
    """The weights and the batch, which are the same for all contestants."""

    weights: StateDict  # of the plain form
    images: Tensor
    labels: Tensor


class Contestant(NamedTuple):
    """A form of the model in a runtime, ready for its task on a batch."""

    entry: Entry
    model: nn.Module | None  # not compiled, in the mode of the task; None in a runtime other than PyTorch
    forward: Callable[[], Tensor]  # returns the logits of the batch, (B, 1000)
    call: Callable[[], Tensor]  # the call that is timed: returns the logits in inference, the loss in training

    @property
    def training(self) -> bool:
        return self.model is not None and self.model.training

    def outputs(self) -> list[Tensor]:
        """The logits and, in training, the gradient of the stem's weight."""
        if not self.training:
            return [self.call()]
        logits = self.forward().detach()
        self.call()
        return [logits, stem_of(self.model).grad]


def entries(task: str, model: str, forms: list[str] | None, runtimes: list[str], layouts: list[str]) -> list[Entry]:
    """Every different contestant of a model in a task, of the given forms or all.

    A file has one layout and no fused form. Folded models and files do inference only.

    Raises:
        InputError: the model or a form of it does not exist, or no such contestant can do the task.
    """
    variant_arguments(model)
    known = OURS + OTHERS if model in metaformer.POOLFORMERS else OURS
    if wrong := [form for form in forms or () if form not in known]:
        raise InputError(f"{wrong[0]} has no {model}: use the forms {', '.join(known)}")
    found = {}
    for form, runtime, layout in product(known, runtimes, layouts):
        is_file = runtime in EXPORTED
        able = {"inference": not (is_file and form == "fused"), "training": not (is_file or form == "folded")}
        if able[task] and form in (forms or known):
            found[Entry(form, runtime, "contiguous" if is_file else layout)] = None
    if not found:
        raise InputError(f"no contestant does {task}: folded models and files need --tasks inference; no file is fused")
    return list(found)


@lru_cache(maxsize=1)
def given(cell: Cell) -> Given:
    """Weights and a random batch, from a fixed seed.

    All vectors are random, since layer scales of 1e-5 would hide what a block computes from the comparison of outputs.
    """
    torch.manual_seed(SEED)
    weights = ours(cell, fused=False).state_dict()
    for tensor in weights.values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.add_(torch.rand_like(tensor) / 2)
    images = torch.randn(cell.batch, 3, *cell.size)
    return Given(weights, images.to(cell.device), torch.randint(1000, (cell.batch,)).to(cell.device))


def build(form: str, memory_format: str, cell: Cell) -> nn.Module:
    """A form of the model in the mode of the task; raises ``InputError`` if ``folded`` has nothing to fold."""
    weights = given(cell).weights
    if form == "timm":
        model = getattr(timm.models.metaformer, cell.model)()
        model.load_state_dict(metaformer.convert(weights, "timm"))
    elif form == "transformers":
        from transformers import PoolFormerConfig, PoolFormerForImageClassification  # the import takes seconds

        arguments = variant_arguments(cell.model)
        config = PoolFormerConfig(depths=arguments["depths"], hidden_sizes=arguments["dims"], num_labels=1000)
        model = PoolFormerForImageClassification(config)
        model.load_state_dict(metaformer.convert(weights, "hf"))
    else:
        model = ours(cell, fused=form != "plain")
        model.load_state_dict(weights)
    model.to(cell.device, memory_format=LAYOUTS[memory_format]).train(cell.task == "training")
    return metaformer.fuse(model) if form == "folded" else model


def ours(cell: Cell, fused: bool) -> MetaFormer:
    return timm.create_model(cell.model, img_size=cell.size, fused=fused)


def stem_of(model: nn.Module) -> nn.Parameter:
    return next(parameter for parameter in model.parameters() if parameter.ndim == 4)


def contestant(entry: Entry, cell: Cell) -> Contestant:
    """Build a contestant.

    Raises:
        InputError: the runtime does not have the precision or the device.
        ImportError: a package is missing.
    """
    if entry.runtime in EXPORTED:
        call = exported(entry, cell)
        return Contestant(entry, None, call, call)
    if cell.precision == "mkldnn_bf16" and not has_bfloat16():
        raise InputError("oneDNN has no bfloat16 products on this processor")
    model = build(entry.form, entry.memory_format, cell)
    images = given(cell).images.to(memory_format=LAYOUTS[entry.memory_format])
    network = torch.compile(model) if entry.runtime == "compiled" else model

    def forward() -> Tensor:
        with cell.autocast():
            output = network(images)
        return output if isinstance(output, Tensor) else output.logits  # transformers returns named outputs

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(forward().float(), given(cell).labels)
        loss.backward()
        return loss.detach()

    return Contestant(entry, model, forward, step if model.training else torch.no_grad()(forward))


def has_bfloat16() -> bool:
    """Whether oneDNN multiplies in bfloat16 on this processor."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def exported(entry: Entry, cell: Cell) -> Callable[[], Tensor]:
    """A function that runs the ONNX file of a form, with as many threads as PyTorch."""
    runtime, half = entry.runtime, cell.precision != "float32"
    if cell.device != "cpu":
        raise InputError(f"{runtime} is timed on a CPU only")
    if half and runtime == "onnxruntime":
        raise InputError("onnxruntime has no bfloat16 for these operators on a CPU")
    images, threads = given(cell).images.numpy(), torch.get_num_threads()
    content = onnx(entry.form, cell)
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # not while the next contestant runs
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return lambda: torch.from_numpy(session.run(None, {"images": images})[0])
    import openvino

    precision = openvino.Type.bf16 if half else openvino.Type.f32
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    core = openvino.Core()
    network = core.compile_model(core.read_model(content), "CPU", settings)
    if network.get_property("INFERENCE_PRECISION_HINT") != precision:
        raise InputError(f"openvino has no {precision.get_type_name()} on this processor")
    request = network.create_infer_request()
    return lambda: torch.from_numpy(request.infer([images], share_inputs=True, share_outputs=True)[0])


@lru_cache(maxsize=1)
def onnx(form: str, cell: Cell) -> bytes:
    """The ONNX file of a form for the images of the cell alone."""
    return export.onnx(build(form, "contiguous", cell), given(cell).images, {})[0]


@lru_cache(maxsize=len(OURS + OTHERS))
def reference(form: str, cell: Cell) -> list[Tensor]:
    """The expected :meth:`Contestant.outputs` of ``form``, from the maps of the plain form in float32.

    timm's head averages before the norm and not after it, so its logits differ from the plain form's.
    """
    plain = build("plain", "contiguous", cell)
    head = build("timm", "contiguous", cell) if form == "timm" else plain
    with torch.set_grad_enabled(plain.training):
        logits = head.forward_head(plain.forward_features(given(cell).images))
    if not plain.training:
        return [logits]
    F.cross_entropy(logits, given(cell).labels).backward()
    return [logits.detach(), stem_of(plain).grad]
