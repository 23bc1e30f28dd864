"""Benchmark the speed and memory of the forms of a model, and estimate the least time that a batch can take.

Each round times all contestants in a rotated order. Contestants are compared round by round.

The floor is the larger of two times: the multiply-accumulates divided by the rate of large matrix products, and the
bytes divided by the bandwidth of a large copy. The multiply-accumulates are those of :func:`count.count` without the
norms; training has three times as many. In inference, every block and every convolution outside of blocks reads its
input and writes its output once, the head reads its input, and the weights are read once. In training, the backward
pass also reads each input and the gradient of each output, writes the gradient of each input except the images, reads
the weights again and writes their gradients. Maps have the bytes of the precision, and weights four bytes per element.
A model can be faster than the floor where maps stay in a cache.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from metaformer.analysis.contestants import SEED, Contestant, Settings, contestants, ours
from metaformer.analysis.count import count
from metaformer.errors import InputError
from metaformer.mixers import Size
from metaformer.model import MetaFormer, size_after
from metaformer.provenance import provenance

MATRIX = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices whose product is timed."""
COPIED = {"cpu": 2**28, "cuda": 2**31}
"""Bytes of the buffer whose copy is timed; many times larger than a cache."""
REPEATS = 10
"""Repetitions of the product and the copy, of which the fastest gives the rate."""
WARM_UP = 3
SHORTEST = 0.2
"""Least duration of a contestant's turn in seconds, which sets the number of its calls."""


def benchmark(forms: list[str], modes: list[bool], tasks: list[str], settings: Settings) -> dict[str, Any]:
    """Run a benchmark and return its record (``records.Benchmark``)."""
    start = provenance()
    device = settings.device
    counted = count(settings.model, settings.size)
    torch.backends.cudnn.benchmark = True  # as training here
    tf32 = settings.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    rates = {"macs_per_s": matrix_rate(settings.dtype, device), "bytes_per_s": bandwidth(device)}
    of_settings = {**settings._asdict(), "size": list(settings.size), "device": device.type, "seed": SEED}
    return {
        "kind": "benchmark",
        "model": of_settings.pop("model"),
        "settings": of_settings,
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


def measure(forms: list[str], modes: list[bool], task: str, settings: Settings) -> list[dict[str, Any]]:
    """Measure every contestant (``records.Contestant``): seconds of a call in each round, and memory.

    Raises:
        InputError: a contestant runs out of memory or computes a value that is not finite.
    """
    torch.compiler.reset()  # otherwise the previous task's forms count towards the limit of recompilations
    with naming_what_lacks_memory(task):
        entered = contestants(forms, modes, task, settings)
    results = []
    for contestant in tqdm(entered, desc=f"{task}: warm-up", unit="contestant", disable=None):
        with naming_what_lacks_memory(f"{task} of {contestant}"):
            results.append(warm_up(contestant, settings))
    turns = deque(zip(entered, results, strict=True))
    for _ in tqdm(range(settings.rounds), desc=task, unit="round", disable=None):
        for contestant, result in turns:
            with naming_what_lacks_memory(f"{task} of {contestant}"):
                result["seconds"].append(seconds_of(contestant.call, result["calls"], settings.device))
        turns.rotate(-1)
    return results


def warm_up(contestant: Contestant, settings: Settings) -> dict[str, Any]:
    """Call a contestant until it is compiled and warm; returns its entry in the record with no round timed yet."""
    device, training = settings.device, contestant.model.training
    freezes = contestant.compiled and not training and device.type == "cpu"
    with inductor.patch(freezing=True) if freezes else nullcontext():
        first, *_, seconds = (seconds_of(contestant.call, 1, device) for _ in range(WARM_UP))
    if not torch.isfinite(contestant.call()).all():
        raise InputError(f"{contestant} is not finite in {settings.precision}: use another --precision")
    return {
        "form": contestant.form,
        "compiled": contestant.compiled,
        "first_call_s": first,
        "calls": math.ceil(SHORTEST / seconds),
        "seconds": [],
        "saved_bytes_per_image": saved_bytes(contestant) / settings.batch if training else None,
        "peak_bytes": peak_bytes(contestant, device) if device.type == "cuda" else None,
    }


@contextmanager
def naming_what_lacks_memory(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):  # of a CPU
            raise
        raise InputError(f"there is not enough memory for {what}: use a smaller --batch or --size") from error


def seconds_of(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Mean seconds of a call, over several calls in a row and including the device's work."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(contestant: Contestant) -> int:
    """Bytes that autograd keeps from a forward pass, each storage once, without parameters and buffers."""
    model = contestant.model
    own = {tensor.untyped_storage().data_ptr() for tensor in chain(model.parameters(), model.buffers())}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = contestant.forward()
    del logits  # they kept all saved storages alive until here, so that no address was used twice
    return sum(kept.values())


def peak_bytes(contestant: Contestant, device: torch.device) -> int:
    """Peak GPU memory that a call allocates beyond what is allocated before it."""
    contestant.model.zero_grad(set_to_none=True)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    contestant.call()
    return torch.cuda.max_memory_allocated(device) - before


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply-accumulates per second of a large matrix product, by PyTorch's fastest library for it."""
    side = MATRIX[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    products = [lambda: torch.mm(left, right)]
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""))
    return side**3 / min(seconds_of(product, 1, device) for product in products for _ in range(REPEATS))


def bandwidth(device: torch.device) -> float:
    """Bytes read and written per second in a large copy."""
    source, target = (torch.ones(COPIED[device.type], dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * source.numel() / min(seconds_of(lambda: target.copy_(source), 1, device) for _ in range(REPEATS))


def floor(task: str, settings: Settings, counted: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """MACs, bytes and least seconds of a batch, as defined at the top of this file.

    Args:
        counted: result of :func:`count.count` for the model.
        rates: ``macs_per_s`` and ``bytes_per_s`` of the machine.
    """
    images = 3 * math.prod(settings.size)
    read, written = elements(ours(settings, fused=False), settings.size)
    training = task == "training"
    elements_of_image = 3 * read - images + 2 * written if training else read + written
    weights = (3 if training else 1) * (counted["learnable"] + counted["frozen"])
    products = sum(macs for operator, macs in counted["macs"].items() if not operator.endswith("_norm"))
    macs = (3 if training else 1) * settings.batch * products
    moved = settings.batch * settings.dtype.itemsize * elements_of_image + 4 * weights
    return {
        "macs": macs,
        "bytes": moved,
        "seconds": max(macs / rates["macs_per_s"], moved / rates["bytes_per_s"]),
    }


def elements(model: MetaFormer, size: Size) -> tuple[int, int]:
    """Elements per image that convolutions, blocks and head read, and that convolutions and blocks write."""
    channels, read, written = model.in_chans, 0, 0
    for layer in [model.stem, *chain.from_iterable((stage.downsample, *stage.blocks) for stage in model.stages)]:
        if isinstance(layer, nn.Identity):
            continue
        read += channels * math.prod(size)
        if isinstance(layer, nn.Conv2d):
            channels, size = layer.out_channels, size_after(layer, size)
        written += channels * math.prod(size)
    return read + channels * math.prod(size), written
