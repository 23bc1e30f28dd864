"""Benchmarks: what is compared is the same model, what is counted is right, and the record reaches the table."""

import importlib.util
import io
import json
import weakref
from copy import deepcopy
from functools import partial
from itertools import product
from statistics import median
from types import SimpleNamespace

import pandas as pd
import pytest
import timm
import timm.models.metaformer as timm_metaformer
import torch
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils.flop_counter import FlopCounterMode

from metaformer import InputError, records
from metaformer.analysis import benchmark, cells, contestants, figures, outputs, speed
from metaformer.analysis.measured import Measured
from metaformer.export import largest_error
from metaformer.variants import POOLFORMERS
from oracles import relative_error

CPU = "cpu"
ALL = [*contestants.OURS, *contestants.OTHERS]


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads wait long for each other where others work too, and the models here are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cell(task: str = "inference", **changes) -> contestants.Cell:
    return contestants.Cell(task, "poolformer_s12", 1, (64, 64), "float32", CPU)._replace(**changes)


def entries(cell: contestants.Cell, forms=ALL, runtimes=("eager",)) -> list[contestants.Entry]:
    return contestants.entries(cell.task, cell.model, forms, runtimes, ["channels_last"])


def toy(model: nn.Module, *shape: int, runtime: str = "eager") -> contestants.Contestant:
    """A contestant of any model on ones of a shape; what is timed is the forward pass."""
    images, entry = torch.ones(shape), contestants.Entry("toy", runtime, "contiguous")
    return contestants.Contestant(entry, model, lambda: model(images), lambda: model(images))


# What is compared


def test_all_forms_are_the_same_model():
    small = cell(batch=2)
    entered = {entry.form: contestants.contestant(entry, small) for entry in entries(small)}
    logits = {form: contestant.call() for form, contestant in entered.items()}
    assert list(logits) == ALL
    assert not any(output.requires_grad for output in logits.values())
    for form in ("fused", "folded", "transformers"):
        assert relative_error(logits[form], logits["plain"]) < 1e-4
    # timm's averages before the last norm: its logits are others, its map before that is not.
    assert type(entered["timm"].model).__module__ == "timm.models.metaformer"
    assert relative_error(logits["timm"], contestants.reference("timm", small)[0]) < 1e-4
    assert relative_error(logits["timm"], logits["plain"]) > 1e-3


def test_files_are_the_same_model(monkeypatch):
    """Of one block in each stage."""
    build = timm_metaformer.poolformer_s12

    def shallow() -> nn.Module:
        model = build()
        for stage in model.stages:
            stage.blocks = stage.blocks[:1]
        return model

    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depths=[1, 1, 1, 1]))
    monkeypatch.setattr(timm_metaformer, "poolformer_s12", shallow)
    small = cell(batch=3)  # no other test has this cell, whose weights and outputs are kept
    compared = entries(small, ["fused", "folded", "timm"], contestants.EXPORTED)
    assert [(entry.form, entry.runtime) for entry in compared] == [*product(["folded", "timm"], contestants.EXPORTED)]
    for entry in compared:
        if importlib.util.find_spec(entry.runtime) is None:
            with pytest.raises(ModuleNotFoundError, match=entry.runtime):
                contestants.contestant(entry, small)
        else:
            found = contestants.contestant(entry, small).outputs()
            assert largest_error(found, contestants.reference(entry.form, small)) < 1e-4


def test_a_step_fills_every_gradient_anew():
    small = cell("training", batch=2, size=(32, 32))
    entered = [contestants.contestant(entry, small) for entry in entries(small)]
    assert [contestant.entry.form for contestant in entered] == ["plain", "fused", "timm", "transformers"]
    for contestant in entered:
        assert contestant.model.training
        losses = [contestant.call() for _ in range(2)]
        assert losses[0] == losses[1]
        gradients = [parameter.grad.clone() for parameter in contestant.model.parameters()]
        contestant.call()
        assert all(map(torch.equal, gradients, (parameter.grad for parameter in contestant.model.parameters())))
        expected = contestants.reference(contestant.entry.form, small)
        assert largest_error(contestant.outputs(), expected) < 1e-3


