"""Several processes: the same numbers as one, decisions taken together, and machines that share no disk."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import submitit.core._submit
import timm
import torch
import torch.distributed.run
import yaml
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE
from submitit.slurm.test_slurm import mocked_slurm
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args

from conftest import EVERYTHING_RANDOM, ROOT, TINY, draw, pack, run_script, wait_for, wait_until
from metaformer.training import distributed, slurm
from metaformer.training.config import load_config
from metaformer.training.distributed import Processes
from metaformer.training.engine import Trainer
from metaformer.weights import read_checkpoint
from oracles import relative_error
from pairs import Script, Signal, pair
from test_training import losses, rows, same_weights

RANDOM = (*EVERYTHING_RANDOM, "output=run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, pictures):
    """The run of two processes with the settings RANDOM."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert [ended.status for ended in pair(f"data_dir={pictures}", *RANDOM, folders=(folder, folder))] == [0, 0]
    return folder / "run"


def test_two_processes_give_the_curve_of_one_that_accumulates(run, pictures, tmp_path):
    settings = [f"data_dir={pictures}", *EVERYTHING_RANDOM, "epochs=3", "global_batch=12", "device_batch=2"]
    one = run(*settings)
    main, other = pair(*settings, "output=two", folders=(tmp_path, tmp_path))
    assert (main.status, other.status) == (0, 0), main.printed + other.printed
    assert "12 = 2 devices x 3 passes x 2 images" in main.printed
    assert other.printed == ""
    assert len(rows(one)) == 3
    for a, b in zip(rows(one), rows(tmp_path / "two"), strict=True):
        for key in ("train_loss", "val_loss", "top1"):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4)
    states = [read_checkpoint(folder / "last.pt")["state_dict"] for folder in (one, tmp_path / "two")]
    moved = timm.create_model("poolformer_s12", num_classes=3, **yaml.safe_load(TINY[0].partition("=")[2]))
    vectors = [torch.cat([state[name].flatten() for name in moved.state_dict()]) for state in states]
    assert relative_error(*vectors) < 1e-4
    assert json.loads((tmp_path / "two" / "run.json").read_text())["devices"] == 2


@pytest.mark.parametrize(("method", "rank"), [("optimizer_step", 1), ("interruptible", 0), ("interruptible", 1)])
def test_a_signal_to_one_process_stops_both(method, rank, undisturbed, pictures, tmp_path):
    """Also while validating, where the first process has two batches of the 9 images and the second has one."""
    settings, folders = (f"data_dir={pictures}", *RANDOM), (tmp_path, tmp_path)
    ended = pair(*settings, folders=folders, stop=Signal(method, rank))
    assert [process.status for process in ended] == [128 + signal.SIGTERM] * 2
    assert "SIGTERM: saved epoch" in ended[0].printed
    assert read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] < 2
    assert [process.status for process in pair(*settings, "resume=true", folders=folders)] == [0, 0]
    assert same_weights(undisturbed, tmp_path / "run")
    assert losses(undisturbed) == losses(tmp_path / "run")


def test_machines_that_share_no_disk_continue_from_the_first_ones_checkpoint(undisturbed, pictures, tmp_path):
    settings, folders = (f"data_dir={pictures}", *RANDOM), (tmp_path / "first", tmp_path / "second")
    ended = pair(*settings, folders=folders, stop=Signal("optimizer_step", 0))
    assert {process.status for process in ended} == {128 + signal.SIGTERM}
    assert not (folders[1] / "run").exists()
    assert [process.status for process in pair(*settings, "resume=true", folders=folders)] == [0, 0]
    assert same_weights(undisturbed, folders[0] / "run")
    assert losses(undisturbed) == losses(folders[0] / "run")


def test_machines_with_other_settings_or_data_are_refused(pictures, tmp_path):
    other = draw(tmp_path / "other", train_images=27, val_images=9)
    for setting, sentence in [
        ("lr=0.1", "error: process 0 has lr=0.002 and process 1 has lr=0.1: start the same command"),
        (f"data_dir={other}", "error: process 0 has train_images=24 and process 1 has train_images=27: start the same"),
    ]:
        for ended in pair(f"data_dir={pictures}", folders=(tmp_path, tmp_path), of_one=(setting,)):
            assert ended.status == 2
            assert ended.printed.startswith(sentence)
            assert ended.printed.count("\n") == 1


def test_what_two_processes_validate_is_what_they_save(pictures, tmp_path):
    """Batch norm gathers other statistics in each process."""
    settings = [f"data_dir={pictures}", "model=metaformer_s12_bn", "epochs=1", "output=run"]
    assert [ended.status for ended in pair(*settings, folders=(tmp_path, tmp_path))] == [0, 0]
    folder = tmp_path / "run"
    assert run_script("classification/validate.py", folder, "--record", tmp_path / "record.json") == 0
    metrics = json.loads((tmp_path / "record.json").read_text())["metrics"]
    assert float(rows(folder)[0]["val_loss"]) == pytest.approx(metrics["loss"], rel=1e-6)


