"""The paper's tables: what is printed, beside what is counted and what was measured here.

python analysis/make_tables.py [TABLE...] [--format md,csv,tex] [--check]

TABLE is one of table1 to table7, claims, cost, speed, loader, proxy, conclusions and faults; all of them by default.
Writes analysis/tables/ and the marked sections of the README files, and prints a line for each table. --check writes
nothing, and fails if anything would change.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from itertools import groupby, product
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import pandas as pd
import yaml
from tqdm import tqdm

from metaformer.analysis.count import ROOT, cached_count
from metaformer.errors import InputError, nearest
from metaformer.provenance import write_file
from metaformer.records import Benchmark, Contestant, Faults, Loading, Record, Spread, Timed, Training, read_record
from metaformer.records.statistics import ROWS, Interval, Results, statements
from metaformer.variants import LABELS, POOLFORMERS, VARIANTS

FORMATS = ("md", "csv", "tex")
TEX = {"→": r"$\to$", "±": r"$\pm$", "α": r"$\alpha$", "β": r"$\beta$", "ε": r"$\varepsilon$"}  # noqa: RUF001
UNITS = {"params": 10**6, "frozen": 10**6, "macs": 10**9}
NOT_RUN, NOT_MEASURED = "not run", "not measured"
SPEED = "images/s per device"
TOP1 = "top-1 in the study, %"
SETTING = "batch, size and precision"
NOTHING = "-"

Row = dict[str, Any]


class Verdict(NamedTuple):
    """Of a computed cell: equal, explained, unexplained or not built. Of a claim: true or false. Of a statement: holds,
    fails, undecided or not run."""

    kind: str
    text: str = ""


class Pair(NamedTuple):
    """An accuracy: as printed, and as measured here."""

    paper: str
    here: str


class Table(NamedTuple):
    name: str
    title: str
    rows: list[Row]
    """Column to cell: a string, a :class:`Verdict` or a :class:`Pair`."""
    notes: list[str]

    def summary(self) -> str:
        cells = [cell for row in self.rows for cell in row.values()]
        verdicts = Counter(cell.kind for cell in cells if isinstance(cell, Verdict))
        accuracies = [cell.here for cell in cells if isinstance(cell, Pair) and cell.paper != NOTHING]
        speeds = [row[column] for row in self.rows for column in (SPEED, TOP1) if column in row]
        not_run = accuracies.count(NOT_RUN) + speeds.count(NOT_MEASURED) + speeds.count(NOT_RUN)
        parts = [f"{len(self.rows)} rows"]
        if computed := sum(verdicts[kind] for kind in ("equal", "explained", "unexplained")):
            detail = ", ".join(f"{verdicts[kind]} {kind}" for kind in ("equal", "explained", "unexplained"))
            parts.append(f"{computed} cells computed ({detail})")
        others = ("not built", "true", "false", "holds", "fails", "undecided", "not run")
        parts += [f"{verdicts[kind]} {kind}" for kind in others if verdicts[kind]]
        if accuracies or speeds:
            parts.append(f"{len(accuracies) + len(speeds) - not_run} measured, {not_run} {NOT_RUN}")
        return f"{self.name}: {'; '.join(parts)}"


@cache
def paper() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "analysis/paper.yaml").read_text(encoding="utf-8"))


# Computed cells


def counted_value(build: str, column: str) -> Decimal:
    """Parameters in millions or MACs in billions, exact."""
    counts = cached_count(build)
    number = {"params": counts["learnable"], "frozen": counts["frozen"], "macs": sum(counts["macs"].values())}[column]
    return Decimal(number) / UNITS[column]


def digits_of(printed: float) -> int:
    """Digits after the point: 12 has none, 3.0 one."""
    return len(str(printed).partition(".")[2])


def rounded(value: Decimal | float, digits: int) -> Decimal:
    return Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_HALF_UP)


def compare(row: Row, column: str) -> tuple[str, str, Verdict]:
    """The counted figure, its difference from the printed one, and the verdict."""
    printed = row[column]
    if "build" not in row:
        return NOTHING, NOTHING, Verdict("not built", row["not_built"])
    value, digits = counted_value(row["build"], column), digits_of(printed)
    shown, difference = rounded(value, digits + 2), value - Decimal(str(printed))
    explanation = row.get("explained", {}).get(column)
    if rounded(value, digits) == Decimal(str(printed)):
        verdict = Verdict("equal")
    elif explanation and holds(explanation["as"], row["build"], column, value, printed):
        verdict = explained(explanation)
    else:
        verdict = Verdict("unexplained", row.get("open", {}).get(column, ""))
    return str(shown), f"{rounded(difference, digits + 2):+}", verdict


def explained(explanation: Row) -> Verdict:
    sources = f" ({', '.join(explanation['source'])})" if "source" in explanation else ""
    return Verdict("explained", explanation["text"] + sources)


def holds(reason: str, build: str, column: str, value: Decimal, printed: float) -> bool:
    """Whether the arithmetic of an explanation (``as`` in paper.yaml) gives the printed figure."""
    target, digits = Decimal(str(printed)), digits_of(printed)
    if reason.startswith("counted "):
        return rounded(value, digits) == Decimal(reason.removeprefix("counted "))
    if reason == "truncated":
        return int(value * 10**digits) == int(target * 10**digits)
    if reason.startswith("without "):
        counts = cached_count(build)
        part = reason.removeprefix("without ")
        left_out = counts[part] if column == "params" else counts["macs"][part]
        return rounded(value - Decimal(left_out) / UNITS[column], digits) == target
    if reason.startswith("rounded from "):
        once = Decimal(reason.removeprefix("rounded from "))
        return rounded(value, digits + 1) == once and rounded(once, digits) == target
    raise ValueError(f"paper.yaml explains a figure by {reason!r}, which is no known reason")


def computed(row: Row, *columns: str) -> Row:
    names = {"params": "parameters, M", "frozen": "frozen, M", "macs": "MACs, G"}
    cells: Row = {}
    for column in columns:
        if column in row:
            counted, difference, verdict = compare(row, column)
            printed = str(row[column])
        else:
            printed, counted, difference, verdict = NOTHING, NOTHING, NOTHING, NOTHING
        name = names[column]
        figures = {"paper": printed, "counted": counted, "difference": difference, "verdict": verdict}
        cells |= {f"{name} ({what})": cell for what, cell in figures.items()}
    return cells


# Measured cells


class Measured:
    """The records of analysis/results/ by the row they belong to; what belongs to none is in ``problems``."""

    def __init__(self, folder: Path):
        self.by_row: dict[tuple[str, str], list[Record]] = defaultdict(list)
        self.speeds: dict[str, list[Training]] = defaultdict(list)
        self.benchmarks: dict[str, list[Benchmark]] = defaultdict(list)
        self.loaders: list[Loading] = []
        self.studies: dict[str, Results] = {}
        self.campaigns: list[Faults] = []
        self.problems: list[str] = []
        of_studies: dict[str, list[Training]] = defaultdict(list)
        for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*/*.json")):
            try:
                record = read_record(path)
                if isinstance(record, Training) and record.settings.study:
                    of_studies[record.settings.study].append(record)
                else:
                    self._place(path, record)
            except InputError as error:
                self.problems.append(str(error))
        for name, records in of_studies.items():
            try:
                self.studies[name] = Results(name, records)
            except InputError as error:
                self.problems.append(str(error))

    def _place(self, path: Path, record: Record) -> None:
        if isinstance(record, Faults):
            self.campaigns.append(record)
            return
        if isinstance(record, Loading):
            self.loaders.append(record)
            return
        # The first table that has the model: all of Table 5's baseline's figures are Table 2's.
        names = {key_of(row["build"]): (table, row) for table, row in reversed(list(built_rows()))}
        if record.model not in names:
            raise InputError(f"{path}: model {record.model!r} is in no table{nearest(record.model, names)}")
        if isinstance(record, Benchmark):
            self.benchmarks[record.model].append(record)
            return
        table, row = names[record.model]
        expected = paper()[table]["data"]
        if expected["kind"] == "classification" and record.kind in ("classification", "training"):
            size, own = getattr(record.settings, "img_size", None), row.get("image", 224)
            if size != own:
                raise InputError(f"{path}: settings.img_size is {size}, but {table} has {own}")
            if changed := getattr(record.settings, "model_args", {}):
                raise InputError(f"{path}: settings.model_args is {changed}, but {table} has {record.model} as it is")
        if isinstance(record, Training):
            self.speeds[record.model].append(record)
            return
        if record.data.classes != expected["classes"]:
            raise InputError(f"{path}: data of {record.data.classes} classes, but {table} has {expected['classes']}")
        if record.kind != expected["kind"]:
            raise InputError(f"{path}: a record of {record.kind}, but {table} is about {expected['kind']}")
        if record.images != expected["images"]:
            raise InputError(f"{path}: {record.images} images, but {table} is measured on {expected['images']}")
        epochs = record.training.epochs if record.kind == "classification" and record.training else 300
        known = [row["epochs"] for row in paper()["table7"]["rows"]]
        if epochs not in known:
            raise InputError(f"{path}: training.epochs is {epochs}, but the paper has {', '.join(map(str, known))}")
        self.by_row[record.model, str(epochs)].append(record)

    def cell(self, build: str | None, metric: Callable[[Record], float | None], epochs: int = 300) -> str:
        """What was measured, with the weights' file; mean and standard deviation of several runs."""
        by_file = defaultdict(list)
        for record in self.by_row[key_of(build), str(epochs)] if build else []:
            value = metric(record)
            if value is not None:
                by_file[record.checkpoint.file if record.checkpoint else "no checkpoint"].append(value)
        cells = [
            f"{mean(values):.1f} ± {stdev(values):.1f} of {len(values)} runs ({file})"
            if len(values) > 1
            else f"{values[0]:.1f} ({file})"
            for file, values in by_file.items()
        ]
        return "; ".join(cells) or NOT_RUN


