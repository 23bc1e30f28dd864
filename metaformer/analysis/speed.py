"""Tables of measured speed and memory, of the loader, of the cost of the paper's runs, and of parity."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby
from statistics import median
from typing import NamedTuple

from metaformer.analysis.cells import NOT_MEASURED, Measurement, Number, Range, Row, Table, Verdict, rounded, spread
from metaformer.analysis.measured import Measured
from metaformer.analysis.paper import built_rows, paper
from metaformer.records import Benchmark, Contestant, Parity, Spread, Timed
from metaformer.variants import POOLFORMERS

BEST = {"inference": "folded", "training": "fused"}
"""Our fastest form for each task."""


class Timing(NamedTuple):
    """A contestant in a task of a benchmark."""

    record: Benchmark
    timed: Timed
    contestant: Contestant

    @property
    def images_per_s(self) -> list[float]:
        """By round."""
        return [self.record.settings.batch / seconds for seconds in self.contestant.seconds]

    @property
    def saved(self) -> Number | None:
        """Megabytes per image that autograd keeps from forward to backward."""
        saved = self.contestant.saved_bytes_per_image
        return None if saved is None else Number(saved / 1e6, 1)

    def times_timm(self, compiled: bool) -> Range | None:
        """The speed over that of timm's class in the same round."""
        timm = find(self.timed, "timm", compiled)
        if timm is None:
            return None
        return spread([theirs / ours for theirs, ours in zip(timm.seconds, self.contestant.seconds, strict=True)], 2)

    def place(self) -> Row:
        record = self.record
        return {"model": record.model, "device": record.device, "batch, size and precision": title(record)}

    def figures(self) -> Row:
        full, own_size = paper()["table2"]["data"], self.record.settings.size == (224, 224)
        hours = full["train_images"] * full["epochs"] / median(self.images_per_s) / 3600
        floor, peak = self.timed.floor.seconds, self.contestant.peak_bytes
        return {
            "task": self.timed.task,
            "form": f"{self.contestant.form}, compiled" if self.contestant.compiled else self.contestant.form,
            "images/s per device": Measurement(spread(self.images_per_s, 1)),
            "times timm": self.times_timm(compiled=False),
            "times timm, compiled": self.times_timm(compiled=True),
            "saved, MB per image": self.saved,
            "peak, MB": None if peak is None else Number(peak / 1e6),
            "of the floor's speed": Number(100 * floor / median(self.contestant.seconds), unit="%"),
            "device-hours": Number(hours) if self.timed.task == "training" and own_size else None,
        }


def timings(record: Benchmark) -> Iterator[Timing]:
    """Every contestant in every task of a benchmark."""
    yield from (Timing(record, timed, contestant) for timed in record.tasks for contestant in timed.contestants)


def find(timed: Timed, form: str, compiled: bool) -> Contestant | None:
    return next((c for c in timed.contestants if (c.form, c.compiled) == (form, compiled)), None)


def title(record: Benchmark) -> str:
    settings = record.settings
    height, width = settings.size
    return f"{settings.batch} x {height} x {width}, {settings.precision}, {settings.memory_format.replace('_', '-')}"


def speed(measured: Measured) -> Table:
    benchmarks = measured.records["benchmark"]
    rows = []
    for model in dict.fromkeys([*POOLFORMERS, *(record.model for record in benchmarks)]):
        records = measured.of_model("benchmark", model)
        rows += [
            {**timing.place(), **timing.figures(), "measured": record.date[:10]}
            for record in records
            for timing in timings(record)
        ] or [
            {
                "model": model,
                **dict.fromkeys(("device", "batch, size and precision", "task", "form")),
                "images/s per device": Measurement(None, NOT_MEASURED),
            }
        ]
    notes = [
        "Values are medians over all rounds (minimum to maximum). 'times timm' is the speed divided by that of timm's "
        "class, eager or compiled, in the same round.",
        "A training step is forward, loss and backward, without the optimizer. 'saved' is the memory that autograd "
        "keeps from forward to backward. metaformer/analysis/benchmark.py defines the floor.",
        "'device-hours' is the time that 300 epochs of ImageNet-1K, the paper's training, would take with such steps.",
    ]
    return Table("speed", "Speed and memory of the forms of a model, in benchmarks on one device", rows, notes)


def beside_timm(record: Benchmark) -> Iterator[Row]:
    """A row for each task and mode in which a benchmark has both timm's class and our fastest form."""
    for timed in record.tasks:
        for compiled in (False, True):
            found = [find(timed, form, compiled) for form in ("timm", BEST[timed.task])]
            if None not in found:
                timm, ours = (Timing(record, timed, contestant) for contestant in found)
                yield {
                    **ours.place(),
                    "task": f"{timed.task}, compiled" if compiled else timed.task,
                    "images/s, timm": spread(timm.images_per_s, 1),
                    "images/s, ours": spread(ours.images_per_s, 1),
                    "ratio, round by round": ours.times_timm(compiled),
                    "saved by autograd, MB per image: timm / ours": f"{timm.saved} / {ours.saved}"
                    if timed.task == "training"
                    else None,
                }


