"""Benchmark the speed and memory of the forms of a model, and estimate the least time that a batch can take.

A cell is a task on a batch in a precision. Each round times all contestants of a cell in a rotated order, and they are
compared round by round. Before, the output of each is compared with that of the plain form in float32.

The floor is the larger of two times: the multiply-accumulates divided by the rate of large matrix products, and the
bytes divided by the bandwidth of a large copy. The multiply-accumulates are those of :func:`count.count` without the
norms; training has three times as many, although the stem needs no gradient of the images and frozen matrices need none
of their weights, so that a training step can take a little less. In inference, every block and every convolution
outside of blocks reads its input and writes its output once, the head reads its input, and the weights are read once.
In training, the backward pass also reads each input and the gradient of each output, writes the gradient of each input
except the images, reads the weights again and writes their gradients. Maps have the bytes of the precision, and weights
four bytes per element. A model can be faster than the floor where maps stay in a cache.
"""

import ctypes
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from metaformer.analysis import contestants
from metaformer.analysis.contestants import DTYPES, SEED, TOLERANCES, Cell, Contestant, Entry
from metaformer.analysis.count import count
from metaformer.errors import InputError
from metaformer.export import largest_error
from metaformer.mixers import Size
from metaformer.model import MetaFormer, size_after
from metaformer.provenance import provenance

SIDE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices whose product is timed."""
COPIED = {"cpu": 2**28, "cuda": 2**31}
"""Bytes of the buffer whose copy is timed; many times larger than a cache."""
REPEATS = 10
"""Repetitions of the product and the copy, of which the fastest gives the rate."""
WARM_UP = 3


def benchmark(
    cells: Iterable[tuple[Cell, list[Entry]]], rounds: int, seconds: float, memory: bool
) -> Iterator[dict[str, Any]]:
    """Measure cells one after the other; yields the record (``records.Benchmark``) as it grows.

    Args:
        cells: the comparisons, with the contestants of each.
        rounds: turns of each contestant.
        seconds: least duration of a turn, which sets the number of its calls.
        memory: measure the resident memory on a CPU as well, in a fresh process for each contestant.

    Raises:
        InputError: a model does not take the size, or no contestant could be timed in any cell.
    """
    torch.backends.cudnn.benchmark = True  # as in training
    record = {"kind": "benchmark", "settings": {"rounds": rounds, "turn_s": seconds, "seed": SEED}, "cells": []}
    record |= provenance()
    for cell, entered in cells:
        counted = count(cell.model, cell.size)
        rates = rates_of(cell.precision, cell.device)
        measured = measure(cell, entered, rounds, seconds, memory)
        record["cells"].append({**cell._asdict(), "rates": rates, "floor": floor(cell, counted, rates), **measured})
        if any(cell["contestants"] for cell in record["cells"]):
            yield record
    if not any(cell["contestants"] for cell in record["cells"]):
        first = record["cells"][0]["absent"][0]
        raise InputError(f"nothing can be timed; {first['form']} ({first['runtime']}): {first['reason']}")


def measure(cell: Cell, entered: list[Entry], rounds: int, seconds: float, memory: bool) -> dict[str, Any]:
    """Contestants with their seconds per call in each round and their memory, and those absent with the reason."""
    torch.compiler.reset()  # otherwise the previous cell's forms count towards the limit of recompilations
    found, absent = [], []
    for entry in tqdm(entered, desc=f"{cell}: warm-up", unit="contestant", disable=None):
        try:
            set_precision("float32")
            expected = contestants.reference(entry.form, cell)
            set_precision(cell.precision)
            found.append(warm_up(contestants.contestant(entry, cell), cell, expected, seconds, memory))
        except Exception as error:  # the others are timed nevertheless, and the record has the reason
            absent.append({**entry._asdict(), "reason": reason(error)})
    set_precision(cell.precision)  # still float32 if the reference of the last entry failed
    turns = deque(found)
    for _ in tqdm(range(rounds), desc=str(cell), unit="round", disable=None):
        for call, result in turns:
            time.sleep(0.02)  # the threads of the previous contestant wait actively for a few milliseconds
            result["seconds"].append(seconds_of(call, result["calls"], cell.device))
        turns.rotate(-1)
    return {"contestants": [result for _, result in found], "absent": absent}


def reason(error: Exception) -> str:
    message = str(error).strip().partition("\n")[0] or "no message"
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in message:  # of a GPU, of a CPU
        return "there is not enough memory: use a smaller --batch or --size"
    return message if isinstance(error, InputError) else f"{type(error).__name__}: {message}"


def set_precision(precision: str) -> None:
    """Set the type to which float32 products may round their factors."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.mkldnn.fp32_precision = "bf16" if precision == "mkldnn_bf16" else "none"