def key_of(build: str) -> str:
    """What a record calls the model: timm's name, or a config without folder and ending."""
    return Path(build).stem if build.endswith(".py") else build


def built_rows() -> Iterator[tuple[str, Row]]:
    for table in ("table2", "table3", "table4", "table5"):
        yield from ((table, row) for row in paper()[table]["rows"] if "build" in row)


def top1(record: Record) -> float:
    return record.metrics.top1


def metric(name: str, scale: float = 1) -> Callable[[Record], float | None]:
    return lambda record: scale * record.metrics[name] if name in record.metrics else None


DETECTION = {
    "AP": "coco/bbox_mAP",
    "AP50": "coco/bbox_mAP_50",
    "AP75": "coco/bbox_mAP_75",
    "APS": "coco/bbox_mAP_s",
    "APM": "coco/bbox_mAP_m",
    "APL": "coco/bbox_mAP_l",
    "mask_AP": "coco/segm_mAP",
    "mask_AP50": "coco/segm_mAP_50",
    "mask_AP75": "coco/segm_mAP_75",
}
"""Columns of Table 3 and what mmdet calls them (as fractions)."""


# Tables


def table1(measured: Measured) -> Table:
    rows = []
    for row in paper()["table1"]["rows"]:
        arguments = VARIANTS[row["build"]].arguments
        same = list(arguments["depths"]) == row["blocks"] and list(arguments["dims"]) == row["dims"]
        rows.append(
            {
                "model": row["model"],
                "blocks": ", ".join(map(str, row["blocks"])),
                "channels": ", ".join(map(str, row["dims"])),
                "blocks and channels (verdict)": Verdict("equal" if same else "unexplained"),
                **computed(row, "params", "macs"),
                "parameters, exact": f"{cached_count(row['build'])['learnable']:,}",
            }
        )
    earlier = paper()["table1"]["other_versions"]["v1_or_v2"]
    versions = ", ".join(f"{earlier[row['model'].removeprefix('PoolFormer-')]} G" for row in paper()["table1"]["rows"])
    notes = [
        "MACs at 224 pixels, by fvcore, as in version 3 of the paper.",
        f"Version 1 or 2 printed {versions}, counted by another script ({', '.join(earlier['source'])}).",
    ]
    return Table("table1", paper()["table1"]["title"], rows, notes)