def cost(measured: Measured) -> Table:
    rows, totals = [], []
    for table, group in groupby(built_rows(), key=lambda place: place[0]):
        data = paper()[table]["data"]
        images = data["iterations"] * data["batch"] if table == "table4" else data["train_images"] * data["epochs"]
        names, hours = set(), defaultdict(dict)  # hours: device to name of the row to device-hours
        for _, row in group:
            if row.get("mixer", "pooling") != "pooling":
                continue  # a baseline that this repository does not train
            name = row.get("variant") or row.get("model") or f"{row['head']} {row['backbone']}"
            names.add(name)
            cells = {"table": table, "row": name, "images in a full run": Number(images)}
            for record in measured.of_model("training", row["build"]) or [None]:
                speed = record and record.images_per_s / record.devices
                if record:
                    hours[record.hardware.device][name] = rounded(images / speed / 3600, 0)
                rows.append(
                    {
                        **cells,
                        "images/s per device": Measurement(speed and Number(speed, 1), NOT_MEASURED),
                        "device": record and record.hardware.device,
                        "device-hours": speed and Number(images / speed / 3600),
                        "measured": record and record.date[:10],
                    }
                )
        whole = [
            f"{Number(sum(of.values()))} device-hours on {device}" for device, of in hours.items() if of.keys() == names
        ]
        done = set().union(*hours.values())
        totals.append(f"All of {table}: {'; '.join(whole) or f'{len(done)} of its {len(names)} rows are measured'}.")
    notes = [
        "A full run is the paper's: 300 epochs of ImageNet-1K, 12 epochs of COCO, or 40,000 iterations of 32 pictures "
        "of ADE20K.",
        "Speeds come from the training runs in analysis/results/ and do not include validation.",
        *totals,
    ]
    return Table("cost", "Cost of the paper's runs, from measured training speeds", rows, notes)


def loader(measured: Measured) -> Table:
    rows = [
        {
            "decoder": name,
            "pictures": f"{Number(record.data.mean_width)} x {Number(record.data.mean_height)}, "
            f"{Number(record.data.mean_bytes / 1000)} kB on average, to {record.settings.img_size} px",
            "processor": record.hardware.processor,
            "workers": Number(record.workers),
            "decoding alone, images/s": measured_range(of.decode_images_per_s, 0),
            "whole loader, images/s per worker": measured_range(of.loader_images_per_s_per_worker, 0),
            "times Pillow": of.loader_relative_to_pillow and measured_range(of.loader_relative_to_pillow, 2),
            "workers for": f"{record.consume_images_per_s:,g} images/s: {of.workers_needed}"
            if record.consume_images_per_s
            else None,
            "measured": record.date[:10],
        }
        for record in measured.records["loader"]
        for name, of in record.decoders.items()
    ]
    notes = [
        "Images/s of the training loader with the paper's augmentation, on JPEGs in the file cache: median over rounds "
        '(minimum to maximum). Training has the loader of the rows "pillow", and analysis/loader.py measures it alone. '
        "The other rows were measured once, by programs in the commits that their records name.",
        "speed.md and the run.json of a run give the images/s that a GPU takes. `analysis/loader.py --consume` "
        "computes the number of workers for them.",
    ]
    notes += [
        f'Milliseconds of a picture in each stage of the loader "pillow", in one process, {record.date[:10]}: '
        + ", ".join(f"{stage} {Number(of.median, 2)}" for stage, of in record.split_ms.items())
        for record in measured.records["loader"]
        if record.split_ms
    ]
    return Table("loader", "What the training loader delivers", rows, notes)


def measured_range(of: Spread, digits: int) -> Range:
    return Range(of.median, of.min, of.max, digits)


def parity(measured: Measured) -> Table:
    """The latest comparison."""
    notes = ["Not compared yet: analysis/parity.py compares."]
    for record in measured.records["parity"][-1:]:
        state = " with local changes" if record.official.uncommitted_changes else ""
        notes = [
            f"{record.date[:10]}, {record.hardware.processor}, timm {record.versions['timm']}; official code: commit "
            f"{record.official.commit}{state}, as imported by analysis/parity.py.",
            "Models: float64, random weights, 2 images of 224 pixels. The difference of a tensor is relative to the "
            "official one's norm, or to a thousandth of the largest norm; that of the worst tensor is shown.",
            f"Recipe: {record.pictures} pictures, all ten models. Pixels come from the same random numbers.",
            "Training: official train_one_epoch beside our step, PoolFormer-S12 at 64 pixels through a schedule of 20 "
            "epochs, each from the same uint8 pictures and random numbers: mixing, erasing, model, loss and AdamW.",
        ]
    rows = [row for record in measured.records["parity"][-1:] for row in parity_rows(record)]
    return Table("parity", "Difference from the official code", rows or [{"part": None}], notes)


def parity_rows(record: Parity) -> list[Row]:
    """A row for each comparison and each difference that stays."""
    found = [(of.part, of.what, of.difference, of.tolerance) for of in record.compared]
    for run in record.trajectories:
        precision = run.dtype if run.precision == "float32" else f"ours in {run.precision}"
        what = f"{len(run.losses)} steps, {precision}, drop path {run.drop_path:g}"
        tolerance = 1e-10 if run.dtype == "float64" else None
        found += [
            ("training", f"{what}: {name}", max(values), tolerance)
            for name, values in (("loss", run.losses), ("weights", run.weights))
        ]
    rows = [
        {
            "part": part,
            "compared": what,
            "largest difference": f"{difference:.1e}" if difference else "0",
            "verdict": None if tolerance is None else Verdict("equal" if difference <= tolerance else "unexplained"),
        }
        for part, what, difference, tolerance in found
    ]
    return rows + [
        {
            "part": "departure",
            "compared": of.what,
            "largest difference": of.effect,
            "verdict": Verdict("explained", of.reason),
        }
        for of in record.departures
    ]
