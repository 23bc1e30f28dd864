"""The paper's figures from its tables, figures of measurements, and training curves."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from metaformer.analysis.measured import Measured
from metaformer.analysis.paper import ROOT, counted_value, rows_of
from metaformer.analysis.speed import column_of, timings
from metaformer.analysis.studies import paper_top1
from metaformer.errors import InputError
from metaformer.provenance import writing
from metaformer.records.statistics import Interval
from metaformer.variants import POOLFORMERS, ROWS

STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "metaformer"}
"""Settings of matplotlib for all figures; the salt makes the SVG files reproducible."""
COLOURS = ("#000000", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette for all kinds of colour vision; shapes and labels distinguish the lines in grey."""
STYLES = {
    "none": ("Convolutional network", "#000000", "s"),
    "attention": ("Attention", "#0072B2", "o"),
    "spatial MLP": ("Spatial MLP", "#009E73", "^"),
    "pooling": ("Pooling (PoolFormer)", "#D55E00", "D"),
}
FAMILIES = {"PoolFormer-": "pooling", "DeiT-": "attention", "ResMLP-": "spatial MLP", "RSB-ResNet-": "none"}
"""Figure 1b: prefix of the models of each line, and the style of the line."""


def fig1b() -> Figure:
    """Top-1 against MACs of PoolFormer, DeiT, ResMLP and RSB-ResNet (Figure 1b)."""
    figure = Figure(figsize=(5.2, 3.8))
    axes = figure.subplots()
    for start, mixer in FAMILIES.items():
        rows = [row for row in rows_of("table2") if row["model"].startswith(start)]
        points = [(float(counted_value(row["build"], "macs")), row["top1"]) for row in rows]
        _, colour, marker = STYLES[mixer]
        axes.plot(
            *zip(*points, strict=True), color=colour, marker=marker, label=start[:-1], linewidth=1.2, markersize=5
        )
        for row, point in zip(rows, points, strict=True):
            label(axes, row["model"].removeprefix(start), point, colour, below=mixer in ("none", "spatial MLP"))
    axes.set(xlim=(0, 25), xlabel="MACs, G (counted)", ylabel="ImageNet-1K top-1, % (paper)")
    axes.margins(y=0.1)
    axes.legend(loc="lower right", frameon=False)
    return figure


