"""Benchmarks: what is compared is the same model, what is counted is right, and the record reaches the table."""

import io
import json
from statistics import median
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils.flop_counter import FlopCounterMode

from metaformer import InputError, records
from metaformer.analysis import benchmark, contestants, readme, render, speed
from metaformer.analysis.measured import Measured
from oracles import relative_error

CPU = torch.device("cpu")
ALL = [*contestants.OURS, *contestants.OTHERS]


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads wait long for each other where others work too, and the models here are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(**changes) -> contestants.Settings:
    small = contestants.Settings("poolformer_s12", 1, (64, 64), "float32", "channels_last", CPU, 1)
    return small._replace(**changes)


def toy(model: nn.Module, *shape: int, compiled: bool = False) -> contestants.Contestant:
    """A contestant of any model on ones of a shape; what is timed is the forward pass."""
    images = torch.ones(shape)
    return contestants.Contestant("toy", compiled, model, lambda: model(images), lambda: model(images))


# What is compared


def test_all_forms_are_the_same_model():
    compared = contestants.contestants(ALL, [False], "inference", settings())
    entered = {contestant.form: contestant for contestant in compared}
    logits = {form: contestant.call() for form, contestant in entered.items()}
    assert list(logits) == ALL
    assert not any(output.requires_grad for output in logits.values())
    for form in ("fused", "folded", "transformers"):
        assert relative_error(logits[form], logits["plain"]) < 1e-4
    # timm's averages before the last norm: its logits are others, its map before that is not.
    images = torch.ones(1, 3, 64, 64)
    assert type(entered["timm"].model).__module__ == "timm.models.metaformer"
    with torch.no_grad():
        maps = [entered[form].model.forward_features(images) for form in ("timm", "plain")]
    assert relative_error(*maps) < 1e-4


def test_a_step_fills_every_gradient_anew():
    entered = contestants.contestants(ALL, [False], "training", settings(batch=2, size=(32, 32)))
    assert [contestant.form for contestant in entered] == ["plain", "fused", "timm", "transformers"]
    for contestant in entered:
        assert contestant.model.training
        losses = [contestant.call() for _ in range(2)]
        assert losses[0] == losses[1]
        gradients = [parameter.grad.clone() for parameter in contestant.model.parameters()]
        contestant.call()
        assert all(map(torch.equal, gradients, (parameter.grad for parameter in contestant.model.parameters())))


def test_each_starts_a_round_in_turn(monkeypatch):
    order = []
    monkeypatch.setattr(benchmark, "contestants", lambda *_: [SimpleNamespace(call=name) for name in "abc"])
    monkeypatch.setattr(benchmark, "warm_up", lambda *_: {"calls": 1, "seconds": []})
    monkeypatch.setattr(benchmark, "seconds_of", lambda call, calls, device: order.append(call))
    benchmark.measure([], [], "inference", settings()._replace(rounds=4))
    assert "".join(order) == "abcbcacababc"


def test_only_inference_is_compiled_with_freezing():
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append(inductor.freezing)
            return x

    for training, compiled in ((False, True), (True, True), (False, False)):
        benchmark.warm_up(toy(Watched().train(training), 1, compiled=compiled), settings())
        assert any(seen) == (compiled and not training)
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


def test_saved_bytes_of_timms_class_are_the_published_ones():
    entered = contestants.contestants(["plain", "fused", "timm"], [False], "training", settings(size=(224, 224)))
    plain, fused, timm = (benchmark.saved_bytes(contestant) / 1e6 for contestant in entered)
    assert round(timm, 1) == 59.7
    assert fused < 0.5 * plain


def test_floor_counts_every_map_once():
    counted = benchmark.count("poolformer_s12", (64, 64))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        contestants.ours(settings(), fused=False)(torch.zeros(1, 3, 64, 64))
    images, maps = 3 * 64**2, [64 * 16**2, 128 * 8**2, 320 * 4**2, 512 * 2**2]
    depths = (2, 2, 6, 2)
    blocks = sum(depth * elements for depth, elements in zip(depths, maps, strict=True))
    read, written = images + sum(maps[:-1]) + blocks + maps[-1], sum(maps) + blocks
    weights = 11_915_176  # timm's parameters

    many = settings(batch=3, precision="bfloat16")
    rates = {"macs_per_s": 1e9, "bytes_per_s": 1e12}
    inference = benchmark.floor("inference", many, counted, rates)
    assert inference["bytes"] == 3 * 2 * (read + written) + 4 * weights
    assert inference["macs"] == 3 * counter.get_total_flops() // 2
    assert inference["seconds"] == inference["macs"] / 1e9
    training = benchmark.floor("training", many, counted, {**rates, "bytes_per_s": 1.0})
    assert training["bytes"] == 3 * 2 * (3 * read - images + 2 * written) + 3 * 4 * weights
    assert training["macs"] == 3 * inference["macs"]
    assert training["seconds"] == training["bytes"]