@pytest.mark.parametrize(("task", "name"), [("inference", "layer_scale2"), ("training", "mlp.fc1.weight")])
def test_another_function_is_not_timed(task, name, monkeypatch):
    """A block that computes something else changes the outputs by more than the tolerance."""
    build = contestants.build

    def changed(form, *arguments):
        model = build(form, *arguments)
        if form == "fused":
            model.stages[2].blocks[3].get_parameter(name).data *= 1.5
        return model

    monkeypatch.setattr(contestants, "build", changed)
    small = cell(task, batch=2)
    result = benchmark.measure(small, entries(small, ["plain", "fused"]), 1, 1e-9, memory=False)
    assert [of["form"] for of in result["contestants"]] == ["plain"]
    (absent,) = result["absent"]
    assert absent["form"] == "fused"
    assert "its output differs from the plain form's in float32 by" in absent["reason"]


@pytest.mark.parametrize("task", contestants.TASKS)
def test_every_form_is_timed_in_bfloat16(task):
    small = cell(task, size=(32, 32), precision="bfloat16")
    result = benchmark.measure(small, entries(small), 1, 1e-9, memory=False)
    assert result["absent"] == []
    assert all(of["error"] > 1e-4 for of in result["contestants"])  # it is another precision


def test_what_the_processor_lacks_is_named(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    small = cell(precision="mkldnn_bf16")
    result = benchmark.measure(small, entries(small, ["folded"], contestants.RUNTIMES), 1, 1e-9, memory=False)
    reasons = {of["runtime"]: of["reason"] for of in result["absent"]}
    assert "onnxruntime has no bfloat16" in reasons["onnxruntime"]
    assert reasons["eager"] == reasons["compiled"] == "oneDNN has no bfloat16 products on this processor"


def test_each_starts_a_round_in_turn(monkeypatch):
    order = []
    monkeypatch.setattr(contestants, "reference", lambda *_: [])
    monkeypatch.setattr(contestants, "contestant", lambda entry, _: entry.form)
    monkeypatch.setattr(benchmark, "warm_up", lambda name, *_: (name, {"calls": 1, "seconds": []}))
    monkeypatch.setattr(benchmark, "seconds_of", lambda call, calls, device: order.append(call))
    entered = [contestants.Entry(name, "eager", "contiguous") for name in "abc"]
    benchmark.measure(cell(), entered, 4, 1.0, memory=False)
    assert "".join(order) == "abcbcacababc"


def test_rounds_are_in_the_precision_of_the_cell(monkeypatch):
    """The last entry has no reference, which is computed in float32."""
    seen = []

    def reference(form, _):
        if form == "b":
            raise RuntimeError("no reference")

    monkeypatch.setattr(contestants, "reference", reference)
    monkeypatch.setattr(contestants, "contestant", lambda entry, _: entry.form)
    monkeypatch.setattr(benchmark, "warm_up", lambda name, *_: (name, {"calls": 1, "seconds": []}))
    monkeypatch.setattr(benchmark, "seconds_of", lambda *_: seen.append(torch.backends.mkldnn.fp32_precision))
    entered = [contestants.Entry(name, "eager", "contiguous") for name in "ab"]
    try:
        benchmark.measure(cell(precision="mkldnn_bf16"), entered, 2, 1.0, memory=False)
    finally:
        benchmark.set_precision("float32")
    assert seen == ["bf16"] * 2


def test_only_inference_is_compiled_with_freezing(monkeypatch):
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 1, 1, 1))

        def forward(self, x):
            seen.append(inductor.freezing)
            return x

    monkeypatch.setattr(benchmark, "largest_error", lambda *_: 0.0)
    for training, runtime in ((False, "compiled"), (True, "compiled"), (False, "eager")):
        benchmark.warm_up(toy(Watched().train(training), 1, runtime=runtime), cell(), [], 1e-9, memory=False)
        assert any(seen) == (runtime == "compiled" and not training)
        assert seen[-1] is False
        seen.clear()


# What is counted


def test_saved_bytes_are_those_of_each_storage_once():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    # The input, what GELU takes and what it gives; weights and the biased sums are not kept.
    assert benchmark.saved_bytes(toy(model, 3, 4)) == 4 * 3 * (4 + 8 + 8)
    twice = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 2))
    # What the sigmoid gives is what the last layer takes, seen through a view.
    assert benchmark.saved_bytes(toy(twice, 3, 4)) == 4 * 3 * (4 + 8)


