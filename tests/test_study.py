"""Small studies: ablate.py runs them, analysis/proxy.py judges them."""

import json
import math
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import scipy.stats
import yaml

from conftest import ROOT, draw, run_script, trained
from metaformer import ABLATIONS, QUESTIONS, InputError
from metaformer.analysis import outputs, studies
from metaformer.analysis.cells import Table
from metaformer.analysis.measured import Measured
from metaformer.analysis.paper import rows_of
from metaformer.records import Training, import_records, parse, statistics
from metaformer.records.statistics import Judgement, Results, holm, statements
from metaformer.training import slurm
from metaformer.training import study as ablate
from metaformer.training.checkpoints import locked
from metaformer.training.config import check
from metaformer.training.study import read_study
from metaformer.variants import ROWS
from pairs import Script

RECIPE = {
    "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 32], "stem_stride": 2},
    "img_size": 32,
    "epochs": 2,
    "global_batch": 6,
    "device_batch": 6,
    "lr": 0.002,
    "drop_path": 0.1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("data"), train_images=24, val_images=9)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Writes a study file: study(epochs=3) changes the recipe."""
    monkeypatch.setattr(ablate, "STUDIES", tmp_path)

    def write(rows=("baseline", "pppa"), seeds=(0, 1), **recipe) -> Path:
        path = tmp_path / "tiny.yaml"
        content = {
            "title": "Tiny",
            "note": "Drawn.",
            "data": {"classes": 3, "train_images": 24, "val_images": 9},
            "rows": list(rows),
            "seeds": list(seeds),
            "recipe": {**RECIPE, **recipe},
        }
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def forked(monkeypatch):
    """The runs of a study start at once; the study looks often whether they have ended."""

    def start(run, environment, lock):
        return Script(ablate.TRAIN, run.arguments, run.folder.parent, log=run.log, **environment)

    monkeypatch.setattr(ablate, "start", start)
    monkeypatch.setattr(ablate, "PAUSE", 0.05)


def ablated(study: Path, data: Path, *arguments: object) -> int:
    output = study.parent / "out"
    return run_script("classification/ablate.py", study, "--data-dir", data, "--output", output, *arguments)


def test_a_study_runs_once_and_becomes_a_table(study, data, tmp_path, forked, capsys):
    path = study()
    assert ablated(path, data, "--rows", "baseline") == 0
    first = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*/run.json")}
    assert {file.parent.name for file in first} == {"baseline-0", "baseline-1"}
    assert ablated(path, data, "--seeds", 1) == 0
    files = sorted((tmp_path / "out").glob("*/run.json"))
    assert [file.parent.name for file in files] == ["baseline-0", "baseline-1", "pppa-1"]
    assert all(file.stat().st_mtime_ns == first[file] for file in first)
    assert "2 runs, 1 of them done" in capsys.readouterr().out
    runs = {file.parent.name: json.loads(file.read_text()) for file in files}
    assert all(run["status"] == "finished" and len(run["curve"]) == 2 for run in runs.values())
    assert runs["pppa-1"]["model"] == "metaformer_s12_pppa"
    assert runs["pppa-1"]["starts"][0]["command"].startswith("bash classification/ablate.sh ")
    assert (runs["pppa-1"]["seed"], runs["pppa-1"]["settings"]["drop_path"]) == (1, 0.1)

    results = tmp_path / "results"
    import_records([tmp_path / "out"], results)
    import_records([tmp_path / "out"], results)
    records = {file.stem: file for file in results.glob("tiny/*.json")}
    assert records.keys() == runs.keys()
    measured = Measured(results)
    rows = {row["row"]: row for row in studies.proxy(measured).rows}
    top1 = [runs[f"baseline-{seed}"]["curve"][-1]["top1"] for seed in (0, 1)]
    assert rows["baseline"]["top-1 in the study, %"].value.value == pytest.approx(sum(top1) / 2)
    assert (str(rows["pppa"]["runs"]), str(rows["pppa"]["top-1 in the paper, %"])) == ("1", "78.3")

    records["pppa-1"].write_text(records["pppa-1"].read_text().replace('"lr": 0.002', '"lr": 0.004'))
    with pytest.raises(
        InputError, match=r"tiny has a record of row pppa, seed 1 with lr=0.004, and the study has 0.002"
    ):
        Measured(results)


def test_a_run_that_diverges_is_a_result(study, data, tmp_path, forked, capsys):
    path = study(rows=["baseline"], seeds=[0], lr=1e30)
    assert ablated(path, data) == 0
    assert "baseline-0: diverged (the loss was not finite" in capsys.readouterr().out
    import_records([tmp_path / "out"], tmp_path / "results")
    measured = Measured(tmp_path / "results")
    assert measured.studies["tiny"].top1.to_dict() == {"baseline": {0: 100 / 3}}
    assert studies.proxy(measured).rows[0]["runs"] == "1, 1 diverged"


def test_a_stopped_study_continues_where_it_stood(study, data, tmp_path, forked):
    path = study(rows=["baseline"], seeds=[0], epochs=400)
    record, log = tmp_path / "out/baseline-0/run.json", tmp_path / "out/baseline-0.log"
    for under_way in (
        lambda: record.is_file() and json.loads(record.read_text())["epochs"]["done"] > 1,
        lambda: "continues at epoch" in log.read_text(),
    ):
        ended = threading.Event()

        def stop(under_way=under_way, ended=ended):
            while not under_way():
                if ended.wait(0.02):
                    return
            os.kill(os.getpid(), signal.SIGTERM)

        other = threading.Thread(target=stop)
        other.start()
        status = ablated(path, data)
        ended.set()
        other.join()
        assert status == 128 + signal.SIGTERM
        assert json.loads(record.read_text())["status"] == "stopped"
    assert log.read_text().count("SIGTERM: saved epoch") == 2


def test_a_failed_run_is_not_counted(study, data, tmp_path, capsys):
    path = study(rows=["pppa"], seeds=[0], model_args={**RECIPE["model_args"], "dims": [8, 8, 8, 24]})
    assert ablated(path, data) == 1
    error = capsys.readouterr().err
    assert "1 of 1 runs failed: pppa-0" in error
    assert "attention with 32 channels per head cannot divide 24" in (tmp_path / "out/pppa-0.log").read_text()


def test_a_folder_has_one_study_at_a_time_and_waits_for_its_runs(study, data, tmp_path, capsys):
    path = study()
    ablate.prepare_output(tmp_path / "out", ablate.read_study(str(path))[1])
    with locked(tmp_path / "out") as lock:
        run = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    assert ablated(path, data) == 2
    assert capsys.readouterr().err.endswith("out: wait for it or stop it\n")
    run.kill()
    run.wait()
    with locked(tmp_path / "out"):
        pass


def test_runs_are_jobs_of_their_own_on_a_cluster(study, data, tmp_path, monkeypatch, capsys):
    jobs = []

    def submit(submitted, logs, partition, *_):
        jobs.extend(submitted)
        assert partition == "gpu"
        return [SimpleNamespace(job_id=number) for number in range(len(submitted))]

    monkeypatch.setattr(slurm, "submit", submit)
    path = study(rows=["baseline"])
    assert ablated(path, data, "--partition", "gpu") == 0
    assert [job.gpus for job in jobs] == [1, 1]
    assert trained(*jobs[1].arguments, "workers=0") == 0
    capsys.readouterr()
    assert ablated(path, data, "--partition", "gpu") == 0
    assert "2 runs, 1 of them done" in capsys.readouterr().out
    assert [job.arguments for job in jobs[2:]] == [jobs[0].arguments]


def test_runs_are_spread_over_the_gpus(monkeypatch):
    monkeypatch.setattr(ablate, "cores", lambda: 16)
    monkeypatch.setattr(ablate.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    places = ablate.Places(at_once=None)
    seen = [places.environment(place) for place in range(places.number)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in seen] == ["5", "7", "5", "7"]
    assert (places.workers, places.environment(0)["OMP_NUM_THREADS"]) == (3, "4")
    monkeypatch.setattr(ablate.torch.cuda, "device_count", lambda: 0)
    places = ablate.Places(at_once=None)
    assert (places.number, places.workers, places.environment(0)["OMP_NUM_THREADS"]) == (16, 0, "1")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rows", "pool4"], "rows.0 is 'pool4' in the command line and "),
        (["--seeds", "-1"], "seeds.0 is -1 in the command line and "),
        (["--at-once", "0"], "--at-once 0"),
        (["--at-once", "2", "--partition", "gpu"], "argument --partition: not allowed with argument --at-once"),
        (["--data-dir", "nowhere"], "there is no data folder nowhere"),
        (["--partition", "gpu"], "there is no Slurm on this machine"),
    ],
)
def test_wrong_arguments(arguments, says, study, data, monkeypatch, capsys):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    assert ablated(study(), data, *arguments) == 2
    *usage, error = capsys.readouterr().err.splitlines()
    assert not usage or usage[0].startswith("usage: ")
    assert error.removeprefix("ablate.sh: ").startswith(f"error: {says}")


def test_wrong_studies(study, data, tmp_path, capsys):
    study()
    with pytest.raises(InputError, match=r"there is no study 'tin' \(did you mean 'tiny'\?\)"):
        ablate.read_study("tin")
    (tmp_path / "mine").mkdir()
    elsewhere = study().rename(tmp_path / "mine/tiny.yaml")
    with pytest.raises(InputError, match=r"mine/tiny.yaml is not in .*: copy it there"):
        ablate.read_study(str(elsewhere))
    with pytest.raises(InputError, match=r"rows.0 is 'none' in .*: input should be 'baseline', 'identity'"):
        ablate.read_study(str(study(rows=["none"])))
    with pytest.raises(InputError, match=r"unknown setting 'epoch_s' \(did you mean 'epochs'\?\)"):
        ablate.read_study(str(study(epoch_s=3)))
    with pytest.raises(InputError, match="the recipe sets seed"):
        ablate.read_study(str(study(seed=3)))
    other = draw(tmp_path / "other", train_images=24, val_images=8, classes="ab")
    assert ablated(study(), other) == 2
    assert "other has 2 classes, and the study is on 3: give its data\n" in capsys.readouterr().err
    ablate.prepare_output(tmp_path / "out", ablate.read_study(str(study()))[1])
    assert ablated(study(epochs=3), data) == 2
    assert "out was trained with epochs=2 and cannot continue with epochs=3: give " in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs/studies").glob("*.yaml")))
def test_the_studies_that_ship(name):
    _, found = ablate.read_study(name)
    assert set(found.rows) <= set(ablate.ROWS)
    assert len(found.seeds) >= 3


def test_every_ablation_is_a_row():
    models = {row["model"] for row in ablate.ROWS.values()}
    assert models == {"poolformer_s12", *ABLATIONS, *QUESTIONS}


# Statistics


def results(monkeypatch, top1: dict[str, list[float]]) -> Results:
    monkeypatch.setattr("metaformer.records.statistics.check_recipe", lambda *_: None)
    records = []
    for row, values in top1.items():
        for seed, value in enumerate(values):
            record = {
                "kind": "training",
                "model": "m",
                "data": {"classes": 10},
                "devices": 1,
                "images_per_s": 1.0,
                "seed": seed,
                "starts": [
                    {
                        **{"command": "c", "commit": None, "versions": {}, "date": "2026-01-01T00:00:00+00:00"},
                        "hardware": {"cpu": "a", "cores": 2, "gpus": []},
                    }
                ],
                "settings": {"study": "cifar10", "row": row},
                "curve": [{"top1": 1.0}, {"top1": value}],
            }
            records.append(parse(record, Path("x")))
    return Results("cifar10", records)


A, B = [70.0, 71.5, 69.0], [72.0, 72.5, 72.1, 75.0]


def test_intervals_are_students_and_welchs(monkeypatch):
    found = results(monkeypatch, {"identity": A, "baseline": B})
    one = scipy.stats.ttest_1samp(A, 0).confidence_interval(0.95)
    assert found.estimate({"identity": 1})[1:3] == pytest.approx(one)
    two = scipy.stats.ttest_ind(A, B, equal_var=False).confidence_interval(0.95)
    assert found.estimate({"identity": 1, "baseline": -1})[1:3] == pytest.approx(two)
    scaled = scipy.stats.ttest_ind(A, [0.9 * b for b in B], equal_var=False).confidence_interval(0.95)
    shifted = found.estimate({"identity": 1, "baseline": -0.9, "point": 2, "chance": 0.5})
    assert shifted[1:3] == pytest.approx([bound + 2 + 5 for bound in scaled])


def test_seeds_that_agree_are_not_certain(monkeypatch):
    """Variances are at least the binomial ones of the 10,000 validation images."""
    found = results(monkeypatch, {"identity": [10.0] * 3, "baseline": [10.1, 10.1, 10.11], "pool5": [0.0] * 3})
    deviations = [scipy.stats.binom(10_000, share).std() / 100 for share in (0.1, 0.10103333)]
    low = 10.0 - found.estimate({"identity": 1}).low
    assert 2 * scipy.stats.t.sf(low / (deviations[0] / math.sqrt(3)), 2) == pytest.approx(0.05)
    difference = found.estimate({"baseline": 1, "identity": -1})
    half = difference.high - difference.value
    test = scipy.stats.ttest_ind_from_stats(half, deviations[1], 3, 0, deviations[0], 3, equal_var=False)
    assert test.pvalue == pytest.approx(0.05)
    assert found.judge([{"baseline": 1, "identity": -1}]).verdict == "undecided"
    none_right = found.estimate({"pool5": 1})
    assert none_right.high > none_right.low


def test_paired_intervals_are_those_of_single_seeds(monkeypatch):
    found = results(monkeypatch, {"identity": A, "baseline": B, "pool5": [a + 1 for a in A], "pool7": A[:2]})
    expected = scipy.stats.ttest_rel(A, B[:3])
    paired = found.paired({"identity": 1, "baseline": -1})
    assert paired[1:3] == pytest.approx(expected.confidence_interval(0.95))
    assert paired.p == pytest.approx(expected.pvalue)
    shifted = found.paired({"identity": 1, "baseline": -1, "chance": 0.5, "point": -2})
    assert shifted[:3] == pytest.approx([bound + 3 for bound in paired[:3]])
    assert found.paired({"identity": 1, "pool5": -1}) is None  # all seeds agree, which is not certainty
    assert found.paired({"identity": 1, "pool7": -1}) is None  # two seeds
    assert found.estimate({"identity": 1, "baseline": -1}).p == pytest.approx(
        scipy.stats.ttest_ind(A, B, equal_var=False).pvalue
    )


def test_holm_keeps_what_stays_below_5_percent():
    values = [0.001, 0.04, 0.011, 0.03, 0.0126]
    rejected = [
        True,
        False,
        True,
        False,
        True,
    ]  # times 5, 1, 4, 2 and 3, and not less than the ones before: 0.005, 0.06, 0.044, 0.06, 0.044
    judgements = [Judgement("holds", p, []) for p in values]
    judgements.insert(2, Judgement("not run", None, []))
    verdicts = holm(judgements)
    assert verdicts.pop(2) == "not run"
    assert [verdict == "holds" for verdict in verdicts] == rejected


def test_verdicts(monkeypatch):
    found = results(monkeypatch, {"identity": A, "baseline": B, "pool5": [60.0, 60.1, 60.2], "pool7": [70.0]})
    assert found.judge([{"identity": 1, "pool5": -1}]).verdict == "holds"
    assert found.judge([{"pool5": 1, "identity": -1}]).verdict == "fails"
    assert (
        found.judge([{"baseline": 1, "pool5": -1}, {"identity": 1, "baseline": -1, "point": 2}]).verdict == "undecided"
    )
    assert found.judge([{"pool7": 1, "pool5": -1}]).verdict == "not run"
    assert found.judge([{"relu": 1, "pool5": -1}]).verdict == "not run"
    assert found.judge([{"relu": 1, "pool5": -1}, {"pool5": 1, "identity": -1}]).verdict == "fails"


def test_the_status_names_a_study_with_missing_runs(monkeypatch, tmp_path):
    measured = Measured(tmp_path)
    measured.studies["cifar10"] = found = results(monkeypatch, {"identity": A})
    tables = {name: Table(name, "", [], []) for name in (*outputs.NUMBERED, "conclusions")}
    planned = len(found.study.rows) * len(found.study.seeds)
    assert f"(cifar10 is partial: 3 of {planned} runs)" in outputs.status(tables, measured)
    found.study.rows, found.study.seeds = ["identity"], [0, 1, 2]
    assert "partial" not in outputs.status(tables, measured)


def test_a_run_that_left_out_pictures_is_not_comparable(monkeypatch):
    (record,) = results(monkeypatch, {"identity": [70.0]}).records
    monkeypatch.undo()
    study = read_study("cifar10")[1]
    settings = check({**study.recipe, **ROWS["identity"]}, source="x").model_dump(mode="json")
    settings |= {"study": "cifar10", "row": "identity", "seed": 0}
    content = {**record.model_dump(), "settings": settings, "data": study.data.model_dump()}
    assert Results("cifar10", [parse(content, Path("x"))]).top1.to_dict() == {"identity": {0: 70.0}}
    with pytest.raises(InputError, match="row identity, seed 0 with skipped pictures=1, and the study has 0"):
        Results("cifar10", [parse({**content, "skipped": {"training": 0, "validation": 1}}, Path("x"))])


@pytest.mark.parametrize(
    ("name", "value", "planned"),
    [("weight_decay", 0.5, 0.05), ("mixup", 0.8, 0.0), ("clip_grad", 1.0, None), ("checkpoint", "x.pt", None)],
)
def test_a_record_with_a_setting_that_the_recipe_leaves_alone_is_refused(name, value, planned, monkeypatch):
    (record,) = results(monkeypatch, {"identity": [70.0]}).records
    monkeypatch.undo()
    study = read_study("cifar10-cpu")[1]
    settings = check({**study.recipe, **ROWS["identity"]}, source="x").model_dump(mode="json")
    # What the model fills in, what does not change a run, and what an earlier version did not have.
    settings |= {"interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3, "workers": 7, "output": "x"}
    del settings["erase_count"]
    settings |= {"study": "cifar10-cpu", "row": "identity", "seed": 0}
    content = {**record.model_dump(), "settings": settings, "data": study.data.model_dump()}
    assert len(Results("cifar10-cpu", [parse(content, Path("x"))]).runs) == 1
    with pytest.raises(InputError, match=f"seed 0 with {name}={value}, and the study has {planned}: the record has "):
        Results("cifar10-cpu", [parse({**content, "settings": {**settings, name: value}}, Path("x"))])


def test_copies_of_the_data_that_differ_are_noted(monkeypatch):
    records = results(monkeypatch, {"identity": A}).records
    of = [records[0].data.model_copy(update={"train_sha256": name, "val_sha256": "v"}) for name in "abb"]
    known = [record.model_copy(update={"data": data}) for record, data in zip(records, of, strict=True)]
    noted = "cifar10: the runs read 2 copies of the data, whose files differ in name or size."
    found = Results("cifar10", known)
    found.study.title, found.study.note = "A", "note of\ntwo lines."
    about, *others = studies.study_notes("cifar10", found)
    assert about == "cifar10: A. note of two lines."
    assert noted in others
    alike_or_unknown = Results("cifar10", [records[0], *known[1:]])
    assert noted not in studies.study_notes("cifar10", alike_or_unknown)


def test_rank_correlation(monkeypatch):
    paper = {"baseline": 77.2, "identity": 74.3, "pool5": 77.2, "relu": 76.4, "silu": 77.1, "ppaa": 81.0}
    here = {"baseline": 60.0, "identity": 58.0, "pool5": 63.0, "relu": 61.0, "silu": 59.0}
    number, found = results(monkeypatch, {row: [value] for row, value in here.items()}).rank_correlation(paper)
    assert number == 5
    expected = scipy.stats.spearmanr([paper[row] for row in here], list(here.values())).statistic
    assert found.value == pytest.approx(expected)
    # Bonett and Wright (2000), Eq. 2
    half = scipy.stats.norm.ppf(0.975) * math.sqrt((1 + expected**2 / 2) / 2)
    assert math.atanh(found.high) - math.atanh(found.low) == pytest.approx(2 * half)
    few = results(monkeypatch, {row: [here[row]] for row in list(here)[:3]})
    assert few.rank_correlation(paper) == (3, None)
    tied = results(monkeypatch, {row: [10.0] for row in here})
    assert tied.rank_correlation(paper) == (5, None)


def test_the_papers_own_figures_agree_with_its_conclusions():
    top1 = {row["row"]: row["top1"] for row in rows_of("table5")}
    top1 |= {"chance": 0.1, "point": 1.0}
    for statement in statements()["the paper"]:
        for weights in statement.tests:
            assert sum(weight * top1[name] for name, weight in weights.items()) > 0, statement.text


def test_a_statement_about_no_row_is_named(tmp_path, monkeypatch):
    """It would never be run."""
    monkeypatch.setattr(statistics, "STATEMENTS", tmp_path / "statements.yaml")
    (tmp_path / "statements.yaml").write_text("users: [{text: a, tests: [{baseline: 1, identiy: -1}]}]")
    with pytest.raises(InputError, match=r"users.0.tests.0.identiy.\[key\] is 'identiy' in .*: input should be 'base"):
        statements.__wrapped__()


def test_a_record_of_a_study_counts_when_it_is_done():
    record = results(pytest.MonkeyPatch(), {"identity": [70.0]}).records[0].model_dump()
    for changes, says in (
        ({"status": "running"}, "must be done"),
        ({"status": "failed"}, "the run failed: lost"),
        ({"curve": []}, "the run has not finished an epoch"),
        ({"curve": [{"top1": float("nan")}]}, r"curve\.0\.top1"),
    ):
        with pytest.raises(InputError, match=says):
            parse({**record, "error": "lost", **changes}, Path("x"))
    assert isinstance(parse({**record, "status": "diverged", "images_per_s": None, "curve": []}, Path("x")), Training)