def table2(measured: Measured) -> Table:
    rows = [
        {
            "model": row["model"],
            "token mixer": row["mixer"],
            "image": str(row["image"]),
            **computed(row, "params", "macs"),
            "top-1, %": Pair(str(row["top1"]), measured.cell(row.get("build"), top1)),
            "released weights in timm": f"{row['timm']['top1']:.2f}" if "timm" in row else NOTHING,
            "in mmpretrain": f"{row['mmpretrain']:.2f}" if "mmpretrain" in row else NOTHING,
        }
        for row in paper()["table2"]["rows"]
    ]
    quoted = "Released weights as evaluated by others: " + " and ".join(
        paper()["sources"][source] for source in ("TIMM", "MMPRETRAIN")
    )
    return Table("table2", paper()["table2"]["title"], rows, [*paper()["table2"]["notes"], quoted + "."])


def table3(measured: Measured) -> Table:
    rows = [
        {
            "head": row["head"],
            "backbone": row["backbone"],
            **computed(row, "params"),
            "MACs, G (counted)": str(rounded(counted_value(row["build"], "macs"), 1)),
            **{
                f"{column.replace('_', ' ')}, %": Pair(str(row[column]), measured.cell(row["build"], metric(key, 100)))
                if column in row
                else Pair(NOTHING, NOTHING)
                for column, key in DETECTION.items()
            },
        }
        for row in paper()["table3"]["rows"]
    ]
    how = (
        "MACs at 800 x 1280 pixels by fvcore, Mask R-CNN's second stage on 1000 boxes and 100 masks without RoIAlign; "
        "the paper gives none."
    )
    return Table("table3", paper()["table3"]["title"], rows, [*paper()["table3"]["notes"], how])


def table4(measured: Measured) -> Table:
    rows = [
        {
            "backbone": row["model"],
            **computed(row, "params"),
            "MACs, G (counted)": str(rounded(counted_value(row["build"], "macs"), 1)),
            "mIoU, %": Pair(str(row["mIoU"]), measured.cell(row["build"], metric("mIoU"))),
            "released weights in mmseg": f"{row['mmseg']:.2f}" if "mmseg" in row else NOTHING,
        }
        for row in paper()["table4"]["rows"]
    ]
    how = [
        "MACs at 512 x 512 pixels by fvcore; the paper gives none.",
        f"Released weights as evaluated by others: {paper()['sources']['MMSEG']}, pull request 1537.",
    ]
    return Table("table4", paper()["table4"]["title"], rows, [*paper()["table4"]["notes"], *how])


def table5(measured: Measured) -> Table:
    rows = [
        {
            "ablation": row["group"],
            "variant": row["variant"],
            "model": row["build"],
            **computed(row, "params", "frozen", "macs"),
            "top-1, %": Pair(str(row["top1"]), measured.cell(row["build"], top1)),
        }
        for row in paper()["table5"]["rows"]
    ]
    return Table("table5", paper()["table5"]["title"], rows, paper()["table5"]["notes"])