def test_saved_bytes_of_timms_class_are_the_published_ones(monkeypatch):
    monkeypatch.setattr("metaformer.fused.CACHED", 0)  # as if the batch were large
    monkeypatch.setattr("metaformer.fused.plain_is_faster", lambda _: False)
    large = cell("training", size=(224, 224))
    entered = [contestants.contestant(entry, large) for entry in entries(large, ["plain", "fused", "timm"])]
    plain, fused, timm = (benchmark.saved_bytes(contestant) / 1e6 for contestant in entered)
    assert round(timm, 1) == 59.7
    assert fused < 0.5 * plain


def test_counting_saved_bytes_frees_the_graph():
    """A sigmoid saves its output, which holds the graph."""
    model, outputs = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), []

    def forward():
        output = model(torch.ones(1, 2))
        outputs.append(weakref.ref(output))
        return output

    assert benchmark.saved_bytes(SimpleNamespace(model=model, forward=forward)) == 2 * 8  # the input and the output
    assert outputs[0]() is None


def test_floor_counts_every_map_once():
    counted = benchmark.count("poolformer_s12", (64, 64))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        contestants.ours(cell(), fused=False)(torch.zeros(1, 3, 64, 64))
    images, maps = 3 * 64**2, [64 * 16**2, 128 * 8**2, 320 * 4**2, 512 * 2**2]
    depths = (2, 2, 6, 2)
    blocks = sum(depth * elements for depth, elements in zip(depths, maps, strict=True))
    read, written = images + sum(maps[:-1]) + blocks + maps[-1], sum(maps) + blocks
    weights = 11_915_176  # timm's parameters

    many = cell(batch=3, precision="bfloat16")
    rates = {"macs_per_s": 1e9, "bytes_per_s": 1e12}
    inference = benchmark.floor(many, counted, rates)
    assert inference["bytes"] == 3 * 2 * (read + written) + 4 * weights
    assert inference["macs"] == 3 * counter.get_total_flops() // 2
    assert inference["seconds"] == inference["macs"] / 1e9
    training = benchmark.floor(many._replace(task="training"), counted, {**rates, "bytes_per_s": 1.0})
    assert training["bytes"] == 3 * 2 * (3 * read - images + 2 * written) + 3 * 4 * weights
    assert training["macs"] == 3 * inference["macs"]
    assert training["seconds"] == training["bytes"]


def test_rates_are_of_this_machine(monkeypatch):
    monkeypatch.setitem(benchmark.SIDE, "cpu", 256)
    monkeypatch.setitem(benchmark.COPIED, "cpu", 2**20)
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e6 < benchmark.matrix_rate(dtype, CPU) < 1e15
    assert 1e6 < benchmark.bandwidth(CPU) < 1e15


def test_resident_memory_is_that_of_weights_and_maps():
    weights = 4 * 11_915_176  # timm's parameters
    (entry,) = entries(cell("training"), ["timm"])
    maps = 64 * benchmark.saved_bytes(contestants.contestant(entry, cell("training")))
    found = benchmark.resident_bytes(entry, cell("training", batch=64))
    assert 2 * weights + 0.8 * maps < found < 3 * weights + 3 * maps  # weights and their gradients


# The record and the table


def record(**changes) -> dict:
    """A record as benchmark.py writes it: timm's class takes 2, 4 and 3 seconds, ours 1."""

    def contestant(form: str, seconds: list[float], saved: float | None, runtime: str = "eager") -> dict:
        kept = {"saved_bytes_per_image": saved, "peak_bytes": None}
        entry = {"form": form, "runtime": runtime, "memory_format": "channels_last"}
        return {**entry, "seconds": seconds, "calls": 1, "first_call_s": 1.0, **kept}

    timm = [2.0, 4.0, 3.0]
    training = [contestant("fused", [1.0] * 3, 20e6), contestant("timm", timm, 59_663_560.0)]
    inference = [
        *(contestant("folded", [1.0] * 3, None), contestant("timm", timm, None)),
        contestant("folded", [1.0] * 3, None, "compiled"),
        contestant("timm", [1.0, 0.5, 2.0], None, "compiled"),
    ]
    about = {
        **{"model": "poolformer_s12", "batch": 8, "size": [224, 224], "precision": "float32", "device": "cpu"},
        "rates": {"macs_per_s": 2e9, "bytes_per_s": 2e9},
        "floor": {"macs": 10**9, "bytes": 10**9, "seconds": 0.5},
    }
    absent = {"form": "timm", "runtime": "openvino", "memory_format": "contiguous", "reason": "not installed: openvino"}
    return {
        "kind": "benchmark",
        "settings": {"rounds": 3, "seed": 0},
        "cells": [
            {"task": "inference", **about, "contestants": inference, "absent": [absent]},
            {"task": "training", **about, "contestants": training},
        ],
        "command": "python analysis/benchmark.py",
        "commit": "0" * 40,
        "versions": {"torch": "2.14.0", "cuda": None},
        "hardware": {"cpu": "a", "cpu_capability": "AVX2", "cores": 2, "gpus": ["b"]},
        "date": "2026-01-01T00:00:00+00:00",
        **changes,
    }


