"""Speed and memory of a model here, of timm's and transformers' classes of it, and what the machine allows at most.

python analysis/benchmark.py [MODEL] [--forms FORM...] [--tasks TASK...] [--compile] [--batch N] [--size PIXELS...]
    [--precision P] [--memory-format F] [--device D] [--rounds N] [--record FILE]

Forms are ours as the equations are printed (plain), in fewer passes over memory (fused) and for inference alone
(folded), and, for the five PoolFormers, timm's and transformers' classes. All have the same weights and images and take
turns in every round, each time in another order, and are compared round by round. --compile adds each form under
torch.compile.

Inference is the model in eval mode without gradient. Training is a step without its optimiser: forward, cross-entropy
and backward in train mode, without drop path. The bytes saved are those of all tensors that autograd keeps from the
model's forward pass, each storage once, without parameters and buffers; images count, and so do copies of weights
(autocast's, or those that a compiled step makes), which a larger batch shares among more images. Peak memory (CUDA) is
the most that a call allocates beyond what is there before it: weights are, gradients are not.

float32 is float32 throughout; tf32 lets both convolutions and matrix products round to TensorFloat-32, where PyTorch by
itself would let convolutions alone. bfloat16 and float16 are autocast's.

The floor is what a batch would take if nothing but the unavoidable were done, at the rates of the same machine:
multiply-accumulates over the rate of large matrix products, or bytes over the bandwidth of a large copy, whichever is
longer. Multiply-accumulates are those of analysis/count.py without the norms', three times as many in training. Bytes
in inference: every block and every convolution outside of blocks reads its input and writes its output once, the head
reads its input, and the weights are read once. In training the backward pass reads each input and each output's
gradient, writes each input's gradient (the images have none), reads the weights again and writes their gradients. Maps
are taken in the precision's bytes, weights in four. Maps that stay in a cache can be faster than this.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import timm
import timm.models.metaformer
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from tqdm import tqdm

import metaformer
from metaformer.analysis.count import count
from metaformer.analysis.tables import NOTHING, SETTING, in_short, markdown, speed_rows
from metaformer.errors import InputError, nearest
from metaformer.formats import StateDict
from metaformer.mixers import Size
from metaformer.model import MetaFormer, size_after
from metaformer.provenance import provenance, write_json
from metaformer.records import Benchmark
from metaformer.variants import variant_arguments

T = TypeVar("T")
OURS, OTHERS = ("plain", "fused", "folded"), ("timm", "transformers")
TASKS = ("inference", "training")
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DEVICES = ("cpu", "cuda")
MATRIX = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices whose product is timed."""
COPIED = {"cpu": 2**28, "cuda": 2**31}
"""Bytes of the buffer whose copy is timed: many times a cache."""
REPEATS = 10
"""The best of so many is the machine's rate."""
WARM_UP = 3
SHORTEST = 0.2
"""Seconds that a contestant's turn takes at least, as many calls as that needs."""
SEED = 0


class Settings(NamedTuple):
    model: str
    batch: int
    size: Size
    precision: str
    memory_format: str
    device: torch.device
    rounds: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


class Entrant(NamedTuple):
    """A form of the model, eager or compiled, ready for its task on a batch."""

    form: str
    compiled: bool
    model: nn.Module
    """In the mode of the task; not compiled."""
    forward: Callable[[], Tensor]
    """The batch's logits, (B, 1000)."""
    call: Callable[[], Tensor]
    """What is timed: gives the logits (inference) or the loss (training)."""

    def __str__(self) -> str:
        return f"{self.form} ({'compiled' if self.compiled else 'eager'})"


# The contestants


def build(form: str, settings: Settings, weights: StateDict) -> nn.Module:
    """A form of the model with ``weights``, on the device and in the memory format.

    Raises:
        InputError: ``folded`` of a model that has nothing to fold.
    """
    if form == "timm":
        model = getattr(timm.models.metaformer, settings.model)()
        model.load_state_dict(metaformer.convert(weights, "timm"))
    elif form == "transformers":
        model = of_transformers(settings.model)
        model.load_state_dict(metaformer.convert(weights, "hf"))
    else:
        model = ours(settings, fused=form != "plain")
        model.load_state_dict(weights)
    model.to(settings.device, memory_format=LAYOUTS[settings.memory_format])
    return metaformer.fuse(model) if form == "folded" else model