def table6(measured: Measured) -> Table:
    configs = [read_recipe(name) for name in ("s12", "s24", "s36", "m36", "m48")]
    rows = []
    for row in paper()["table6"]["rows"]:
        printed, setting = row["printed"], row["setting"]
        if setting is None:
            here, same = row["here"], printed in (0, "off")
        else:
            values = [config[setting] for config in configs]
            per_variant = isinstance(printed, list) and "one" not in row
            here = values if per_variant else values[0]
            same = here == printed and (per_variant or all(value == values[0] for value in values))
        if same:
            verdict = Verdict("equal", row.get("note", ""))
        else:
            verdict = explained(row["explained"]) if "explained" in row else Verdict("unexplained")
        cells = {"hyper-parameter": row["name"], "setting": setting or NOTHING, "paper": in_words(printed)}
        rows.append({**cells, "configs": in_words(here), "verdict": verdict})
    note = "configs: configs/classification/poolformer_*.yaml; lists are for S12, S24, S36, M36 and M48."
    return Table("table6", paper()["table6"]["title"], rows, [note])


def in_words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value))
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def read_recipe(variant: str) -> Row:
    """The settings of a variant's config, with the learning rate that follows and what comes with the model."""
    folder = ROOT / "configs/classification"
    own = yaml.safe_load((folder / f"poolformer_{variant}.yaml").read_text(encoding="utf-8"))
    settings = {**yaml.safe_load((folder / own["base"]).read_text(encoding="utf-8")), **own}
    settings["peak_lr"] = settings["base_lr"] * settings["global_batch"] / 1024
    return {**VARIANTS[settings["model"]].arguments, **settings}


def table7(measured: Measured) -> Table:
    rows = [
        {
            "epochs": str(row["epochs"]),
            "top-1, %": Pair(str(row["top1"]), measured.cell(row["build"], top1, row["epochs"])),
        }
        for row in paper()["table7"]["rows"]
    ]
    return Table("table7", paper()["table7"]["title"], rows, [])


def claims(measured: Measured) -> Table:
    rows = []
    for row in paper()["claims"]["rows"]:
        cells = {"where": row["where"], "claim": row["claim"]}
        for name, counted in (("printed", False), ("counted", True)):
            of, than = (figure(row[side], counted) for side in ("of", "than"))
            value, arithmetic = {
                "less": (100 * (1 - of / than), f"1 - {of:g} / {than:g}"),
                "more": (100 * (of / than - 1), f"{of:g} / {than:g} - 1"),
                "times": (of / than, f"{of:g} / {than:g}"),
                "minus": (of - than, f"{of:g} - {than:g}"),
            }[row["kind"]]
            digits = digits_of(row["printed"])
            true = rounded(value, digits) == Decimal(str(row["printed"]))
            percent = " %" if row["kind"] in ("less", "more") else ""
            if counted and row["of"][2] == "top1":
                shown, verdict = NOTHING, NOTHING
            else:
                shown = f"{arithmetic} = {rounded(value, digits + 1)}{percent}"
                verdict = Verdict("true" if true else "false")
            cells |= {f"{name} figures": shown, f"{name} figures agree": verdict}
        cells["note"] = row.get("note", "")
        rows.append(cells)
    note = "Counted figures are taken in thousandths of a million parameters and of a billion MACs."
    return Table("claims", paper()["claims"]["title"], rows, [note])


def figure(place: tuple[str, str | int, str], counted: bool) -> Decimal:
    """The figure in a table's row and column, as printed, or as counted where it can be."""
    table, name, column = place
    row = next(row for row in paper()[table]["rows"] if name in (row.get("id"), row.get("model"), row.get("epochs")))
    if counted and column in UNITS:
        return rounded(counted_value(row["build"], column), 3)
    return Decimal(str(row[column]))


def cost(measured: Measured) -> Table:
    rows = []
    for table, row in built_rows():
        data = paper()[table]["data"]
        name = row.get("variant") or row.get("model") or f"{row['head']} {row['backbone']}"
        if row.get("mixer", "pooling") != "pooling":
            continue  # a baseline that this repository does not train
        images = data["iterations"] * data["batch"] if table == "table4" else data["train_images"] * data["epochs"]
        speeds = measured.speeds[key_of(row["build"])]
        base = {"table": table, "row": name, "images in a full run": f"{images:,}"}
        for record in sorted(speeds, key=lambda record: record.date) or [None]:
            cells = {SPEED: NOT_MEASURED, **dict.fromkeys(("device", "device-hours", "measured"), NOTHING)}
            if record:
                speed = record.images_per_s / record.devices
                cells = {
                    SPEED: f"{speed:.1f}",
                    "device": record.hardware.device,
                    "device-hours": f"{images / speed / 3600:,.0f}",
                    "measured": record.date[:10],
                }
            rows.append({**base, **cells})
    notes = [
        "A full run is the paper's: 300 epochs of ImageNet-1K, 12 of COCO, 40,000 iterations of 32 pictures on ADE20K.",
        "Speeds are those of training runs in analysis/results/; validation is not included.",
        *map(total, groupby(rows, key=lambda row: row["table"])),
    ]
    return Table("cost", "Cost of the paper's runs, from measured training speeds", rows, notes)