def measured(folder, *given: dict) -> Measured:
    folder.mkdir(exist_ok=True)
    files = [folder / f"{i}.json" for i in range(len(given))]
    for file, content in zip(files, given, strict=True):
        file.write_text(json.dumps(content))
    if files:
        records.import_records(files, folder / "results")
    return Measured(folder / "results")


def test_a_record_fills_the_table(tmp_path):
    found = measured(tmp_path, record())
    table = speed.speed(found)
    assert table.summary() == "speed: 10 rows; 6 measured, 4 not run"
    csv = pd.read_csv(io.StringIO(cells.render(table, "csv")), dtype=str)
    assert csv["images/s per device"][6:].tolist() == ["not measured"] * 4
    rows = csv[:6].set_index(["task", "form"])
    ours = rows.loc["training", "fused"]
    assert ours["device"] == "a (AVX2), 2 cores"
    assert ours["batch, size and precision"] == "8 x 224 x 224, float32"
    assert ours["layout"] == "channels-last"
    assert ours["images/s per device"] == "8.0 (8.0 to 8.0)"
    assert ours["times timm"] == "3.00 (2.00 to 4.00)"
    assert ours["device-hours"] == f"{300 * 1281167 / 8 / 3600:,.0f}"
    assert ours["of the floor's speed"] == "50 %"
    assert rows["saved, MB per image"].tolist() == ["-"] * 4 + ["20.0", "59.7"]
    assert rows.loc["training", "timm"]["images/s per device"] == "2.7 (2.0 to 4.0)"
    assert rows.loc["inference", "folded, compiled"]["times timm, compiled"] == "1.00 (0.50 to 2.00)"
    assert rows.loc["training", "fused"]["times timm, compiled"] == "-"

    section = outputs.sections({"speed": table}, found, complete=False)["README.md", "speed"].splitlines()
    lines = [[cell.strip() for cell in line.split("|")[3:-1]] for line in section[2:]]
    assert [line[0] for line in lines] == ["inference", "inference, compiled", "training"]
    assert lines[2] == ["training", "1", "3.00", "3.00"]


def test_without_a_record_the_table_says_so(tmp_path):
    found = measured(tmp_path)
    table = speed.speed(found)
    assert table.summary() == "speed: 5 rows; 0 measured, 5 not run"
    assert outputs.sections({"speed": table}, found, complete=False) == {("README.md", "speed"): "Not measured yet."}


def test_the_last_record_of_a_setting_counts(tmp_path):
    """The two sizes of the later one are other settings than the earlier one's, and its own size is measured again."""
    later = record(date="2026-02-01T00:00:00+00:00")
    later["cells"] = [later["cells"][1], {**deepcopy(later["cells"][1]), "size": [96, 96]}]
    later["cells"][0]["contestants"][1]["seconds"] = [1.5] * 3
    found = sorted(speed.beside_timm(measured(tmp_path, later, record())))
    assert [(task, ratio) for _, _, task, ratio in found if task == "training"] == [("training", 1.5), ("training", 3)]
    assert len(found) == 4


def test_the_fastest_is_named_or_ties(tmp_path):
    table = speed.fastest(measured(tmp_path, record()))
    inference, training, *others = table.rows
    # The interval of three rounds is their extremes. Those of timm's compiled class, 0.5 and 2 times ours, enclose 1.
    assert str(inference["fastest"]) == "tie: timm, compiled; ours, compiled; ours, eager"
    assert str(inference["timm, eager"]) == "2.7 (2.0 to 4.0), timm, channels-last"
    assert (str(inference["openvino"]), str(inference["onnxruntime"])) == ("not installed: openvino", "not measured")
    assert str(training["fastest"]) == "ours, eager"
    assert str(training["timm, compiled"]) == "not measured"
    # Nothing else is measured in any precision on any device.
    assert len(others) == 2 * (3 + 4) - 2
    assert {str(row["fastest"]) for row in others} == {"not measured"}
    slowing = record()
    for contestant, factor in zip(slowing["cells"][1]["contestants"], (1, 1.1), strict=True):
        contestant["seconds"] = [factor, 3 * factor, 2 * factor]  # the machine's speed varies more than they differ
    assert str(speed.fastest(measured(tmp_path / "slowing", slowing)).rows[1]["fastest"]) == "ours, eager"
    alone = record()
    alone["cells"] = alone["cells"][1:]
    alone["cells"][0]["contestants"].pop()
    (first, *_) = speed.fastest(measured(tmp_path / "alone", alone)).rows
    assert str(first["fastest"]) == "not measured"