def ours(settings: Settings, fused: bool) -> MetaFormer:
    return timm.create_model(settings.model, img_size=settings.size, fused=fused)


def of_transformers(name: str) -> nn.Module:
    from transformers import PoolFormerConfig, PoolFormerForImageClassification  # takes seconds

    arguments = variant_arguments(name)
    config = PoolFormerConfig(depths=arguments["depths"], hidden_sizes=arguments["dims"], num_labels=1000)
    return PoolFormerForImageClassification(config)


def entrants(forms: list[str], modes: list[bool], task: str, settings: Settings) -> list[Entrant]:
    """Every form that does the task, eager and (``True`` in ``modes``) compiled, on the same weights and images."""
    torch.manual_seed(SEED)
    weights = ours(settings, fused=False).state_dict()
    images = torch.randn(settings.batch, 3, *settings.size)
    images = images.to(settings.device, memory_format=LAYOUTS[settings.memory_format])
    labels = torch.randint(1000, (settings.batch,)).to(settings.device)
    models = {form: build(form, settings, weights) for form in forms if form != "folded" or task == "inference"}
    return [
        entrant(form, compiled, model.train(task == "training"), images, labels, settings)
        for form, model in models.items()
        for compiled in modes
    ]


def entrant(form: str, compiled: bool, model: nn.Module, images: Tensor, labels: Tensor, settings: Settings) -> Entrant:
    network = torch.compile(model) if compiled else model

    def forward() -> Tensor:
        with settings.autocast():
            output = network(images)
        return output if isinstance(output, Tensor) else output.logits  # transformers' come with a name

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(forward().float(), labels)
        loss.backward()
        return loss.detach()

    return Entrant(form, compiled, model, forward, step if model.training else torch.no_grad()(forward))


# Measuring


def measure(forms: list[str], modes: list[bool], task: str, settings: Settings) -> list[dict[str, Any]]:
    """Seconds of a call in each round, and memory, of every contestant (``records.Contestant``).

    Raises:
        InputError: a contestant runs out of memory, or gives what is no number; names it.
    """
    torch.compiler.reset()  # else the forms of the task before count towards the limit of recompilations
    with naming_who_lacks_memory(task):
        entered = entrants(forms, modes, task, settings)
    results = []
    for entrant in tqdm(entered, desc=f"{task}: warm-up", unit="contestant", disable=None):
        with naming_who_lacks_memory(f"{task} of {entrant}"):
            results.append(warm_up(entrant, settings))
    for i in tqdm(range(settings.rounds), desc=task, unit="round", disable=None):
        for entrant, result in rotated(list(zip(entered, results, strict=True)), i):
            with naming_who_lacks_memory(f"{task} of {entrant}"):
                result["seconds"].append(seconds_of(entrant.call, result["calls"], settings.device))
    return results


def rotated(items: list[T], by: int) -> list[T]:
    by %= len(items)
    return items[by:] + items[:by]


def warm_up(entrant: Entrant, settings: Settings) -> dict[str, Any]:
    """A contestant's entry in the record, no round timed yet; this is where it is compiled."""
    device, training = settings.device, entrant.model.training
    freezes = entrant.compiled and not training and device.type == "cpu"
    with inductor.patch(freezing=True) if freezes else nullcontext():
        first, *_, seconds = (seconds_of(entrant.call, 1, device) for _ in range(WARM_UP))
    if not torch.isfinite(entrant.call()).all():
        raise InputError(f"{entrant} gives what is no number in {settings.precision}: use another --precision")
    return {
        "form": entrant.form,
        "compiled": entrant.compiled,
        "first_call_s": first,
        "calls": math.ceil(SHORTEST / seconds),
        "seconds": [],
        "saved_bytes_per_image": saved_bytes(entrant) / settings.batch if training else None,
        "peak_bytes": peak_bytes(entrant, device) if device.type == "cuda" else None,
    }


@contextmanager
def naming_who_lacks_memory(who: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):  # of a CPU
            raise
        raise InputError(f"there is not enough memory for {who}: use a smaller --batch or --size") from error