def fig3() -> Figure:
    """Top-1 against MACs and against parameters, by kind of token mixer (Figure 3)."""
    figure = Figure(figsize=(9.6, 4.4))
    both = figure.subplots(1, 2, sharey=True)
    panels = (("macs", "MACs, G", [2, 5, 10, 20, 50], 1.4), ("params", "parameters, M", [10, 20, 50, 100, 200, 300], 9))
    for axes, (column, title, ticks, left) in zip(both, panels, strict=True):
        for row in rows_of("table2"):
            kind, colour, marker = STYLES[row["mixer"]]
            point = (float(counted_value(row["build"], column)), row["top1"])
            axes.plot(*point, marker, color=colour, markersize=5, label=kind)
            if row["mixer"] == "pooling":
                label(axes, row["model"].removeprefix("PoolFormer-"), point, colour)
        axes.set(xscale="log", xlim=(left, None), xlabel=f"{title} (counted)")
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    both[0].set_ylabel("ImageNet-1K top-1, % (paper)")
    handles, labels = both[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    both[1].legend(unique.values(), unique.keys(), loc="lower right", frameon=False)
    return figure


def ablation() -> Figure:
    """Top-1 of the rows of Table 5 beside the baseline's."""
    rows = rows_of("table5")
    baseline, low = rows[0]["top1"], 72.8
    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure = Figure(figsize=(6.8, 5.6))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        colour, inside = COLOURS[groups.index(row["group"])], row["top1"] >= low
        x = row["top1"] if inside else low
        axes.plot([baseline, x], [y, y], color=colour, linewidth=2)
        axes.plot(x, y, "o" if inside else "<", color=colour, markersize=6, clip_on=False)
        difference = row["top1"] - baseline
        text = f"{row['top1']:.1f}" + (f" ({difference:+.1f})" if y else "")
        to_left = inside and difference < 0
        offset = (-7, 0) if to_left else (7, 0 if inside else 7)
        side = "right" if to_left else "left"
        axes.annotate(text, (x, y), offset, textcoords="offset points", ha=side, va="center", fontsize=8)
    axes.axvline(baseline, color="0.6", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.set(xlim=(low, 82.2), xlabel="ImageNet-1K top-1, % (paper, Table 5); arrows: below the axis")
    axes.invert_yaxis()
    return figure


def proxy() -> Figure | None:
    """Differences from the baseline's top-1 in the small studies, with 95 % intervals, beside the paper's.

    ``None`` if no study has two runs of a row.
    """
    differences: dict[str, dict[str, Interval]] = {}
    for name, results in Measured(ROOT / "analysis/results").studies.items():
        found = {row: results.estimate({row: 1, "baseline": -1}) for row in ROWS if row != "baseline"}
        if known := {row: interval for row, interval in found.items() if interval}:
            differences[name] = known
    if not differences:
        return None
    printed = paper_top1()
    rows = [row for row in ROWS if any(row in found for found in differences.values())]
    figure = Figure(figsize=(6.8, 1.2 + 0.32 * len(rows)))
    axes = figure.subplots()
    for i, (name, found) in enumerate(differences.items(), start=1):
        value, low, high, _ = np.array(list(found.values())).T
        places = [rows.index(row) + 0.18 * i for row in found]
        style = {"fmt": "o", "color": COLOURS[i % len(COLOURS)], "markersize": 4}
        axes.errorbar(value, places, xerr=[value - low, high - value], label=f"{name}, 95 % interval", **style)
    of_paper = {y: printed[row] - printed["baseline"] for y, row in enumerate(rows) if row in printed}
    axes.plot(
        of_paper.values(), of_paper.keys(), "D", color="black", markerfacecolor="none", label="paper, ImageNet-1K"
    )
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.set_xscale("symlog", linthresh=3)
    axes.xaxis.set_major_locator(FixedLocator([-80, -40, -20, -10, -5, -2, 0, 2, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:+g}")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlim=(-110, None), xlabel="top-1 minus the baseline's, points (linear to 3, then logarithmic)")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return figure


def growth() -> Figure | None:
    """Speed and memory of ours and of timm's class against batch, size and model; ``None`` if no record has them."""
    records = Measured(ROOT / "analysis/results").records["benchmark"]
    grown = [record for record in records if POOLFORMERS.keys() <= {cell.model for cell in record.cells}]
    if not grown:
        return None
    base = grown[-1].cells[0]
    models = list(dict.fromkeys([*POOLFORMERS, base.model]))
    axes_of = {
        "images in a batch": lambda cell: (cell.batch, (cell.model, cell.size)),
        "side of the images, pixels": lambda cell: (cell.size[0], (cell.model, cell.batch)),
        "model": lambda cell: (models.index(cell.model), (cell.batch, cell.size)),
    }
    alike = [timing for cell in grown[-1].cells if cell.precision == base.precision for timing in timings(cell)]
    device = grown[-1].device(base)
    figure = Figure(figsize=(9.6, 6.2))
    panels = figure.subplots(2, 3, sharex="col", sharey="row")
    for (above, below), (title, place_of) in zip(panels.T, axes_of.items(), strict=True):
        lines: dict[tuple[str, str], dict[Any, tuple[float, float]]] = defaultdict(dict)
        for timing in alike:
            place, others = place_of(timing.cell)
            if others == place_of(base)[1]:
                point = median(timing.images_per_s), (timing.contestant.peak_bytes or math.nan) / 1e6
                line = lines[column_of(timing.contestant), timing.cell.task]
                line[place] = max(line.get(place, (0, 0)), point)  # the fastest form and layout, as in the table
        for (column, task), points in lines.items():
            places = sorted(points)
            colour, dashes = COLOURS[4 if column.startswith("ours") else 1], "-" if task == "inference" else "--"
            for axes, values in zip((above, below), zip(*map(points.get, places), strict=True), strict=True):
                axes.plot(places, values, dashes, color=colour, marker=".", label=f"{column}, {task}")
        below.set_xlabel(title)
    for axes, heading in zip(panels[:, 0], ("images/s", "peak memory, MB"), strict=True):
        axes.set(yscale="log", ylabel=heading)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
    panels[1, 2].set_xticks(range(len(models)), [name.removeprefix("poolformer_").upper() for name in models])
    panels[0, 0].legend(frameon=False, fontsize=8)
    height, width = base.size
    figure.suptitle(f"{base.model}, {base.batch} x {height} x {width}, {base.precision}, where not varied; {device}")
    return figure


def curves(runs: list[Path]) -> Figure:
    """Training loss and accuracy of runs of one kind over their progress."""
    figure = Figure(figsize=(9.6, 3.8))
    loss, accuracy = figure.subplots(1, 2)
    dashes = ("-", "--", ":", "-.")
    for i, run in enumerate(runs):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": dashes[i // len(COLOURS) % len(dashes)]}
        try:
            losses, accuracies, kind = read_run(run)
        except (KeyError, ValueError) as error:  # of pandas and json, for a damaged file
            raise InputError(f"cannot draw the run {run}: {error}") from error
        if i and kind != accuracy.get_ylabel():
            raise InputError(f"{run} has {kind} and {runs[0]} {accuracy.get_ylabel()}: draw them in two figures")
        step = "epoch" if kind == "top-1, %" else "iteration"
        loss.set(xlabel=step, ylabel="training loss")
        accuracy.set(xlabel=step, ylabel=kind)
        loss.plot(losses.index, losses, label=run.resolve().name, **style)
        accuracy.plot(accuracies.index, accuracies, marker=".", label=run.resolve().name, **style)
    accuracy.legend(frameon=False)
    return figure


def read_run(run: Path) -> tuple[pd.Series, pd.Series, str]:
    """Training loss, accuracy and the accuracy's name, of a run folder (by epoch) or a work dir (by iteration)."""
    if (run / "metrics.csv").is_file():
        table = pd.read_csv(run / "metrics.csv").set_index("epoch")
        return table["train_loss"], table["top1"], "top-1, %"
    logs = sorted(run.glob("*/vis_data/scalars.json"))
    if not logs:
        raise InputError(f"{run} is no run: it has neither metrics.csv nor */vis_data/scalars.json")
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    losses = {line["iter"]: line["loss"] for line in lines if "loss" in line}
    # Validation is logged under its epoch.
    iterations = {line["epoch"]: line["iter"] for line in lines if "loss" in line and "epoch" in line}
    measures = {"coco/bbox_mAP": ("box AP, %", 100), "mIoU": ("mIoU, %", 1)}
    key = next((key for key in measures if any(key in line for line in lines)), None)
    name, scale = measures.get(key, ("accuracy", 1))
    accuracies = {iterations.get(line["step"], line["step"]): scale * line[key] for line in lines if key in line}
    return pd.Series(losses), pd.Series(accuracies, dtype=float), name


def label(axes: Axes, text: str, point: tuple[float, float], colour: str, below: bool = False) -> None:
    offset, side = ((4, -10), "left") if below else ((-4, 6), "center")
    axes.annotate(text, point, offset, textcoords="offset points", ha=side, fontsize=7, color=colour)


FIGURES: dict[str, Callable[[], Figure | None]] = {
    maker.__name__: maker for maker in (fig1b, fig3, ablation, proxy, growth)
}


def save(figure: Figure, stem: str, out: Path) -> Iterator[Path]:
    """Write a figure as PNG and SVG."""
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        path = out / f"{stem}.{kind}"
        with writing(path):
            out.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=200, bbox_inches="tight", metadata=metadata)
        yield path