def test_rates_are_of_this_machine(monkeypatch):
    monkeypatch.setitem(benchmark.MATRIX, "cpu", 256)
    monkeypatch.setitem(benchmark.COPIED, "cpu", 2**20)
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e6 < benchmark.matrix_rate(dtype, CPU) < 1e15
    assert 1e6 < benchmark.bandwidth(CPU) < 1e15


# The record and the table


def record(**changes) -> dict:
    """A record as benchmark.py writes it: timm's class takes 2, 4 and 3 seconds, ours 1."""

    def contestant(form: str, seconds: list[float], saved: float | None, compiled: bool = False) -> dict:
        kept = {"saved_bytes_per_image": saved, "peak_bytes": None}
        return {"form": form, "compiled": compiled, "seconds": seconds, "calls": 1, "first_call_s": 1.0, **kept}

    floor = {"macs": 10**9, "bytes": 10**9, "seconds": 0.5}
    timm = [2.0, 4.0, 3.0]
    training = [contestant("fused", [1.0] * 3, 20e6), contestant("timm", timm, 59_663_560.0)]
    inference = [
        *(contestant("folded", [1.0] * 3, None), contestant("timm", timm, None)),
        *(contestant("folded", [1.0] * 3, None, True), contestant("timm", [1.0, 0.5, 2.0], None, True)),
    ]
    return {
        "kind": "benchmark",
        "model": "poolformer_s12",
        "settings": {
            **{"batch": 8, "size": [224, 224], "precision": "float32", "memory_format": "channels_last"},
            **{"device": "cpu", "rounds": 3, "seed": 0},
        },
        "rates": {"macs_per_s": 2e9, "bytes_per_s": 2e9},
        "tasks": [
            {"task": "inference", "floor": floor, "contestants": inference},
            {"task": "training", "floor": floor, "contestants": training},
        ],
        "command": "python analysis/benchmark.py",
        "commit": "0" * 40,
        "versions": {"torch": "2.14.0", "cuda": None},
        "hardware": {"cpu": "a", "cores": 2, "gpus": ["b"]},
        "date": "2026-01-01T00:00:00+00:00",
        **changes,
    }


def measured(folder, *given: dict) -> Measured:
    files = [folder / f"{i}.json" for i in range(len(given))]
    for file, content in zip(files, given, strict=True):
        file.write_text(json.dumps(content))
    if files:
        records.import_records(files, folder / "results")
    return Measured(folder / "results")


def test_a_record_fills_the_table(tmp_path):
    found = measured(tmp_path, record())
    assert found.problems == []
    table = speed.speed(found)
    assert table.summary() == "speed: 10 rows; 6 measured, 4 not run"
    csv = pd.read_csv(io.StringIO(render.render(table, "csv")), dtype=str)
    assert csv["images/s per device"][6:].tolist() == ["not measured"] * 4
    rows = csv[:6].set_index(["task", "form"])
    ours = rows.loc["training", "fused"]
    assert ours["device"] == "a, 2 cores"
    assert ours["batch, size and precision"] == "8 x 224 x 224, float32, channels-last"
    assert ours["images/s per device"] == "8.0 (8.0 to 8.0)"
    assert ours["times timm"] == "3.00 (2.00 to 4.00)"
    assert ours["device-hours"] == f"{300 * 1281167 / 8 / 3600:,.0f}"
    assert ours["of the floor's speed"] == "50 %"
    assert rows["saved, MB per image"].tolist() == ["-"] * 4 + ["20.0", "59.7"]
    assert rows.loc["training", "timm"]["images/s per device"] == "2.7 (2.0 to 4.0)"
    assert rows.loc["inference", "folded, compiled"]["times timm, compiled"] == "1.00 (0.50 to 2.00)"
    assert rows.loc["training", "fused"]["times timm, compiled"] == "-"

    section = readme.sections({"speed": table}, found, complete=False)["README.md", "speed"].splitlines()
    lines = [[cell.strip() for cell in line.split("|")[3:-1]] for line in section[2:]]
    assert [line[0] for line in lines] == ["inference", "inference, compiled", "training"]
    assert lines[2] == ["training", "1", "3.00", "3.00"]


def test_without_a_record_the_table_says_so(tmp_path):
    found = measured(tmp_path)
    table = speed.speed(found)
    assert table.summary() == "speed: 5 rows; 0 measured, 5 not run"
    assert readme.sections({"speed": table}, found, complete=False) == {("README.md", "speed"): "Not measured yet."}


def unequal() -> list[dict]:
    tasks = record()["tasks"]
    tasks[1]["contestants"][0]["seconds"] = [1.0]
    return tasks


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": unequal()}, r"tasks\.1\.contestants: .*the contestants do not have equally many rounds"),
        ({"tasks": []}, "tasks: List should have at least 1 item"),
        ({"rates": {"macs_per_s": 0, "bytes_per_s": 1}}, r"rates\.macs_per_s: Input should be greater than 0"),
        ({"settings": {}}, r"settings\.batch: Field required"),
    ],
)
def test_a_wrong_record_is_refused(changes, says, tmp_path):
    with pytest.raises(InputError, match=says):
        measured(tmp_path, record(**changes))


