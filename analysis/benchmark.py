"""Benchmarks forms of a model beside timm's and transformers' classes, other runtimes, and the limit of the machine.

    python analysis/benchmark.py [MODEL] [--matrix | --growth] [--forms FORM...] [--runtimes RUNTIME...]
        [--tasks TASK...] [--batch N...] [--size PIXELS...] [--precision P...] [--memory-format F...] [--device D]
        [--rounds N] [--seconds S] [--memory] [--record FILE]

The forms of this package compute the equations as printed (plain), compute them in fewer passes over memory (fused), or
fold the norms into the weights for inference (folded). The five PoolFormers are also compared with timm's and
transformers' classes. PyTorch runs a form eager or compiled, and onnxruntime and openvino run its ONNX file on a CPU.
All contestants have the same weights, images and number of threads. Every round times each of them once, in a rotated
order, and they are compared round by round. A contestant is timed only if its output is that of the plain form in
float32; one that cannot be timed is listed with the reason.

Each task, batch and precision is a comparison of its own, which enters the record when it is done. --matrix compares
our fastest form with timm's class in all runtimes, layouts and precisions of the device; compilation takes most of its
time. --growth compares the two in batches of 1 to 64, sizes of 96 to 384 and all PoolFormers, eager, with their
memory. Other options change parts of both presets.

Inference runs the model in eval mode without gradients. A training step is forward, cross-entropy and backward in train
mode, without drop path and optimizer. Saved bytes are those of all tensors that autograd keeps from the forward pass,
each storage once, without parameters and buffers. They include the images and copies of weights made by autocast or a
compiled step; a larger batch shares these copies among more images. Peak memory on a GPU is the most that a call
allocates beyond what was allocated before it, which includes the weights but not the gradients. On a CPU, --memory
gives the resident memory that an eager model and two calls take in a fresh process.

float32 computes in float32 only. tf32 allows TensorFloat-32 in convolutions and in matrix products, and mkldnn_bf16
lets oneDNN round the factors of float32 products to bfloat16 (torch.backends.mkldnn.fp32_precision). bfloat16 and
float16 use autocast. The floor is defined at the top of metaformer/analysis/benchmark.py.
"""

import argparse
from datetime import datetime
from itertools import product
from pathlib import Path

import torch

from metaformer.analysis import contestants
from metaformer.analysis.benchmark import benchmark
from metaformer.analysis.cells import markdown
from metaformer.analysis.contestants import BEST, LAYOUTS, OTHERS, OURS, PRECISIONS, RUNTIMES, TASKS, Cell
from metaformer.analysis.count import size_of
from metaformer.analysis.speed import compared, place, timings
from metaformer.errors import InputError, run_command
from metaformer.provenance import write_json, writing
from metaformer.records import Benchmark
from metaformer.variants import POOLFORMERS

MATRIX = {"cpu": {"inference": (1, 8), "training": (8,)}, "cuda": {"inference": (1, 128), "training": (128,)}}
"""Batches of --matrix."""
GROWTH = {
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "size": [(side, side) for side in (96, 160, 224, 288, 384)],
    "model": POOLFORMERS,
}
"""Values of --growth, which changes one field of a cell at a time."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="poolformer_s12", metavar="MODEL", help="a model of ours (default: %(default)s)")
    presets = parser.add_mutually_exclusive_group()
    presets.add_argument("--matrix", action="store_true", help="every runtime, layout and precision of the device")
    presets.add_argument("--growth", action="store_true", help="several batches, sizes and models, with the memory")
    add("--forms", nargs="+", choices=OURS + OTHERS, help="what is compared (default: all that the model has)")
    add("--runtimes", nargs="+", choices=RUNTIMES, help="what runs the forms (default: eager)")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, help="what is timed (default: both)")
    add("--batch", type=int, nargs="+", metavar="N", help="images in a batch (default: 8)")
    add("--size", type=int, nargs="+", default=[224], metavar="PIXELS", help="side, or height and width (224)")
    add("--precision", nargs="+", choices=contestants.DTYPES, help="default: float32")
    add("--memory-format", nargs="+", choices=LAYOUTS, help="default: channels_last")
    gpu = torch.cuda.is_available()
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu", help="default: a GPU if there is one")
    add("--rounds", type=int, default=7, metavar="N", help="turns of each contestant (default: %(default)s)")
    add("--seconds", type=float, default=0.2, metavar="S", help="least duration of a turn (default: %(default)s)")
    add("--memory", action="store_true", help="measure the memory of eager forms on a CPU as well")
    add("--record", type=Path, metavar="FILE", help="JSON record (default: runs/benchmark-MODEL-DATE.json)")
    return parser.parse_args()


def comparisons(options: argparse.Namespace) -> list[tuple[Cell, list[contestants.Entry]]]:
    """The cells that the options ask for, with the contestants of each."""
    size = size_of(options.size)
    if min(options.rounds, *(options.batch or [1])) < 1:
        raise InputError("--batch and --rounds: give whole numbers from 1")
    if not options.seconds > 0:
        raise InputError(f"--seconds {options.seconds:g}: give a duration above 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch finds no GPU here: use --device cpu")
    if wrong := [precision for precision in options.precision or () if precision not in PRECISIONS[options.device]]:
        raise InputError(f"--precision {wrong[0]}: on this device, use {', '.join(PRECISIONS[options.device])}")
    matrix, two = options.matrix, (options.matrix or options.growth) and options.model in POOLFORMERS
    every = matrix and (options.device == "cuda" or contestants.has_bfloat16())
    precisions = options.precision or (PRECISIONS[options.device] if every else ["float32"])
    runtimes = options.runtimes or (RUNTIMES if matrix else ["eager"])
    layouts = options.memory_format or (LAYOUTS if matrix else ["channels_last"])
    found = []
    for task, precision in product([task for task in TASKS if task in options.tasks], precisions):
        forms = options.forms or ([BEST[task], "timm"] if two else None)
        entered = contestants.entries(task, options.model, forms, runtimes, layouts)
        base = Cell(task, options.model, 8, size, precision, options.device)
        preset = MATRIX[options.device][task] if matrix else [8]
        cells = [base._replace(batch=batch) for batch in options.batch or preset]
        if options.growth:
            grown = [cells[0]._replace(**{field: value}) for field, values in GROWTH.items() for value in values]
            cells = dict.fromkeys([*cells, *grown])
        found += [(cell, entered) for cell in cells]
    return found


def report(record: Benchmark) -> str:
    """The last cell of a record."""
    cell = record.cells[-1]
    lines = [
        f"{', '.join(place(record, cell).values())}: {cell.task}",
        *(f"  not timed: {of.form} ({of.runtime}, {of.memory_format}): {of.reason}" for of in cell.absent),
        f"  fastest: {compared(cell)['fastest']}",
    ]
    rows = [timing.figures() for timing in timings(cell)]
    shown = [heading for heading in rows[0] if any(row[heading] is not None for row in rows)] if rows else []
    return "\n".join([*lines, "", markdown([{heading: row[heading] for heading in shown} for row in rows]), ""])


def main() -> None:
    options = parse()
    cells = comparisons(options)
    path = options.record or Path("runs", f"benchmark-{options.model}-{datetime.now():%Y%m%d-%H%M%S}.json")
    with writing(path):  # now, not after the first measurements
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise InputError(f"--record {path} is a folder: give the path of a file")
    for record in benchmark(cells, options.rounds, options.seconds, options.memory or options.growth):
        write_json(path, record)
        print(report(Benchmark.model_validate(record)), flush=True)
    print(f"record: {path}")


if __name__ == "__main__":
    run_command(main)