def total(group: tuple[str, Iterator[Row]]) -> str:
    """All of a table on each device that all its rows were measured on."""
    table, rows = group[0], list(group[1])
    names = {row["row"] for row in rows}
    hours: dict[str, dict[str, int]] = defaultdict(dict)
    for row in rows:
        if row[SPEED] != NOT_MEASURED:
            hours[row["device"]][row["row"]] = int(row["device-hours"].replace(",", ""))
    whole = [f"{sum(of.values()):,} device-hours on {device}" for device, of in hours.items() if of.keys() == names]
    done = {name for of in hours.values() for name in of}
    return f"All of {table}: {'; '.join(whole) or f'{len(done)} of its {len(names)} rows are measured'}."


def speed(measured: Measured) -> Table:
    rows = []
    for model in dict.fromkeys([*POOLFORMERS, *measured.benchmarks]):
        records = sorted(measured.benchmarks[model], key=lambda record: record.date)
        rows += [row for record in records for row in speed_rows(record)] or [
            {"model": model, "device": NOTHING, SETTING: NOTHING, "task": NOTHING, "form": NOTHING, SPEED: NOT_MEASURED}
        ]
    notes = [
        "Medians of all rounds, with the least and the most. Times timm: the speed over that of timm's class, eager or "
        "compiled, in the same round.",
        "A training step is forward, loss and backward, without the optimiser. What is saved is kept from forward to "
        "backward; analysis/benchmark.py says what the floor is.",
        "Device-hours are those of 300 epochs of ImageNet-1K, the paper's training, of nothing but such steps.",
    ]
    return Table("speed", "Speed and memory of the forms of a model, in benchmarks on one device", rows, notes)


def faults(measured: Measured) -> Table:
    """The latest campaign."""
    columns, notes = ("tried", "survived", "lost"), []
    rows = [{"fault": NOTHING, "tried": NOT_MEASURED, "survived": NOTHING, "lost": NOTHING}]
    if measured.campaigns:
        record = max(measured.campaigns, key=lambda record: record.date)
        rows = [
            {"fault": row.fault, **{column: str(getattr(row, column)) for column in columns}} for row in record.faults
        ]
        rows.append({"fault": "all", **{column: str(sum(int(row[column]) for row in rows)) for column in columns}})
        notes = [f"{record.date[:10]}, {record.hardware.processor}: `{record.command}`."]
    notes = [
        "A run that was killed or failed has survived if it then continues and ends as one that was left alone, with "
        "the same weights, optimizer, curve and events to the last bit, in float32 on a CPU.",
        "What was corrupted has survived if it is refused in one sentence or read as before, and nothing in it is "
        "executed. Where a format has no checksums (configs, records, the numbers in safetensors), what is wrong but "
        "well-formed cannot be told; tests/faults.py says what is tried.",
        *notes,
    ]
    return Table("faults", "Faults tried on training runs and on what they read", rows, notes)


def speed_rows(record: Benchmark) -> list[Row]:
    """A row for each contestant in each task of a benchmark."""
    settings, full = record.settings, paper()["table2"]["data"]
    own_size = settings.size == (224, 224)
    rows = []
    for timed in record.tasks:
        for contestant in timed.contestants:
            images_per_s = [settings.batch / seconds for seconds in contestant.seconds]
            hours = full["train_images"] * full["epochs"] / median(images_per_s) / 3600
            saved, peak = contestant.saved_bytes_per_image, contestant.peak_bytes
            rows.append(
                {
                    "model": record.model,
                    "device": record.device,
                    SETTING: in_short(record),
                    "task": timed.task,
                    "form": f"{contestant.form}, compiled" if contestant.compiled else contestant.form,
                    SPEED: spread(images_per_s, 1),
                    "times timm": times_timm(timed, contestant, compiled=False),
                    "times timm, compiled": times_timm(timed, contestant, compiled=True),
                    "saved, MB per image": NOTHING if saved is None else f"{saved / 1e6:.1f}",
                    "peak, MB": NOTHING if peak is None else f"{peak / 1e6:,.0f}",
                    "of the floor's speed": f"{100 * timed.floor.seconds / median(contestant.seconds):.0f} %",
                    "device-hours": f"{hours:,.0f}" if timed.task == "training" and own_size else NOTHING,
                    "measured": record.date[:10],
                }
            )
    return rows


def beside_timm(record: Benchmark) -> Iterator[Row]:
    """A row for each task and mode of a benchmark that has timm's class and our fastest form for the task."""
    form = {"inference": "folded", "training": "fused"}
    rows = {(row["task"], row["form"]): row for row in speed_rows(record)}
    for timed in record.tasks:
        for mode in ("", ", compiled"):
            ours, timm = (rows.get((timed.task, name + mode)) for name in (form[timed.task], "timm"))
            if ours and timm:
                yield {
                    **{column: ours[column] for column in ("model", "device", SETTING)},
                    "task": timed.task + mode,
                    **{f"images/s, {name}": row[SPEED] for name, row in (("timm", timm), ("ours", ours))},
                    "ratio, round by round": ours["times timm, compiled" if mode else "times timm"],
                    "saved by autograd, MB per image: timm / ours": NOTHING
                    if timed.task == "inference"
                    else f"{timm['saved, MB per image']} / {ours['saved, MB per image']}",
                }