def test_intervals_hold_the_median_of_most_samples():
    """With 95 % probability at least; those of scipy's bootstrap would need more rounds."""
    generator = torch.Generator().manual_seed(0)
    for rounds in (6, 7, 12, 25):
        held = 0
        for seconds in torch.rand(500, rounds, generator=generator):
            of = SimpleNamespace(seconds=seconds.tolist())
            interval = speed.interval(speed.Timing(SimpleNamespace(batch=1), of).images_per_s)
            held += interval.low <= 2 <= interval.high
        assert held / 500 > 0.93


def test_models_of_ours_that_no_table_of_the_paper_has_are_shown(tmp_path):
    of = [{**record()["cells"][0], "model": name} for name in ("metaformer_s12_nolayerscale", "metaformer_s12_pool4")]
    found = measured(tmp_path, record(cells=of[:1]), record(cells=of[1:]))
    assert {cell["model"] for cell in of} <= {row["model"] for row in speed.speed(found).rows}


def test_a_bar_in_a_reason_does_not_end_the_cell():
    rows = [{"openvino": "TypeError: int | None", "task": "training"}]
    assert r"| TypeError: int \| None | training |" in cells.markdown(rows)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            record(cells=[{**record()["cells"][0], "floor": {"seconds": 0}}]),
            r"cells\.0\.floor\.seconds: .* greater than 0",
        ),
        (record(cells=[]), "cells: List should have at least 1 item"),
        (record(cells=[{**record()["cells"][0], "size": [224]}]), r"cells\.0\.size\.1: Field required"),
    ],
)
def test_a_wrong_record_is_refused(given, says, tmp_path):
    with pytest.raises(InputError, match=says):
        measured(tmp_path, given)