def seconds_of(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Mean seconds of so many calls in a row, the device's work done."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(entrant: Entrant) -> int:
    """Bytes that autograd keeps from a forward pass: each storage once, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in chain(entrant.model.parameters(), entrant.model.buffers())}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = entrant.forward()
    del logits  # until here they held all that is kept: no address was used twice
    return sum(kept.values())


def peak_bytes(entrant: Entrant, device: torch.device) -> int:
    """The most memory of the GPU that a call allocates beyond what is there before it."""
    entrant.model.zero_grad(set_to_none=True)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    entrant.call()
    return torch.cuda.max_memory_allocated(device) - before


# The floor


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply-accumulates per second of a large matrix product, by the fastest library that PyTorch has for it."""
    side = MATRIX[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    products = [lambda: torch.mm(left, right)]
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""))
    return side**3 / min(seconds_of(product, 1, device) for product in products for _ in range(REPEATS))


def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy."""
    source, target = (torch.ones(COPIED[device.type], dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * source.numel() / min(seconds_of(lambda: target.copy_(source), 1, device) for _ in range(REPEATS))


def floor(task: str, settings: Settings, counted: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """MACs and bytes of a batch, and the seconds that they take, as at the top of this file.

    Args:
        counted: what :func:`count.count` gives for the model.
        rates: the machine's ``macs_per_s`` and ``bytes_per_s``.
    """
    images = 3 * math.prod(settings.size)
    read, written = elements(ours(settings, fused=False), settings.size)
    training = task == "training"
    elements_of_image = 3 * read - images + 2 * written if training else read + written
    weights = (3 if training else 1) * (counted["learnable"] + counted["frozen"])
    macs = (3 if training else 1) * settings.batch * products(counted)
    moved = settings.batch * settings.dtype.itemsize * elements_of_image + 4 * weights
    return {
        "macs": macs,
        "bytes": moved,
        "seconds": max(macs / rates["macs_per_s"], moved / rates["bytes_per_s"]),
    }


def elements(model: MetaFormer, size: Size) -> tuple[int, int]:
    """Elements that convolutions, blocks and head read, and that convolutions and blocks write, for an image."""
    channels, read, written = model.in_chans, 0, 0
    for layer in [model.stem, *chain.from_iterable((stage.downsample, *stage.blocks) for stage in model.stages)]:
        if isinstance(layer, nn.Identity):
            continue
        read += channels * math.prod(size)
        if isinstance(layer, nn.Conv2d):
            channels, size = layer.out_channels, size_after(layer, size)
        written += channels * math.prod(size)
    return read + channels * math.prod(size), written


def products(counted: dict[str, Any]) -> int:
    """The multiply-accumulates of a count that are those of matrix products and convolutions."""
    return sum(macs for operator, macs in counted["macs"].items() if not operator.endswith("_norm"))


# The command


def benchmark(forms: list[str], modes: list[bool], tasks: list[str], settings: Settings) -> dict[str, Any]:
    """The record of a benchmark (``records.Benchmark``)."""
    start = provenance()
    device = settings.device
    counted = count(settings.model, settings.size)
    torch.backends.cudnn.benchmark = True  # as training here
    tf32 = settings.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    rates = {"macs_per_s": matrix_rate(settings.dtype, device), "bytes_per_s": bandwidth(device)}
    return {
        "kind": "benchmark",
        "model": settings.model,
        "settings": {
            "batch": settings.batch,
            "size": list(settings.size),
            "precision": settings.precision,
            "memory_format": settings.memory_format,
            "device": device.type,
            "rounds": settings.rounds,
            "seed": SEED,
        },
        "rates": rates,
        "tasks": [
            {
                "task": task,
                "floor": floor(task, settings, counted, rates),
                "contestants": measure(forms, modes, task, settings),
            }
            for task in tasks
        ],
        **start,
    }


def report(record: Benchmark) -> str:
    rates = record.rates
    lines = [
        f"{record.model}, {in_short(record)}, on {record.device}; {record.settings.rounds} rounds",
        f"  products {rates.macs_per_s / 1e9:,.1f} GMAC/s, copies {rates.bytes_per_s / 1e9:,.1f} GB/s",
    ]
    for timed in record.tasks:
        bottom = timed.floor
        milliseconds = ", ".join(
            f"{1000 * value / rate:,.2f} ms for {value / 1e9:,.2f} {unit}"
            for value, rate, unit in (
                (bottom.macs, rates.macs_per_s, "GMACs"),
                (bottom.bytes, rates.bytes_per_s, "GB"),
            )
        )
        lines.append(f"  floor of {timed.task}: {milliseconds}")
    rows = pd.DataFrame(speed_rows(record)).drop(columns=["model", "device", SETTING, "measured"])
    return "\n".join([*lines, "", markdown(rows.loc[:, (rows != NOTHING).any()])])


def chosen(kind: str, given: list[str], known: tuple[str, ...]) -> list[str]:
    """What is given, each once, in the order of ``known``; ``InputError`` if there is no such."""
    for name in given:
        if name not in known:
            raise InputError(f"there is no {kind} {name!r}{nearest(name, known)}: there are {', '.join(known)}")
    return [name for name in known if name in given]


def chosen_forms(name: str, given: list[str] | None, tasks: list[str]) -> list[str]:
    """The forms to compare: those given, or for a PoolFormer all, for another model plain and fused.

    Raises:
        InputError: no such form, one that the model does not have, or none that does any of the tasks.
    """
    variant_arguments(name)
    compared = name in metaformer.POOLFORMERS
    forms = chosen("form", given or (OURS + OTHERS if compared else OURS[:2]), OURS + OTHERS)
    if not compared and (without := [form for form in forms if form in OTHERS]):
        raise InputError(f"{' and '.join(without)} has no {name}: use the forms {', '.join(OURS)}")
    if forms == ["folded"] and "training" in tasks:
        raise InputError("the form folded is for inference alone: use --tasks inference, or another form")
    return forms


def chosen_settings(options: argparse.Namespace) -> Settings:
    for name in ("batch", "rounds"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}: give 1 or more")
    if len(options.size) > 2 or min(options.size) < 1:
        raise InputError(f"--size {' '.join(map(str, options.size))}: give one side or height and width, in pixels")
    chosen("precision", [options.precision], tuple(DTYPES))
    chosen("memory format", [options.memory_format], tuple(LAYOUTS))
    chosen("device", [options.device], DEVICES)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch finds no GPU here: use --device cpu")
    if options.device == "cpu" and options.precision in ("float16", "tf32"):
        raise InputError(f"--precision {options.precision} needs a GPU: use float32 or bfloat16 on a CPU")
    return Settings(
        options.model,
        options.batch,
        (options.size[0], options.size[-1]),
        options.precision,
        options.memory_format,
        torch.device(options.device),
        options.rounds,
    )


def check_compiler() -> None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError("--compile needs a C++ compiler and finds none: install g++, or leave it out") from error


def default_record_path(model: str) -> Path:
    folder = Path("runs")
    folder.mkdir(exist_ok=True)
    return folder / f"benchmark-{model}-{datetime.now():%Y%m%d-%H%M%S}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", default="poolformer_s12", help="one of ours (default: %(default)s)")
    parser.add_argument("--forms", nargs="+", metavar="FORM", help=f"of {', '.join(OURS + OTHERS)} (default: all)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", default=TASKS, help=f"of {', '.join(TASKS)}")
    parser.add_argument("--compile", action="store_true", help="each form under torch.compile as well")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, nargs="+", default=[224], metavar="PIXELS", help="side, or height and width"
    )
    parser.add_argument("--precision", default="float32", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    parser.add_argument("--memory-format", default="channels_last", help=f"{', '.join(LAYOUTS)} (default: %(default)s)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"{', '.join(DEVICES)} (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each (default: %(default)s)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="where the record goes (default: in runs/)")
    options = parser.parse_args()
    settings = chosen_settings(options)
    tasks = chosen("task", options.tasks, TASKS)
    forms = chosen_forms(settings.model, options.forms, tasks)
    if options.compile and settings.device.type == "cpu":
        check_compiler()
    path = options.record or default_record_path(settings.model)
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} for the record: make it, or use another --record")
    record = benchmark(forms, [False, True] if options.compile else [False], tasks, settings)
    write_json(path, record)
    print(report(Benchmark.model_validate(record)))
    print(f"record: {path}")
