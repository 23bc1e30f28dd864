"""Benchmarks forms of a model beside timm's and transformers' classes, and beside the limit of the machine.

    python analysis/benchmark.py [MODEL] [--forms FORM...] [--tasks TASK...] [--compile] [--batch N] [--size PIXELS...]
        [--precision P] [--memory-format F] [--device D] [--rounds N] [--record FILE]

The forms of this package compute the equations as printed (plain), compute them in fewer passes over memory (fused), or
fold the norms into the weights for inference (folded). The five PoolFormers are also compared with timm's and
transformers' classes. All forms have the same weights and images. Every round times each of them once, in a rotated
order, and they are compared round by round.

Inference runs the model in eval mode without gradients. A training step is forward, cross-entropy and backward in train
mode, without drop path and optimizer. Saved bytes are those of all tensors that autograd keeps from the forward pass,
each storage once, without parameters and buffers. They include the images and copies of weights made by autocast or a
compiled step; a larger batch shares these copies among more images. Peak memory (CUDA) is the most that a call
allocates beyond what was allocated before it, which includes the weights but not the gradients.

float32 computes in float32 only. tf32 allows TensorFloat-32 in convolutions and in matrix products. bfloat16 and
float16 use autocast. The floor is defined at the top of metaformer/analysis/benchmark.py.
"""

import argparse
from datetime import datetime
from pathlib import Path

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from metaformer.analysis.benchmark import benchmark
from metaformer.analysis.contestants import DTYPES, LAYOUTS, OTHERS, OURS, TASKS, Settings, chosen_forms
from metaformer.analysis.render import markdown
from metaformer.analysis.speed import timings, title
from metaformer.errors import InputError, run_command
from metaformer.provenance import write_json
from metaformer.records import Benchmark


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="poolformer_s12", metavar="MODEL", help="a model of ours (default: %(default)s)")
    all_forms = "all for a PoolFormer, plain and fused for another model"
    add("--forms", nargs="+", choices=OURS + OTHERS, help=f"what is compared (default: {all_forms})")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, help="what is timed (default: both)")
    add("--compile", action="store_true", help="time each form under torch.compile as well")
    add("--batch", type=positive, default=8, metavar="N", help="images in a batch (default: %(default)s)")
    add("--size", type=positive, nargs="+", default=[224], metavar="PIXELS", help="side, or height and width (224)")
    add("--precision", choices=DTYPES, default="float32", help="default: %(default)s")
    add("--memory-format", choices=LAYOUTS, default="channels_last", help="default: %(default)s")
    gpu = torch.cuda.is_available()
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu", help="default: a GPU if there is one")
    add("--rounds", type=positive, default=7, metavar="N", help="turns of each contestant (default: %(default)s)")
    add("--record", type=Path, metavar="FILE", help="JSON record (default: runs/benchmark-MODEL-DATE.json)")
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> Settings:
    size, device = options.size, torch.device(options.device)
    if len(size) > 2:
        raise InputError(f"--size {' '.join(map(str, size))}: give one side or height and width, in pixels")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch finds no GPU here: use --device cpu")
    if options.device == "cpu" and options.precision in ("float16", "tf32"):
        raise InputError(f"--precision {options.precision} needs a GPU: use float32 or bfloat16 on a CPU")
    if options.device == "cpu" and options.compile:
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise InputError("--compile needs a C++ compiler and finds none: install g++, or leave it out") from error
    shape = options.batch, (size[0], size[-1])
    return Settings(options.model, *shape, options.precision, options.memory_format, device, options.rounds)


def report(record: Benchmark) -> str:
    rates = record.rates
    lines = [
        f"{record.model}, {title(record)}, on {record.device}; {record.settings.rounds} rounds",
        f"  products {rates.macs_per_s / 1e9:,.1f} GMAC/s, copies {rates.bytes_per_s / 1e9:,.1f} GB/s",
    ]
    for timed in record.tasks:
        macs, size = timed.floor.macs, timed.floor.bytes
        lines.append(
            f"  floor of {timed.task}: {1000 * macs / rates.macs_per_s:,.2f} ms for {macs / 1e9:,.2f} GMACs, "
            f"{1000 * size / rates.bytes_per_s:,.2f} ms for {size / 1e9:,.2f} GB"
        )
    rows = [timing.figures() for timing in timings(record)]
    shown = [heading for heading in rows[0] if any(row[heading] is not None for row in rows)]
    return "\n".join([*lines, "", markdown([{heading: row[heading] for heading in shown} for row in rows])])


def record_path(options: argparse.Namespace) -> Path:
    path = options.record or Path("runs", f"benchmark-{options.model}-{datetime.now():%Y%m%d-%H%M%S}.json")
    if not options.record:
        path.parent.mkdir(exist_ok=True)
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} for the record: make it, or use another --record")
    return path


def main() -> None:
    options = parse()
    settings = settings_of(options)
    tasks = [task for task in TASKS if task in options.tasks]
    forms = chosen_forms(settings.model, options.forms, tasks)
    path = record_path(options)
    record = benchmark(forms, [False, True] if options.compile else [False], tasks, settings)
    write_json(path, record)
    print(report(Benchmark.model_validate(record)))
    print(f"record: {path}")


if __name__ == "__main__":
    run_command(main)
