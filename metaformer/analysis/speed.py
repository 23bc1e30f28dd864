"""Tables of measured speed and memory, of the loader, of the cost of the paper's runs, and of parity."""

from collections import defaultdict
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from scipy.stats import binom

from metaformer.analysis.cells import NOT_MEASURED, Measurement, Number, Range, Row, Table, Verdict, rounded, spread
from metaformer.analysis.contestants import BEST, EXPORTED, OURS, PRECISIONS, TASKS
from metaformer.analysis.measured import Measured
from metaformer.analysis.paper import BUILT, captions, paper, rows_of, table_of
from metaformer.records.schema import Benchmark, Cell, Contestant, Entry, Loading, Parity, Spread
from metaformer.variants import POOLFORMERS

COLUMNS = (*(f"{library}, {mode}" for library in ("ours", "timm") for mode in ("eager", "compiled")), *EXPORTED)
"""Columns of the table ``fastest``; transformers' class has columns only where it was measured."""


class Timing(NamedTuple):
    """A contestant in a cell of a benchmark."""

    cell: Cell
    contestant: Contestant

    @property
    def images_per_s(self) -> list[float]:
        """By round."""
        return [self.cell.batch / seconds for seconds in self.contestant.seconds]

    @property
    def layout(self) -> str:
        return self.contestant.memory_format.replace("_", "-")

    def times_timm(self, runtime: str) -> Range | None:
        """The speed over that of timm's class in the same round and layout."""
        entry = ("timm", runtime, self.contestant.memory_format)
        found = [of for of in self.cell.contestants if (of.form, of.runtime, of.memory_format) == entry]
        return spread(self.times(found[0]), 2) if found else None

    def times(self, other: Contestant) -> list[float]:
        """The speed over that of another contestant, by round."""
        return [theirs / ours for theirs, ours in zip(other.seconds, self.contestant.seconds, strict=True)]

    def figures(self) -> Row:
        full, own_size = paper()["table2"]["data"], self.cell.size == (224, 224)
        hours = full["train_images"] * full["epochs"] / median(self.images_per_s) / 3600
        of, saved, peak = self.contestant, self.contestant.saved_bytes_per_image, self.contestant.peak_bytes
        return {
            "layout": self.layout,
            "task": self.cell.task,
            "form": of.form if of.runtime == "eager" else f"{of.form}, {of.runtime}",
            "images/s per device": Measurement(spread(self.images_per_s, 1)),
            "times timm": self.times_timm("eager"),
            "times timm, compiled": self.times_timm("compiled"),
            "saved, MB per image": None if saved is None else Number(saved / 1e6, 1),
            "peak, MB": None if peak is None else Number(peak / 1e6),
            "of the floor's speed": Number(100 * self.cell.floor.seconds / median(of.seconds), unit="%"),
            "device-hours": Number(hours) if self.cell.task == "training" and own_size else None,
        }


def interval(values: list[float]) -> Range:
    """Median with its 95 % interval, which order statistics bound whatever the distribution is.

    Fewer than 6 values have no such interval; their extremes take its place.
    """
    values = sorted(values)
    left_out = max(int(binom.ppf(0.025, len(values), 0.5)) - 1, 0)
    return Range(median(values), values[left_out], values[-1 - left_out], 1)


def timings(*cells: Cell) -> list[Timing]:
    """Every contestant in every cell."""
    return [Timing(cell, contestant) for cell in cells for contestant in cell.contestants]


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
        {**place(record, timing.cell), **timing.figures(), "measured": record.date[:10]}
        for record in benchmarks
        for timing in timings(*record.cells)
    ]
    found = {row["model"] for row in rows}
    missing = (model for model in POOLFORMERS if model not in found)
    rows += [{"model": model, "images/s per device": Measurement(None, NOT_MEASURED)} for model in missing]
    return table_of("speed", rows)