def test_the_command_writes_what_the_importer_takes(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(benchmark.MATRIX, "cpu", 64)
    monkeypatch.setitem(benchmark.COPIED, "cpu", 2**16)
    monkeypatch.setattr(benchmark, "SHORTEST", 1e-9)
    small = ("--size", 64, "--batch", 2, "--rounds", 2, "--device", "cpu")
    status, out, _ = command("analysis/benchmark.py", *small, "--forms", "timm", "folded", "fused")
    assert status == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert f"record: {path.relative_to(tmp_path)}" in out
    assert "poolformer_s12, 2 x 64 x 64, float32, channels-last" in out
    (imported,) = records.import_records([path], tmp_path / "results")
    found = records.read_record(imported)
    inference, training = found.tasks
    assert [contestant.form for contestant in inference.contestants] == ["fused", "folded", "timm"]
    assert [contestant.form for contestant in training.contestants] == ["fused", "timm"]
    assert all(len(contestant.seconds) == 2 for timed in found.tasks for contestant in timed.contestants)
    rows = (timing.figures() for timing in speed.timings(found))
    (row,) = (row for row in rows if (row["task"], row["form"]) == ("training", "fused"))
    ours, timm = (contestant.seconds for contestant in training.contestants)
    assert row["times timm"].value == median(b / a for a, b in zip(ours, timm, strict=True))
    assert row["device-hours"] is None  # the paper's images are of 224 pixels


def test_all_forms_that_a_model_has_are_compared_unless_told_otherwise():
    assert contestants.chosen_forms("poolformer_s24", None, contestants.TASKS) == ALL
    assert contestants.chosen_forms("metaformer_s12_ppaa", None, contestants.TASKS) == ["plain", "fused"]
    assert contestants.chosen_forms("poolformer_s12", ["timm", "plain", "timm"], ["training"]) == ["plain", "timm"]


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["poolformer_s112"], "there is no variant 'poolformer_s112' (did you mean 'poolformer_s12'?)"),
        (["--forms", "fusd"], "argument --forms: invalid choice: 'fusd'"),
        (["metaformer_s12_bn", "--forms", "timm"], "timm has no metaformer_s12_bn: use the forms plain, fused, folded"),
        (["--forms", "folded"], "the form folded is for inference only"),
        (["--tasks", "sleep"], "argument --tasks: invalid choice: 'sleep'"),
        (["--batch", 0], "argument --batch: 0 is not a whole number from 1"),
        (["--rounds", "1.5"], "argument --rounds: 1.5 is not a whole number from 1"),
        (["--size", 64, 64, 64], "--size 64 64 64: give one side or height and width, in pixels"),
        (["--size", 1], "does not take images of 1 x 1 pixels"),
        (["--precision", "float31"], "argument --precision: invalid choice: 'float31'"),
        (["--precision", "float16"], "--precision float16 needs a GPU: use float32 or bfloat16 on a CPU"),
        (["--memory-format", "nchw"], "argument --memory-format: invalid choice: 'nchw'"),
        (["--device", "gpu"], "argument --device: invalid choice: 'gpu'"),
        (["--record", "nowhere/record.json"], "there is no folder nowhere for the record"),
        (
            ["metaformer_s12_identity", "--forms", "folded", "--tasks", "inference", "--size", 64],
            "there is nothing to fold",
        ),
    ],
)
def test_wrong_arguments(arguments, says, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(benchmark.MATRIX, "cpu", 64)
    monkeypatch.setitem(benchmark.COPIED, "cpu", 2**16)
    status, _, error = command("analysis/benchmark.py", *arguments)
    assert status == 2
    assert says in error.splitlines()[-1]
    assert error.splitlines()[-1].removeprefix("benchmark.py: ").startswith("error: ")


def test_what_a_machine_lacks_is_said(monkeypatch, command):
    def none():
        raise InvalidCxxCompiler()

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    status, _, error = command("analysis/benchmark.py", "--compile", "--device", "cpu")
    assert (status, error.count("\n")) == (2, 1)
    assert "--compile needs a C++ compiler" in error
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, error = command("analysis/benchmark.py", "--device", "cuda")
    assert (status, error) == (2, "error: PyTorch finds no GPU here: use --device cpu\n")


def test_too_little_memory_and_no_numbers_are_said():
    says = "not enough memory for all of it: use a smaller --batch or --size"
    with pytest.raises(InputError, match=says), benchmark.naming_what_lacks_memory("all of it"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), benchmark.naming_what_lacks_memory("it"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    with pytest.raises(InputError, match=r"toy \(eager\) is not finite in float32: use another --precision"):
        benchmark.warm_up(toy(nn.Threshold(2.0, float("nan")).eval(), 3), settings())