def in_short(record: Benchmark) -> str:
    settings = record.settings
    height, width = settings.size
    return f"{settings.batch} x {height} x {width}, {settings.precision}, {settings.memory_format.replace('_', '-')}"


def spread(values: list[float], digits: int) -> str:
    low, high = (f"{value:,.{digits}f}" for value in (min(values), max(values)))
    return f"{median(values):,.{digits}f} ({low} to {high})"


def times_timm(timed: Timed, contestant: Contestant, compiled: bool) -> str:
    """The speed over timm's, round by round."""
    timm = next((c for c in timed.contestants if c.form == "timm" and c.compiled == compiled), None)
    if timm is None:
        return NOTHING
    return spread([theirs / ours for theirs, ours in zip(timm.seconds, contestant.seconds, strict=True)], 2)


def loader(measured: Measured) -> Table:
    rows = [
        {
            "decoder": name,
            "pictures": f"{record.data.mean_width:.0f} x {record.data.mean_height:.0f}, "
            f"{record.data.mean_bytes / 1000:.0f} kB on average, to {record.settings.img_size} px",
            "processor": record.hardware.processor,
            "workers": str(record.workers),
            "decoding alone, images/s": in_spread(of.decode_images_per_s, 0),
            "whole loader, images/s per worker": in_spread(of.loader_images_per_s_per_worker, 0),
            "times Pillow": in_spread(of.loader_relative_to_pillow, 2),
            "workers for": f"{record.consume_images_per_s:,g} images/s: {of.workers_needed}"
            if record.consume_images_per_s
            else NOTHING,
            "measured": record.date[:10],
        }
        for record in sorted(measured.loaders, key=lambda record: record.date)
        for name, of in record.decoders.items()
    ]
    notes = [
        "The training loader with the paper's augmentation, on JPEGs from the file cache; medians of rounds in which "
        "the decoders take turns, with the least and the most. Training decodes with Pillow.",
        "What a GPU takes is images/s in speed.md, or in the run.json of a run; analysis/loader.py --consume divides.",
    ]
    return Table("loader", "What the training loader delivers", rows, notes)


def in_spread(of: Spread, digits: int) -> str:
    median, low, high = (f"{value:,.{digits}f}" for value in (of.median, of.min, of.max))
    return f"{median} ({low} to {high})"


def proxy(measured: Measured) -> Table:
    rows, notes = [], []
    for name, results in studies(measured):
        rows += [study_row(name, row, results) for row in ROWS if row in {*results.study.rows, *results.top1}]
        notes += study_notes(name, results)
    notes.append(
        "Top-1 of the last epoch: means with 95 % intervals over the seeds, and differences from the baseline with "
        "theirs (Welch). analysis/proxy.py has the formulas; a run that diverged counts as guessing."
    )
    return Table("proxy", "The ablation at a small scale", rows, notes)


def studies(measured: Measured) -> Iterator[tuple[str, Results]]:
    yield from sorted(measured.studies.items())


def study_row(name: str, row: str, results: Results) -> Row:
    paper_rows = {of["build"]: of for of in paper()["table5"]["rows"]}
    printed = paper_rows.get(ROWS[row]["model"]) if ROWS[row].keys() == {"model"} else None
    baseline = paper_rows[ROWS["baseline"]["model"]]
    values = list(results.top1.get(row, {}).values())
    own = results.combination({row: 1})
    difference = results.combination({row: 1, "baseline": -1}) if row != "baseline" else None
    shown = f"{own.value:.1f} ± {own.high - own.value:.1f}" if own else f"{mean(values):.1f}" if values else NOT_RUN
    diverged = results.diverged.get(row, 0)
    return {
        "study": name,
        "row": row,
        "variant": printed["variant"] if printed else LABELS[row],
        "top-1 in the paper, %": str(printed["top1"]) if printed else NOTHING,
        "difference in the paper": NOTHING
        if not printed or row == "baseline"
        else f"{rounded(Decimal(str(printed['top1'])) - Decimal(str(baseline['top1'])), 1):+}",
        "runs": str(len(values)) + (f", {diverged} diverged" if diverged else ""),
        TOP1: shown,
        "difference in the study": str(difference) if difference else NOTHING,
    }


def study_notes(name: str, results: Results) -> Iterator[str]:
    yield f"{name}: {results.study.title}. {results.study.note}"
    yield cost_of(name, results)
    by_build = {of["model"]: row for row, of in ROWS.items() if of.keys() == {"model"}}
    top1_of = {by_build[of["build"]]: of["top1"] for of in paper()["table5"]["rows"]}
    number, r = results.rank_correlation(top1_of)
    if r:
        interval = f"95 % interval {r.low:.2f} to {r.high:.2f}" if r.low < r.high else "no interval, as it is perfect"
        yield f"{name}: Spearman's rank correlation with the paper over {number} rows: {r.value:.2f} ({interval})."


def cost_of(name: str, results: Results) -> str:
    planned = set(product(results.study.rows, results.study.seeds))
    missing = len(planned - {(record.settings.row, record.seed) for record in results.records})
    hardware = ", ".join(dict.fromkeys(record.hardware.device for record in results.records))
    hours = sum(record.wall_s or 0 for record in results.records) / 3600
    partial = f"; partial, {missing} of the {len(planned)} planned are missing" if missing else ""
    return f"{name}: {len(results.records)} runs, {hours:.1f} hours added up, on {hardware}{partial}."