def test_two_processes_validate_each_picture_of_a_stream_once(run, pictures, tmp_path):
    """The one has two shards of three pictures and the other one; timm would give both five, some of them twice."""
    still = ("lr=0", "weight_decay=0", "epochs=1")
    one, shards = run(*still), pack(tmp_path / "wds", pictures, train=2, val=3)
    settings = ["dataset=wds/local", f"data_dir={shards}", "num_classes=3", *still, "output=two"]
    for ended in pair(*settings, folders=(tmp_path, tmp_path)):
        assert ended.status == 0, ended.printed
    assert float(rows(tmp_path / "two")[0]["val_loss"]) == pytest.approx(float(rows(one)[0]["val_loss"]), rel=1e-5)


def workers_of(launcher: Script) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def test_after_a_kill_two_processes_restart_from_the_last_checkpoint_and_a_signal_to_the_launcher_saves(
    pictures, tmp_path
):
    """The run of two processes would take long; what follows begins when it has ended its first epoch."""
    settings = [f"data_dir={pictures}", *TINY, "epochs=500", "output=run"]
    (tmp_path / "empty.yaml").write_text("")
    launcher = Script("classification/launch.py", ["empty.yaml", *settings], tmp_path, GPUS="2", RESTARTS="1")
    run, record = tmp_path / "run", tmp_path / "run" / "run.json"
    wait_for(run / "metrics.csv")
    first = workers_of(launcher)
    epoch = len(rows(run))
    os.kill(first[1], signal.SIGKILL)
    wait_until(lambda: len(json.loads(record.read_text())["starts"]) == 2 and len(rows(run)) > epoch)
    assert not {*first} & {*workers_of(launcher)}
    launcher.send_signal(signal.SIGUSR2)
    status, out, err = launcher.ended()
    assert (status, err) == (128 + signal.SIGUSR2, "")
    assert "SIGUSR2: saved epoch" in out
    assert epoch < read_checkpoint(run / "last.pt")["epoch"] < 500
    assert [row["epoch"] for row in rows(run)] == [str(i + 1) for i in range(len(rows(run)))]


def test_killed_processes_start_again_as_often_as_asked(tmp_path):
    """Programs in the place of train.py, of which the second is killed each time."""
    shutil.copy(ROOT / "classification/launch.py", tmp_path)
    (tmp_path / "train.py").write_text(
        "import os, pathlib, signal\n"
        "rank, restarts = os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "pathlib.Path(f'started-{restarts}-{rank}').touch()\n"
        "os.kill(os.getpid(), signal.SIGKILL) if rank == '1' else signal.pause()\n"
    )
    launcher = Script(tmp_path / "launch.py", [], tmp_path, GPUS="2", RESTARTS="1")
    assert launcher.ended() == (128 + signal.SIGKILL, "", "error: process 1 was killed by SIGKILL\n")
    assert {path.name for path in tmp_path.glob("started-*-1")} == {"started-0-1", "started-1-1"}


def test_the_launcher_waits_until_a_run_has_saved(monkeypatch):
    """Nearly as long as Slurm waits, and not the 30 seconds of torchrun."""
    assert 100 < launched(monkeypatch, "empty.yaml")[0].shutdown_timeout < 120


def launched(monkeypatch, *arguments) -> tuple[LaunchConfig, list[str]]:
    """What torchrun makes of the launcher's options, and the arguments of train.py."""
    given = []
    monkeypatch.setattr(torch.distributed.run, "run", lambda args: given.extend(config_from_args(args)))
    monkeypatch.setattr(logging, "disable", lambda level: None)  # the tests that follow read logs
    monkeypatch.setenv("GPUS", "2")
    assert run_script("classification/launch.py", *arguments) == 0
    configuration, _, (_, _, *given) = given  # after "-u" and train.py
    return configuration, given


@pytest.mark.parametrize(("setting", "output"), [("output=mine", "mine"), ("epochs=2", "runs/poolformer_s12-")])
def test_processes_that_are_restarted_find_the_run_in_its_folder(setting, output, tmp_path, monkeypatch):
    monkeypatch.setenv("RESTARTS", "1")
    (tmp_path / "empty.yaml").write_text("")
    _, arguments = launched(monkeypatch, str(tmp_path / "empty.yaml"), setting)
    config = load_config(arguments)
    assert (config.output.startswith(output), config.resume) == (True, True)


def test_machines_agree_on_what_decides_when_they_meet(pictures, tmp_path, monkeypatch):
    compared = {}
    monkeypatch.setattr(Processes, "check_same", lambda self, values: compared.update(values))
    (tmp_path / "empty.yaml").write_text("")
    config = load_config([str(tmp_path / "empty.yaml"), f"data_dir={pictures}", *TINY])
    Trainer(config, Processes(torch.device("cpu")))
    assert {"log_interval", "bad_pictures"} <= compared.keys()
    assert not {"workers", "data_dir", "output", "resume"} & compared.keys()


