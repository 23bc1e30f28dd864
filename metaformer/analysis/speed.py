"""Tables of measured speed and memory, of the loader, of the cost of the paper's runs, and of parity."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby
from statistics import median
from typing import NamedTuple

from scipy.stats import binom

from metaformer.analysis.cells import NOT_MEASURED, Measurement, Number, Range, Row, Table, Verdict, rounded, spread
from metaformer.analysis.contestants import BEST, EXPORTED, OURS, PRECISIONS, TASKS
from metaformer.analysis.measured import Measured
from metaformer.analysis.paper import built_rows, paper
from metaformer.records import Benchmark, Cell, Contestant, Entry, Parity, Spread
from metaformer.variants import POOLFORMERS

COLUMNS = (*(f"{library}, {mode}" for library in ("ours", "timm") for mode in ("eager", "compiled")), *EXPORTED)
"""Of the table of who is fastest; transformers' class has columns only where it was measured."""


class Timing(NamedTuple):
    """A contestant in a cell of a benchmark."""

    record: Benchmark
    cell: Cell
    contestant: Contestant

    @property
    def images_per_s(self) -> list[float]:
        """By round."""
        return [self.cell.batch / seconds for seconds in self.contestant.seconds]

    @property
    def interval(self) -> Range:
        """Median of images/s with its 95 % interval, which order statistics bound whatever the distribution is.

        Fewer than 6 rounds have no such interval; their extremes take its place.
        """
        values = sorted(self.images_per_s)
        left_out = max(int(binom.ppf(0.025, len(values), 0.5)) - 1, 0)
        return Range(median(values), values[left_out], values[-1 - left_out], 1)

    @property
    def saved(self) -> Number | None:
        """Megabytes per image that autograd keeps from forward to backward."""
        saved = self.contestant.saved_bytes_per_image
        return None if saved is None else Number(saved / 1e6, 1)

    @property
    def layout(self) -> str:
        return self.contestant.memory_format.replace("_", "-")

    @property
    def column(self) -> str:
        """The contestant's column in the table of who is fastest."""
        return column_of(self.contestant)

    def times_timm(self, runtime: str) -> Range | None:
        """The speed over that of timm's class in the same round and layout."""
        timm = find(self.cell, "timm", runtime, self.contestant.memory_format)
        if timm is None:
            return None
        return spread([theirs / ours for theirs, ours in zip(timm.seconds, self.contestant.seconds, strict=True)], 2)

    def place(self) -> Row:
        return {**place(self.record, self.cell), "layout": self.layout}

    def figures(self) -> Row:
        full, own_size = paper()["table2"]["data"], self.cell.size == (224, 224)
        hours = full["train_images"] * full["epochs"] / median(self.images_per_s) / 3600
        floor, peak, of = self.cell.floor.seconds, self.contestant.peak_bytes, self.contestant
        return {
            "task": self.cell.task,
            "form": of.form if of.runtime == "eager" else f"{of.form}, {of.runtime}",
            "images/s per device": Measurement(spread(self.images_per_s, 1)),
            "times timm": self.times_timm("eager"),
            "times timm, compiled": self.times_timm("compiled"),
            "saved, MB per image": self.saved,
            "peak, MB": None if peak is None else Number(peak / 1e6),
            "of the floor's speed": Number(100 * floor / median(of.seconds), unit="%"),
            "device-hours": Number(hours) if self.cell.task == "training" and own_size else None,
        }


def timings(record: Benchmark) -> Iterator[Timing]:
    """Every contestant in every cell of a benchmark."""
    yield from (Timing(record, cell, contestant) for cell in record.cells for contestant in cell.contestants)


def find(cell: Cell, form: str, runtime: str, memory_format: str) -> Contestant | None:
    entry = form, runtime, memory_format
    return next((c for c in cell.contestants if (c.form, c.runtime, c.memory_format) == entry), None)


def place(record: Benchmark, cell: Cell) -> Row:
    height, width = cell.size
    return {
        "model": cell.model,
        "device": record.device(cell),
        "batch, size and precision": f"{cell.batch} x {height} x {width}, {cell.precision}",
    }