def conclusions(measured: Measured) -> Table:
    rows = []
    for name, results in studies(measured):
        for origin, of in (("the paper", "conclusions"), ("users", "questions")):
            for statement in statements()[of]:
                verdict, sums = results.judge(statement["tests"])
                rows.append(
                    {
                        "study": name,
                        "of": origin,
                        "statement": statement["text"],
                        "verdict": Verdict(verdict),
                        "tested": "; ".join(map(in_signs, statement["tests"], sums)),
                    }
                )
    notes = [
        "Statements and tests are in analysis/statements.yaml, fixed before the studies were run: each sum must be "
        "above 0. One fails where the 95 % interval of a sum is below 0, and is undecided where one has 0 in it.",
        "A verdict is about the study's task and scale; it does not show the paper wrong or right on ImageNet.",
    ]
    return Table("conclusions", "The conclusions of section 4.4 at a small scale", rows, notes)


def in_signs(weights: dict[str, float], value: Interval | None) -> str:
    terms = " ".join(
        f"{'-' if weight < 0 else '+'} {'' if abs(weight) == 1 else f'{abs(weight):g} '}{name}"
        for name, weight in weights.items()
    )
    return f"{terms.removeprefix('+ ')}: {value or NOT_RUN}"


MAKERS = {
    maker.__name__: maker
    for maker in (
        *(table1, table2, table3, table4, table5, table6, table7),
        *(claims, cost, speed, loader, proxy, conclusions, faults),
    )
}


# Rendering


def render(table: Table, kind: str) -> str:
    notes = list(table.notes)
    rows = [
        {name: text for column, cell in row.items() for name, text in cells_of(column, cell, kind, notes)}
        for row in table.rows
    ]
    frame = pd.DataFrame(rows).fillna(NOTHING)
    if kind == "csv":
        return frame.to_csv(index=False)
    frame = frame.loc[:, [column for column in frame.columns if not (frame[column] == "").all()]]
    if kind == "md":
        lines = [f"# {table.title}", "", markdown(frame), "", *(f"- {note}" for note in notes)]
        return "\n".join(lines).rstrip() + "\n"
    body = frame.to_latex(index=False, escape=True, column_format="l" * len(frame.columns))
    for letter, command in TEX.items():
        body = body.replace(letter, command)
    return "".join(f"% {line}\n" for line in (table.title, *notes)) + body


def cells_of(column: str, cell: Any, kind: str, notes: list[str]) -> Iterator[tuple[str, str]]:
    """The columns and texts that a cell becomes. Texts of verdicts go to numbered notes, in CSV into the cell."""
    if isinstance(cell, Verdict):
        if kind == "csv" or not cell.text:
            yield column, f"{cell.kind}: {cell.text}" if cell.text else cell.kind
            return
        numbered = [note for note in notes if re.match(r"\[\d+\] ", note)]
        texts = [note.partition(" ")[2] for note in numbered]
        if cell.text not in texts:
            notes.append(f"[{len(texts) + 1}] {cell.text}")
            texts.append(cell.text)
        yield column, f"{cell.kind} [{texts.index(cell.text) + 1}]"
    elif isinstance(cell, Pair):
        if kind == "csv":
            yield f"{column} (paper)", cell.paper
            yield f"{column} (here)", cell.here
        else:
            yield f"{column} (paper / here)", NOTHING if cell.paper == NOTHING else " / ".join(cell)
    else:
        yield column, cell


def markdown(frame: pd.DataFrame) -> str:
    return frame.to_markdown(index=False, disable_numparse=True, tablefmt="github")