def test_a_job_is_queued_again_however_often_its_time_ends(tmp_path):
    with mocked_slurm(), patch.object(slurm.shutil, "which", return_value="sbatch"):
        [job] = slurm.submit([slurm.TrainingJob([], 1)], str(tmp_path), None, 1, 1, 9)
        assert job.submission()._timeout_countdown >= 1000


def test_a_preempted_job_is_queued_again_when_the_run_has_saved(tmp_path):
    job = slurm.TrainingJob(["--resume"], gpus=2)
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    saving = f"trap 'sleep 0.5; touch {saved}; exit 143' TERM; touch {ready}; while true; do sleep 0.02; done"
    job.process = subprocess.Popen(["bash", "-c", saving])
    wait_for(ready)
    delayed = job.checkpoint()
    assert saved.exists()
    assert vars(delayed.function) == {"arguments": ["--resume"], "gpus": 2, "process": None}
    assert job.process.wait() == 143
    assert vars(job.checkpoint().function) == vars(delayed.function)  # preempted when the run has just ended
    job.process = None
    assert vars(job.checkpoint().function) == vars(delayed.function)  # preempted before the run has begun


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(distributed, "cores", lambda: 9)
    workers = [Processes(torch.device("cpu"), local_world=number).default_workers() for number in (1, 2, 4, 16)]
    assert workers == [9, 4, 2, 1]


def test_a_preempted_slurm_job_continues(tmp_path):
    """submitit's task, twice. A program in the place of bash saves on SIGTERM and ends when it finds what it saved."""
    bash = tmp_path / "bash"
    bash.write_text(
        "#!/bin/sh\n"
        'echo "$@" "$GPUS $NNODES $NODE_RANK $MASTER_ADDR $PORT $PYTHON $CUDA_VISIBLE_DEVICES" >> started\n'
        "trap 'touch saved; exit 143' TERM\n"
        "until [ -e saved ]; do sleep 0.02; done\n"
    )
    bash.chmod(0o755)
    job = DelayedSubmission(slurm.TrainingJob(["run", "--resume"], 2))
    job.set_timeout(60, 0)
    job.dump(JobPaths(tmp_path, job_id="7").submitted_pickle)
    environment = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0,1"}
    for status in (LOCAL_REQUEUE_RETURN_CODE, 0):
        path = f"{tmp_path}:{os.environ['PATH']}"
        task = Script(submitit.core._submit.__file__, [str(tmp_path)], tmp_path, PATH=path, **environment)
        if status:
            wait_for(tmp_path / "started")
            task.send_signal(signal.SIGUSR2)
        assert task.ended()[0] == status
    started = f"{slurm.SCRIPT} run --resume 2 1 0 127.0.0.1 {20000 + 7} {sys.executable} 0,1"
    assert (tmp_path / "started").read_text().splitlines() == [started] * 2


@pytest.mark.parametrize(
    ("given", "output"),
    [
        (["run"], "run"),
        (["empty.yaml", "--output", "runs/x"], "runs/x"),
        (["empty.yaml", "--output=runs/x"], "runs/x"),
        (["empty.yaml", "output=runs/x"], "runs/x"),
        (["empty.yaml"], "runs/poolformer_s12-"),
    ],
)
def test_a_submitted_run_has_the_folder_that_was_asked_for(given, output, tmp_path, monkeypatch):
    """Or one of its own, in which it continues when it is queued again."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty.yaml", "run/config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    jobs = []

    def submit(submitted, *_):
        jobs.extend(submitted)
        return [SimpleNamespace(job_id=1, paths=SimpleNamespace(stdout="log"))]

    monkeypatch.setattr(slurm, "submit", submit)
    assert run_script("classification/submit.py", "--gpus", 2, *given, "warmup_epochs=7") == 0
    config = load_config(jobs[0].arguments)
    assert (config.output.startswith(output), config.resume, config.warmup_epochs, jobs[0].gpus) == (True, True, 7, 2)
    assert output.endswith("-") or config.output == output


def test_what_cannot_run_is_not_submitted(tmp_path, monkeypatch, command):
    monkeypatch.setattr(slurm, "submit", pytest.fail)
    for arguments, sentence in [
        (["--gpus", 0], "--nodes, --gpus, --cpus-per-gpu and --time are whole numbers from 1"),
        (["epoch=3"], "the command line has an unknown setting 'epoch'"),
        (["--partitoin", "gpu"], "the command line has an unknown setting 'partitoin'"),
        ([tmp_path / "nowhere.yaml"], "there is no config"),
    ]:
        status, _, error = command("classification/submit.py", *arguments)
        assert (status, error.count("\n")) == (2, 1)
        assert error.startswith(f"error: {sentence}")