def fastest(measured: Measured) -> Table:
    """The fastest form and layout of every library and runtime in each cell, and the fastest of all."""
    records = measured.records["benchmark"]
    rows = [
        {**place(record, cell), "task": cell.task, **compared(cell), "measured": record.date[:10]}
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
    return table_of("fastest", rows)


def compared(cell: Cell) -> Row:
    """The row of a cell in :func:`fastest`."""
    entered = sorted(timings(cell), key=lambda timing: median(timing.images_per_s))
    best = {column_of(timing.contestant): timing for timing in entered}
    reasons: dict[str, dict[str, None]] = defaultdict(dict)
    for absent in cell.absent:
        reasons[column_of(absent)][absent.reason] = None
    texts = {
        column: f"{interval(timing.images_per_s)}, {timing.contestant.form}, {timing.layout}"
        for column, timing in best.items()
    }
    # Compared round by round, since the speed of a machine varies more between rounds than within one.
    level = [column for column, timing in best.items() if interval(timing.times(entered[-1].contestant)).high >= 1]
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
    """Model, device, task and speed over timm's, of our fastest form beside timm's class in one runtime and layout.

    Of several records of a setting on a device, the last one counts.
    """
    found = {}
    for record in measured.records["benchmark"]:
        for timing in timings(*record.cells):
            cell, runtime = timing.cell, timing.contestant.runtime
            ratio = timing.times_timm(runtime)
            if timing.contestant.form == BEST[cell.task] and ratio:
                where = cell.task if runtime == "eager" else f"{cell.task}, {runtime}"
                of = cell.model, record.device(cell), where
                found[(*of, cell.batch, cell.size, cell.precision, timing.layout)] = (*of, ratio.value)
    yield from found.values()


def cost(measured: Measured) -> Table:
    rows, totals = [], []
    for table in BUILT:
        data = paper()[table]["data"]
        images = data["iterations"] * data["batch"] if table == "table4" else data["train_images"] * data["epochs"]
        trained = {  # Table 2 has baselines that this repository does not train
            row.get("variant") or row.get("model") or f"{row['head']} {row['backbone']}": row["build"]
            for row in rows_of(table)
            if row.get("mixer", "pooling") == "pooling"
        }
        hours = defaultdict(dict)  # device to name of the row to device-hours
        for name, build in trained.items():
            cells = {"table": table, "row": name, "images in a full run": Number(images)}
            found = measured.of_model("training", build)
            for record in found:
                speed, device = record.images_per_s / record.devices, record.hardware.device
                hours[device][name] = rounded(images / speed / 3600, 0)
                measurement = {"images/s per device": Measurement(Number(speed, 1)), "device": device}
                measurement |= {"device-hours": Number(hours[device][name]), "measured": record.date[:10]}
                rows.append(cells | measurement)
            if not found:
                rows.append({**cells, "images/s per device": Measurement(None, NOT_MEASURED)})
        whole = [
            f"{Number(sum(of.values()))} device-hours on {device}"
            for device, of in hours.items()
            if of.keys() == trained.keys()
        ]
        done = set().union(*hours.values())
        totals.append(f"All of {table}: {'; '.join(whole) or f'{len(done)} of its {len(trained)} rows are measured'}.")
    return table_of("cost", rows, *totals)


def loader(measured: Measured) -> Table:
    records = measured.records["loader"]
    notes = [
        f'Milliseconds of a picture in each stage of the loader "pillow", in one process, {record.date[:10]}: '
        + ", ".join(f"{stage} {Number(of.median, 2)}" for stage, of in record.split_ms.items())
        for record in records
        if record.split_ms
    ]
    return table_of("loader", [row for record in records for row in loader_rows(record)], *notes)


def loader_rows(record: Loading) -> list[Row]:
    data = record.data
    return [
        {
            "decoder": name,
            "pictures": f"{Number(data.mean_width)} x {Number(data.mean_height)}, {Number(data.mean_bytes / 1000)} kB "
            f"on average, to {record.settings.img_size} px",
            "processor": record.hardware.processor,
            "workers": Number(record.workers),
            "decoding alone, images/s": measured_range(of.decode_images_per_s, 0),
            "whole loader, images/s per worker": measured_range(of.loader_images_per_s_per_worker, 0),
            "times Pillow": of.loader_relative_to_pillow and measured_range(of.loader_relative_to_pillow, 2),
            "measured": record.date[:10],
        }
        for name, of in record.decoders.items()
    ]


def measured_range(of: Spread, digits: int) -> Range:
    return Range(of.median, of.min, of.max, digits)


def parity(measured: Measured) -> Table:
    """The latest comparison."""
    records = measured.records["parity"][-1:]
    rows = [row for record in records for row in parity_rows(record)] or [{"part": None}]
    notes = [note.format(record) for record in records for note in captions()["tables"]["parity"]["compared"]]
    return table_of("parity", rows, *(notes or ["Not compared yet: analysis/parity.py compares."]))


def parity_rows(record: Parity) -> list[Row]:
    """A row for each comparison and each difference that remains."""
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
    for of in record.departures:
        verdict = Verdict("explained", of.reason)
        rows.append({"part": "departure", "compared": of.what, "largest difference": of.effect, "verdict": verdict})
    return rows