def warm_up(
    contestant: Contestant, cell: Cell, expected: list[Tensor], seconds: float, memory: bool
) -> tuple[Callable[[], Tensor], dict[str, Any]]:
    """Call a contestant until it is compiled and warm; returns its call and its entry in the record, with no round yet.

    Raises:
        InputError: it computes something else than the plain form.
    """
    entry, training = contestant.entry, contestant.training
    freezes = entry.runtime == "compiled" and not training and cell.device == "cpu"
    with inductor.patch(freezing=True) if freezes else nullcontext():
        first, *_, last = (seconds_of(contestant.call, 1, cell.device) for _ in range(WARM_UP))
    error = largest_error(contestant.outputs(), expected)
    if not error <= TOLERANCES[cell.precision]:
        raise InputError(f"its output differs from the plain form's in float32 by {error:.1e} of it")
    peak = None
    if cell.device == "cuda":
        peak = peak_bytes(contestant)
    elif memory and entry.runtime == "eager":  # the compiler and the exporter need more memory than the model
        peak = resident_bytes(entry, cell)
    return contestant.call, {
        **entry._asdict(),
        "error": error,
        "first_call_s": first,
        "calls": math.ceil(seconds / last),
        "seconds": [],
        "saved_bytes_per_image": saved_bytes(contestant) / cell.batch if training else None,
        "peak_bytes": peak,
    }


def seconds_of(call: Callable[[], Any], calls: int, device: str) -> float:
    """Mean seconds of a call, over several calls in a row and including the device's work."""
    synchronise = torch.cuda.synchronize if device == "cuda" else torch.cpu.synchronize
    synchronise()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise()
    return (time.perf_counter() - start) / calls


def saved_bytes(contestant: Contestant) -> int:
    """Bytes that autograd keeps from a forward pass, each storage once, without parameters and buffers."""
    model = contestant.model
    own = {tensor.untyped_storage().data_ptr() for tensor in chain(model.parameters(), model.buffers())}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a saved output would hold the graph that holds it, for ever

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = contestant.forward()
    del logits  # they kept all saved storages alive until here, so that no address was used twice
    return sum(kept.values())


def peak_bytes(contestant: Contestant) -> int:
    """Peak GPU memory that a call allocates beyond what is allocated before it."""
    contestant.model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contestant.call()
    return torch.cuda.max_memory_allocated() - before


def resident_bytes(entry: Entry, cell: Cell) -> int:
    """Peak resident memory that the model and its calls take in a fresh process (Linux)."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(resident_growth, entry, cell, torch.get_num_threads()).result()


def resident_growth(entry: Entry, cell: Cell, threads: int) -> int:
    torch.set_num_threads(threads)
    set_precision(cell.precision)
    contestants.given(cell)  # all contestants hold it
    before = resident("VmRSS")
    entered = contestants.contestant(entry, cell)
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps the memory of the model that was folded
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of building the model
    for _ in range(2):
        entered.call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status, which has kibibytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@lru_cache
def rates_of(precision: str, device: str) -> dict[str, float]:
    set_precision(precision)
    return {"macs_per_s": matrix_rate(DTYPES[precision], device), "bytes_per_s": bandwidth(device)}


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """Multiply-accumulates per second of a large matrix product, by PyTorch's fastest library for it."""
    side = SIDE[device]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    products = [lambda: torch.mm(left, right)]
    if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""))
    return side**3 / min(seconds_of(product, 1, device) for product in products for _ in range(REPEATS))


def bandwidth(device: str) -> float:
    """Bytes read and written per second in a large copy."""
    source, target = (torch.ones(COPIED[device], dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * source.numel() / min(seconds_of(lambda: target.copy_(source), 1, device) for _ in range(REPEATS))


def floor(cell: Cell, counted: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """MACs, bytes and least seconds of a batch, as defined at the top of this file.

    Args:
        counted: result of :func:`count.count` for the model.
        rates: ``macs_per_s`` and ``bytes_per_s`` of the machine.
    """
    images = 3 * math.prod(cell.size)
    read, written = elements(contestants.ours(cell, fused=False), cell.size)
    training = cell.task == "training"
    elements_of_image = 3 * read - images + 2 * written if training else read + written
    weights = (3 if training else 1) * (counted["learnable"] + counted["frozen"])
    products = sum(macs for operator, macs in counted["macs"].items() if not operator.endswith("_norm"))
    macs = (3 if training else 1) * cell.batch * products
    moved = cell.batch * cell.dtype.itemsize * elements_of_image + 4 * weights
    return {"macs": macs, "bytes": moved, "seconds": max(macs / rates["macs_per_s"], moved / rates["bytes_per_s"])}


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