def readme_sections(tables: dict[str, Table], measured: Measured) -> dict[tuple[str, str], str]:
    """(README file, name of the section) to its text, for the sections that the tables at hand fill."""
    sections = {}
    if "table2" in tables:
        rows = [
            {
                "config (`configs/classification/`)": f"`{row['build']}.yaml`",
                "parameters": f"{cached_count(row['build'])['learnable']:,}",
                "MACs": f"{rounded(counted_value(row['build'], 'macs'), 2)} G",
                "top-1 in the paper (Table 2)": f"{row['top1']} %",
                "measured here": measured.cell(row["build"], top1),
            }
            for row in paper()["table2"]["rows"]
            if row["mixer"] == "pooling"
        ]
        sections["README.md", "imagenet"] = markdown(pd.DataFrame(rows))
    if "table5" in tables:
        rows = [
            {
                "Table 5": row["variant"],
                "model": f"`{row['build']}`",
                "parameters": f"{rounded(counted_value(row['build'], 'params'), 2)} M",
                "MACs": f"{rounded(counted_value(row['build'], 'macs'), 2)} G",
                "top-1 in the paper": f"{row['top1']} %",
                "measured here": measured.cell(row["build"], top1),
            }
            for row in paper()["table5"]["rows"]
        ]
        sections["classification/README.md", "ablation"] = markdown(pd.DataFrame(rows))
    if "table3" in tables:
        rows = [
            {
                "config (`configs/detection/`)": f"`{Path(row['build']).name}`",
                "parameters": f"{rounded(counted_value(row['build'], 'params'), 1)} M",
                "box AP in the paper": str(row["AP"]),
                "mask AP in the paper": str(row.get("mask_AP", NOTHING)),
                "box AP measured here": measured.cell(row["build"], metric(DETECTION["AP"], 100)),
                "mask AP measured here": measured.cell(row["build"], metric(DETECTION["mask_AP"], 100))
                if "mask_AP" in row
                else NOTHING,
            }
            for row in paper()["table3"]["rows"]
        ]
        sections["detection/README.md", "coco"] = markdown(pd.DataFrame(rows))
    if "table4" in tables:
        rows = [
            {
                "config (`configs/segmentation/`)": f"`{Path(row['build']).name}`",
                "parameters": f"{rounded(counted_value(row['build'], 'params'), 1)} M",
                "mIoU in the paper": str(row["mIoU"]),
                "measured here": measured.cell(row["build"], metric("mIoU")),
            }
            for row in paper()["table4"]["rows"]
        ]
        sections["segmentation/README.md", "ade20k"] = markdown(pd.DataFrame(rows))
    if "speed" in tables:
        records = [record for of in measured.benchmarks.values() for record in of]
        rows = [row for record in sorted(records, key=lambda record: record.date) for row in beside_timm(record)]
        sections["README.md", "speed"] = markdown(pd.DataFrame(rows)) if rows else "Not measured yet."
    if "conclusions" in tables:
        sections["README.md", "conclusions"] = verdicts(tables["conclusions"], measured)
    if "faults" in tables:
        text = render(tables["faults"], "md").partition("\n\n")[2].partition("\n\n")[0]
        sections["README.md", "faults"] = text if measured.campaigns else "Not measured yet."
    if tables.keys() == MAKERS.keys():
        summary = "\n".join(f"- {table.summary()}" for table in tables.values())
        sections["analysis/README.md", "summary"] = summary
    return sections


def verdicts(table: Table, measured: Measured) -> str:
    """A row for each statement, a column for each study, and what the studies took."""
    rows: dict[str, Row] = {}
    for row in table.rows:
        rows.setdefault(row["statement"], {"at this scale": row["statement"]})[row["study"]] = row["verdict"].kind
    if not rows:
        return "Not run yet."
    costs = [f"- {cost_of(name, results)}" for name, results in studies(measured)]
    return "\n".join([markdown(pd.DataFrame(rows.values()).fillna(NOT_RUN)), "", *costs])


def with_section(text: str, name: str, content: str, path: Path) -> str:
    """``text`` with ``content`` between the marks of section ``name``."""
    begin, end = f"<!-- begin {name}: written by analysis/make_tables.py -->\n", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise InputError(f"{path} has no section {name!r}: put the lines {begin.strip()} and {end} around its place")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}{content}\n{end}{after}"


# The command


def builds_of(names: list[str]) -> list[str]:
    """The models that these tables count, each once."""
    counted = {name: [name] for name in ("table1", "table2", "table3", "table4", "table5")}
    counted["claims"] = ["table2", "table5"]
    rows = [row for name in names for table in counted.get(name, []) for row in paper()[table]["rows"]]
    return list(dict.fromkeys(row["build"] for row in rows if "build" in row))


def outputs(tables: dict[str, Table], formats: list[str], measured: Measured) -> dict[Path, str]:
    """Every file that the tables make, and what is to be in it."""
    folder = ROOT / "analysis/tables"
    files = {folder / f"{name}.{kind}": render(table, kind) for name, table in tables.items() for kind in formats}
    for (readme, section), content in readme_sections(tables, measured).items():
        path = ROOT / readme
        text = files.get(path) or path.read_text(encoding="utf-8")
        files[path] = with_section(text, section, content, path)
    return files


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(MAKERS)}; all by default")
    parser.add_argument("--format", default=",".join(FORMATS), help="any of md, csv and tex (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything would change")
    options = parser.parse_args(arguments)
    for name in options.tables:
        if name not in MAKERS:
            raise InputError(f"there is no table {name!r}{nearest(name, MAKERS)}: there are {', '.join(MAKERS)}")
    formats = options.format.split(",")
    for kind in formats:
        if kind not in FORMATS:
            raise InputError(f"there is no format {kind!r}{nearest(kind, FORMATS)}: there are {', '.join(FORMATS)}")

    names = options.tables or list(MAKERS)
    for build in tqdm(builds_of(names), desc="counting", unit="model", disable=None):
        cached_count(build)
    measured = Measured(ROOT / "analysis/results")
    tables = {name: MAKERS[name](measured) for name in names}
    files = outputs(tables, formats, measured)
    changed = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if not options.check:
        for path in changed:
            path.parent.mkdir(exist_ok=True)
            write_file(path, lambda file, text=files[path]: file.write(text.encode()))
    for table in tables.values():
        print(table.summary())
    for problem in measured.problems:
        print(f"error: {problem}", file=sys.stderr)
    if options.check and changed:
        stale = ", ".join(str(path.relative_to(ROOT)) for path in changed)
        print(f"error: out of date: {stale}; run python analysis/make_tables.py", file=sys.stderr)
        return 1
    return 2 if measured.problems else 0