def test_the_command_writes_what_the_importer_takes(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(benchmark.SIDE, "cpu", 64)
    monkeypatch.setitem(benchmark.COPIED, "cpu", 2**16)
    small = ("--size", 64, "--batch", 2, 3, "--rounds", 2, "--seconds", "1e-9", "--device", "cpu")
    status, out, _ = command("analysis/benchmark.py", *small, "--forms", "timm", "folded", "fused")
    assert status == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert f"record: {path.relative_to(tmp_path)}" in out
    assert "2 x 64 x 64, float32: inference" in out
    (imported,) = records.import_records([path], tmp_path / "results")
    assert imported.name.startswith("benchmark-2")
    found = records.read_record(imported)
    assert [(of.task, of.batch) for of in found.cells] == [
        *(("inference", 2), ("inference", 3)),
        *(("training", 2), ("training", 3)),
    ]
    inference, _, training, _ = found.cells
    assert [contestant.form for contestant in inference.contestants] == ["fused", "folded", "timm"]
    assert [contestant.form for contestant in training.contestants] == ["fused", "timm"]
    assert all(len(contestant.seconds) == 2 for cell in found.cells for contestant in cell.contestants)
    rows = (timing.figures() for timing in speed.timings(*found.cells))
    row = next(row for row in rows if (row["task"], row["form"]) == ("training", "fused"))
    ours, timm = (contestant.seconds for contestant in training.contestants)
    assert row["times timm"].value == median(b / a for a, b in zip(ours, timm, strict=True))
    assert row["device-hours"] is None  # the paper's images are of 224 pixels


def asked(monkeypatch, command, *arguments) -> tuple[list, tuple]:
    """The cells and other arguments with which the command runs the benchmark."""
    given = []
    monkeypatch.setattr(benchmark, "benchmark", lambda cells, *others: given.extend((cells, others)) or [])
    assert command("analysis/benchmark.py", "--device", "cpu", *arguments)[0] == 0
    return given


@pytest.mark.parametrize("supported", [False, True])
def test_the_matrix_has_every_runtime_and_layout(supported, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    cells, _ = asked(monkeypatch, command, "--matrix")
    assert {of.precision for of, _ in cells} == (set(contestants.PRECISIONS["cpu"]) if supported else {"float32"})
    for of, entered in cells:
        forms = {"folded", "timm"} if of.task == "inference" else {"fused", "timm"}
        pytorch = {(*entry,) for entry in product(forms, ("eager", "compiled"), contestants.LAYOUTS)}
        files = {(*entry, "contiguous") for entry in product(forms, contestants.EXPORTED)}
        assert set(entered) == pytorch | (files if of.task == "inference" else set())
    assert len({of for of, _ in cells}) == len(cells)


def grown() -> dict:
    """A record of --growth of which timm's class takes a second for an image, and ours half of it."""
    found = record()
    template = found["cells"][1]
    found["cells"] = []
    for model, batch, side in (
        *(("poolformer_s12", batch, 224) for batch in (8, 1, 64)),
        *(("poolformer_s12", 8, side) for side in (96, 384)),
        *((model, 8, 224) for model in POOLFORMERS if model != "poolformer_s12"),
    ):
        cell = {**deepcopy(template), "model": model, "batch": batch, "size": [side, side]}
        for of, share in zip(cell["contestants"], (0.5, 1.0), strict=True):
            of.update(seconds=[share * batch] * 3, peak_bytes=int(share * batch * 1e6))
        found["cells"].append(cell)
    return found


def test_growth_is_drawn_from_its_record(tmp_path, monkeypatch):
    """Other precisions are not drawn, and of several forms and layouts the fastest is."""
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    measured(tmp_path, record())
    assert figures.growth() is None
    (tmp_path / "analysis").mkdir()
    full = grown()
    for cell in full["cells"]:
        slower = [{**of, "seconds": [3 * each for each in of["seconds"]]} for of in cell["contestants"]]
        cell["contestants"] += [{**of, "memory_format": "contiguous"} for of in slower]
    full["cells"] += [{**cell, "precision": "bfloat16", "contestants": slower} for cell in full["cells"]]
    measured(tmp_path / "analysis", full)
    panels = figures.growth().axes
    assert [len(axes.lines) for axes in panels] == [2] * 6
    batch, size, model, memory, *_ = panels
    lines = {line.get_label(): line.get_xydata().tolist() for line in batch.lines}
    assert lines == {
        "ours, eager, training": [[1, 2], [8, 2], [64, 2]],
        "timm, eager, training": [[1, 1], [8, 1], [64, 1]],
    }
    assert [line.get_xdata().tolist() for line in size.lines] == [[96, 224, 384]] * 2
    assert [line.get_xdata().tolist() for line in model.lines] == [[0, 1, 2, 3, 4]] * 2
    assert memory.lines[0].get_ydata().tolist() == [0.5, 4, 32]


def test_growth_of_an_ablation_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / "analysis").mkdir()
    full = grown()
    full["cells"].insert(0, {**full["cells"][0], "model": "metaformer_s12_bn"})
    measured(tmp_path / "analysis", full)
    model = figures.growth().axes[5]
    assert [label.get_text() for label in model.get_xticklabels()][4:] == ["M48", "METAFORMER_S12_BN"]
    assert [line.get_xdata().tolist() for line in model.lines] == [[0, 1, 2, 3, 4, 5]] * 2


def test_growth_varies_one_thing_at_a_time(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    cells, (_, _, memory) = asked(monkeypatch, command, "--growth", "--tasks", "inference")
    assert memory
    base = cells[0][0]
    assert (base.model, base.batch, base.size) == ("poolformer_s12", 8, (224, 224))
    assert all(sum(a != b for a, b in zip(of, base, strict=True)) == 1 for of, _ in cells[1:])
    assert {of.model for of, _ in cells} == set(POOLFORMERS)
    assert {min(of.batch for of, _ in cells), max(of.batch for of, _ in cells)} == {1, 64}
    assert {min(of.size for of, _ in cells), max(of.size for of, _ in cells)} == {(96, 96), (384, 384)}
    assert {entry.form for _, entered in cells for entry in entered} == {"folded", "timm"}
    given, _ = asked(monkeypatch, command, "--growth", "--tasks", "inference", "--batch", 8, 128)
    assert [of for of, _ in given] == [base, base._replace(batch=128), *(of for of, _ in cells[1:])]


def test_all_forms_that_a_model_has_are_compared_unless_told_otherwise():
    def forms(of: contestants.Cell, given: list[str] | None = None) -> list[str]:
        return [entry.form for entry in entries(of, given)]

    assert forms(cell()) == ALL
    assert forms(cell(model="metaformer_s12_ppaa")) == list(contestants.OURS)
    assert forms(cell("training", model="metaformer_s12_ppaa")) == ["plain", "fused"]
    assert forms(cell("training"), ["timm", "plain", "timm"]) == ["plain", "timm"]


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["poolformer_s112"], "there is no variant 'poolformer_s112' (did you mean 'poolformer_s12'?)"),
        (["--forms", "fusd"], "argument --forms: invalid choice: 'fusd'"),
        (["metaformer_s12_bn", "--forms", "timm"], "timm has no metaformer_s12_bn: use the forms plain, fused, folded"),
        (["--forms", "folded"], "no contestant does training: folded models and files need --tasks inference"),
        (["--tasks", "sleep"], "argument --tasks: invalid choice: 'sleep'"),
        (["--batch", 0], "--batch and --rounds: give whole numbers from 1"),
        (["--rounds", 0], "--batch and --rounds: give whole numbers from 1"),
        (["--rounds", "1.5"], "argument --rounds: invalid int value: '1.5'"),
        (["--size", 64, 64, 64], "--size 64 64 64: give one side or height and width, in pixels"),
        (["--size", 1], "cannot count poolformer_s12 at 1 x 1 pixels: the model must take images of this size"),
        (["--precision", "float31"], "argument --precision: invalid choice: 'float31'"),
        (["--precision", "float16"], "--precision float16: on this device, use float32, bfloat16, mkldnn_bf16"),
        (["--runtimes", "jit"], "argument --runtimes: invalid choice: 'jit'"),
        (["--runtimes", "openvino"], "no contestant does training: folded models and files need --tasks inference"),
        (["--matrix", "--growth"], "argument --growth: not allowed with argument --matrix"),
        (["--seconds", "0"], "--seconds 0: give a duration above 0"),
        (["--memory-format", "nchw"], "argument --memory-format: invalid choice: 'nchw'"),
        (["--device", "gpu"], "argument --device: invalid choice: 'gpu'"),
        (["--record", "/dev/null/record.json"], "cannot write /dev/null/record.json"),
        (["--record", "."], "--record . is a folder: give the path of a file"),
        (
            ["metaformer_s12_identity", "--forms", "folded", "--tasks", "inference", "--size", 64],
            "there is nothing to fold",
        ),
    ],
)
def test_wrong_arguments(arguments, says, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(benchmark.SIDE, "cpu", 64)
    monkeypatch.setitem(benchmark.COPIED, "cpu", 2**16)
    status, _, error = command("analysis/benchmark.py", *arguments)
    assert status == 2
    assert says in error.splitlines()[-1]
    assert error.splitlines()[-1].removeprefix("benchmark.py: ").startswith("error: ")


def test_what_a_machine_lacks_is_said(tmp_path, monkeypatch, command):
    def none(model):
        raise InvalidCxxCompiler()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", none)
    monkeypatch.setitem(benchmark.SIDE, "cpu", 64)
    monkeypatch.setitem(benchmark.COPIED, "cpu", 2**16)
    small = ("--size", 64, "--batch", 1, "--forms", "fused", "--device", "cpu")
    status, _, error = command("analysis/benchmark.py", *small, "--runtimes", "compiled", "--record", "record.json")
    assert (status, error.splitlines()[-1].partition("InvalidCxxCompiler")[0]) == (
        *(2, "error: nothing can be timed; fused (compiled): "),
    )
    assert not (tmp_path / "record.json").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, error = command("analysis/benchmark.py", "--device", "cuda")
    assert (status, error) == (2, "error: PyTorch finds no GPU here: use --device cpu\n")


def test_too_little_memory_and_no_numbers_are_said():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert benchmark.reason(error.value) == "there is not enough memory: use a smaller --batch or --size"
    with pytest.raises(RuntimeError) as error:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert "shapes cannot be multiplied" in benchmark.reason(error.value)
    endless = toy(nn.Threshold(2.0, float("nan")).eval(), 3)
    with pytest.raises(InputError, match="its output differs from the plain form's in float32 by nan"):
        benchmark.warm_up(endless, cell(), [torch.ones(3)], 1e-9, memory=False)