def speed(measured: Measured) -> Table:
    benchmarks = measured.records["benchmark"]
    rows = [
        {**timing.place(), **timing.figures(), "measured": record.date[:10]}
        for record in benchmarks
        for timing in timings(record)
    ]
    found = {row["model"] for row in rows}
    rows += [
        {"model": model, "images/s per device": Measurement(None, NOT_MEASURED)}
        for model in POOLFORMERS
        if model not in found
    ]
    notes = [
        "Values are medians over all rounds (minimum to maximum). 'times timm' is the speed divided by that of timm's "
        "class, eager or compiled, in the same round and layout.",
        "A training step is forward, loss and backward, without the optimizer. 'saved' is the memory that autograd "
        "keeps from forward to backward. metaformer/analysis/benchmark.py defines the floor.",
        "'device-hours' is the time that 300 epochs of ImageNet-1K, the paper's training, would take with such steps.",
    ]
    return Table("speed", "Speed and memory of the forms of a model, in benchmarks on one device", rows, notes)


def fastest(measured: Measured) -> Table:
    """The fastest form and layout of every library and runtime in each cell, and who is the fastest of all."""
    records = measured.records["benchmark"]
    rows = [
        {**place(record, cell), "task": cell.task, **compared(record, cell), "measured": record.date[:10]}
        for record in records
        for cell in record.cells
    ]
    found = {(cell.device, cell.precision, cell.task) for record in records for cell in record.cells}
    rows += [
        {"device": {"cpu": "any CPU", "cuda": "any GPU"}[device], "batch, size and precision": precision, "task": task}
        | dict.fromkeys(("fastest", *COLUMNS), Measurement(None, NOT_MEASURED))
        for device, precisions in PRECISIONS.items()
        for precision in precisions
        for task in TASKS
        if (device, precision, task) not in found
    ]
    notes = [
        "images/s of the fastest form and layout of each column: median over rounds in which all contestants of the "
        "row took turns (95 % interval of the median, or the extremes of fewer than 6 rounds).",
        "A column is the fastest if its interval lies above those of all others. Otherwise those that reach into the "
        "interval of the highest median tie. onnxruntime and openvino run the ONNX files of ours and of timm's class.",
    ]
    return Table("fastest", "The fastest implementation in every measured setting", rows, notes)


def compared(record: Benchmark, cell: Cell) -> Row:
    """The row of a cell in :func:`fastest`."""
    entered = [Timing(record, cell, contestant) for contestant in cell.contestants]
    best = {timing.column: timing for timing in sorted(entered, key=lambda timing: timing.interval)}
    reasons: dict[str, dict[str, None]] = defaultdict(dict)
    for absent in cell.absent:
        reasons[column_of(absent)][absent.reason] = None
    texts = {column: f"{timing.interval}, {timing.contestant.form}, {timing.layout}" for column, timing in best.items()}
    top = max((timing.interval for timing in best.values()), default=None)
    level = [column for column, timing in best.items() if timing.interval.high >= top.low]
    winner = level[0] if len(level) == 1 else f"tie: {'; '.join(reversed(level))}"
    return {
        "fastest": Measurement(winner if len(best) > 1 else None, NOT_MEASURED),
        **{
            column: Measurement(texts.get(column), "; ".join(reasons[column]) or NOT_MEASURED)
            for column in dict.fromkeys((*COLUMNS, *texts, *reasons))
        },
    }


def column_of(entry: Entry) -> str:
    library = "ours" if entry.form in OURS else entry.form
    return entry.runtime if entry.runtime in EXPORTED else f"{library}, {entry.runtime}"


def beside_timm(measured: Measured) -> Iterator[tuple[str, str, str, float]]:
    """Model, device, task and speed over timm's, of our fastest form beside timm's class in one runtime and layout."""
    for record in measured.records["benchmark"]:
        for timing in timings(record):
            task, runtime = timing.cell.task, timing.contestant.runtime
            ratio = timing.times_timm(runtime)
            if timing.contestant.form == BEST[task] and ratio:
                where = task if runtime == "eager" else f"{task}, {runtime}"
                yield timing.cell.model, record.device(timing.cell), where, ratio.value


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
