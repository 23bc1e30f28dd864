"""Wrong input ends in a clear sentence that names the thing and the remedy, with exit status 2, and nothing is lost."""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from conftest import ROOT, TINY, draw, pack, trained
from metaformer import InputError, MetaFormer, open_checkpoint
from metaformer.training import engine as train
from metaformer.training.batches import Batch, checked
from metaformer.training.checkpoints import locked
from metaformer.training.config import load_config
from metaformer.training.data import load_data, open_split
from metaformer.training.distributed import Processes
from metaformer.training.loader import share_shards
from metaformer.weights import read_checkpoint
from oracles import save_run
from pairs import Script


def copied(pictures, root):
    """A data folder of one's own to spoil."""
    for file in pictures.glob("*/*/*.png"):
        target = root / file.relative_to(pictures)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return root


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["epoch=3"], r"the command line has an unknown setting 'epoch' \(did you mean 'epochs'\?\)"),
        (["--gloabl-batch", "8"], r"unknown setting 'gloabl_batch' \(did you mean 'global_batch'\?\)"),
        (["epochs=many"], r"epochs is 'many' in the command line.*integer"),
        (["drop_path=1.5"], r"drop_path is 1.5 in the command line.*less than 1"),
        (["epochs=true"], r"epochs is True in .*should be a valid integer"),
        (["lr=true"], r"lr is True in .*should be a valid number"),
        (["mean=[true, 0, 0]"], r"mean.0 is True in .*should be a valid number"),
        (["lr=-1"], r"lr is -1 in .*greater than or equal to 0"),
        (["lr=.nan"], r"lr is nan in .*finite"),
        (["weight_decay=-0.1"], r"weight_decay is -0.1 in .*greater than or equal to 0"),
        (["clip_grad=0"], r"clip_grad is 0 in .*greater than 0"),
        (["clip_grad=-1"], r"clip_grad is -1 in .*greater than 0"),
        (["layer_decay=0"], r"layer_decay is 0 in .*greater than 0"),
        (["layer_decay=1.5"], r"layer_decay is 1.5 in .*less than or equal to 1"),
        (["opt_betas=[0.9, 1]"], r"opt_betas.1 is 1 in .*less than 1"),
        (["opt_betas=0.9"], r"opt_betas is 0.9 in "),
        (["opt_eps=-1"], r"opt_eps is -1 in "),
        (["opt=adamww"], r"opt is 'adamww' in .*timm has no such optimizer \(did you mean 'adamw'\?\)"),
        (["opt=adan", "opt_betas=[0.9, 0.99]"], r"cannot make opt=adan with opt_betas=\(0.9, 0.99\)"),
        (["opt=fusedadam"], r"cannot make opt=fusedadam .*CUDA required"),
        (["opt=adahessian"], r"opt=adahessian needs second derivatives"),
        (["mixup=-1"], r"mixup is -1 in "),
        (["color_jitter=-1"], r"color_jitter is -1 in "),
        (["drop=1"], r"drop is 1 in .*less than 1"),
        (["smoothing=1"], r"smoothing is 1 in .*less than 1"),
        (["ema_decay=1"], r"ema_decay is 1 in .*less than 1"),
        (["mean=[123, 116, 103]"], r"mean.0 is 123 in .*less than or equal to 1"),
        (["std=[0, 0, 0]"], r"std.0 is 0 in .*greater than 0"),
        (["scale=[0.5, 0.1]"], r"scale is \[0.5, 0.1\] in .*not larger than the second"),
        (["scale=[0, 0]"], r"scale is \[0, 0\] in .*must be positive"),
        (["ratio=[2, 1]"], r"ratio is \[2, 1\] in .*not larger than the second"),
        (["crop_pct=1.1"], r"crop_pct is 1.1 in "),
        (["interpolation=cubic"], r"interpolation is 'cubic' in .*'bicubic'"),
        (["warmup_epochs=3"], r"warmup_epochs=3 is longer than epochs=2"),
        (["lr=1e-6", "min_lr=1e-5"], r"min_lr=1e-05 is above the learning rate 1e-06: give a smaller min_lr="),
        (["lr=1e-6", "warmup_epochs=1", "warmup_lr=1e-5"], r"warmup_lr=1e-05 is above the learning rate 1e-06: give"),
        (["mixup_off_epoch=-1"], r"mixup_off_epoch is -1 in "),
        (["min_lr=-1"], r"min_lr is -1 in "),
        (["expected_top1=7720"], r"expected_top1 is 7720 in "),
        (["pretrained=true", "checkpoint=x.pt"], r"pretrained=true and checkpoint= exclude each other"),
        (["replace_head=true"], r"replace_head=true needs checkpoint="),
        (["precision=half"], r"precision is 'half'.*'float32'"),
        (["--epochs"], r"--epochs needs a value"),
        (["epochs"], r"cannot read the argument 'epochs'"),
        (["model=poolfomer_s12"], r"no model 'poolfomer_s12' \(did you mean 'poolformer_s12'\?\)"),
        (["model_args={depth: [1, 1, 1, 1]}"], r"poolformer_s12 does not take these arguments: .*'depth'"),
        (["data_dir=nowhere"], r"there is no data folder nowhere: give data_dir the path of one"),
        (["data_dir=" + "x" * 300], r"there is no data folder xx"),
        (["data_dir=null"], r"no data given: use data_dir=PATH"),
        (["val_split=test"], r"has no folder for the split 'test': name it with train_split= or val_split="),
        (["val_split=train[90%:]"], r"has no folder for the split 'train\[90%:\]': name it with"),
        (["dataset=imagenet", "val_split=test"], r"has no folder for the split 'test': name it with"),
        (["dataset=hfds/./nowhere"], r"cannot open the split 'train' of hfds/./nowhere"),
        (["auto_augment=rand-mx"], r"auto_augment is 'rand-mx' in .*a section is a letter or word with a number"),
        (["auto_augment=rand-m11"], r"auto_augment is 'rand-m11' in .*the magnitude is m0 to m10"),
        (["auto_augment=trivial"], r"timm has no such augmentation: auto_augment=trivial"),
        (["auto_augment=rand-z9"], r"timm has no such augmentation: auto_augment=rand-z9"),
        (["train_interpolation=cubic"], r"train_interpolation is 'cubic' in the command line .*'bicubic'"),
        (["num_classes=10"], r"num_classes is 10, but .* has 3 classes"),
        (["global_batch=25"], r"global_batch=25 is larger than the 24 training images: use global_batch=24 or less"),
        (
            ["global_batch=5", "mixup=0.8"],
            r"Mixup and CutMix need even numbers: use global_batch=6 and device_batch=2 or",
        ),
        (["global_batch=4", "device_batch=1", "mixup=0.8"], r"use global_batch=4 and device_batch=2 or more, or mixup"),
        (["global_batch=5", "device_batch=1", "cutmix=1"], r"use global_batch=6 and device_batch=2 or more, or mixup"),
        (
            ["pretrained=true", "model_args={pretrained_cfg_overlay: {url: 'file:///nowhere.pth'}}"],
            r"cannot fetch file:///nowhere.pth .*name the file as checkpoint",
        ),
        (["checkpoint=nowhere.pt"], r"there is no checkpoint nowhere.pt"),
        (["output=empty.yaml/run"], r"cannot write empty.yaml/run: Not a directory"),
        (["precision=float16"], r"precision=float16 needs a GPU"),
        (
            ["model=vit_tiny_patch16_224", "model_args={depth: 1}"],
            r"vit_tiny_patch16_224 does not take RGB images of 32 x 32 pixels \(.*224.*\): .*model_args={img_size: 32}",
        ),
        (["model=resnet10t", "model_args={in_chans: 1}"], r"does not take RGB images of 32 x 32 pixels \(.*1 channels"),
        (["model=resnet10t", "model_args={output_stride: 64}"], r"resnet10t does not take these arguments: Assertion"),
        (["model=resnet10t", "model_args={features_only: true}"], r"resnet10t .* does not give a vector of logits"),
        (
            ["model=vit_tiny_patch16_224", "model_args={img_size: 32, depth: 1, global_pool: ''}"],
            r"vit_tiny_patch16_224 .* does not give a vector of logits",
        ),
        (["model=dla46_c", "model_args={}", "grad_checkpointing=true"], r"dla46_c does not take grad_checkpointing"),
        (["model=metaformer_s12_bn", "device_batch=1"], r"^Expected more than 1 value .*: use a larger device_"),
    ],
)
def test_settings(settings, sentence, run):
    with pytest.raises(InputError, match=sentence) as error:
        run(*settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epochs: [", r"is not valid YAML"),
        ("- epochs", r"holds a list: a config is a list of lines `key: value`"),
        ("epohcs: 3", r"mine.yaml has an unknown setting 'epohcs' \(did you mean 'epochs'\?\)"),
        ("base: middle.yaml", r"middle.yaml is the base of another config and has a base itself"),
        ("base: nowhere.yaml", r"there is no config .*nowhere.yaml"),
    ],
)
def test_config_files(text, sentence, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "middle.yaml").write_text("base: last.yaml")
    with pytest.raises(InputError, match=sentence):
        trained(str(tmp_path / "mine.yaml"))


def test_the_batch_that_is_proposed_for_few_pictures_suits_mixup(run, tmp_path):
    data = draw(tmp_path / "few", train_images=9)
    with pytest.raises(InputError, match=r"larger than the 9 training images: use global_batch=8 or less"):
        run(f"data_dir={data}", "global_batch=10", "mixup=0.8")


def test_a_gpu_with_too_little_memory(run, command, pictures, tmp_path, monkeypatch):
    def fails(self, x):
        if len(x) > 2:  # the check of the input takes one image
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, x)

    forward = MetaFormer.forward
    save_run(tmp_path / "run", data_dir=str(pictures), workers=0)
    monkeypatch.setattr(MetaFormer, "forward", fails)
    says = "the GPU has too little memory for {} images at once: use a smaller device_batch=, or --batch of predict.py"
    with pytest.raises(InputError, match=says.format(4)):
        run("device_batch=4", output="out")
    assert json.loads(Path("out/run.json").read_text())["status"] == "failed"
    for arguments in (["validate.py", tmp_path / "run"], ["predict.py", pictures, "--checkpoint", tmp_path / "run"]):
        status, _, error = command(f"classification/{arguments[0]}", *arguments[1:])
        assert (status, re.match(f"error: {says.format('[0-9]+')}\n", error) is not None) == (2, True), error


@pytest.mark.parametrize("name", ["stages.0.blocks.0.mlp.fc1.weight", "head.bias"])
def test_weights_that_are_not_finite(name, pictures, tmp_path):
    save_run(tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run/best.pt")
    checkpoint["state_dict"][name].view(-1)[-1] = float("inf")
    torch.save(checkpoint, tmp_path / "run/best.pt")
    with pytest.raises(InputError, match=rf"best\.pt has weights that are not finite, such as {name}: use an earlier"):
        open_checkpoint(tmp_path / "run")


def test_outputs_that_are_not_finite(pictures, tmp_path, command):
    save_run(tmp_path / "run", data_dir=str(pictures), workers=0)
    checkpoint = torch.load(tmp_path / "run/best.pt")
    checkpoint["state_dict"]["head.weight"].fill_(3e38)
    torch.save(checkpoint, tmp_path / "run/best.pt")
    status, printed, error = command("classification/validate.py", tmp_path / "run")
    assert (status, printed) == (2, "")
    assert re.match(r"error: the outputs of \S+best\.pt are not finite, so that they rank no classes: use", error)


def test_empty_data_folder(run, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
    with pytest.raises(InputError, match=r"the data folder .*data/train is empty"):
        run(f"data_dir={tmp_path / 'data'}")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "a").mkdir()
    with pytest.raises(InputError, match=r"cannot open the split 'train' .*: Found 0 images"):
        run(f"data_dir={tmp_path / 'data'}")


def test_pictures_that_are_not_directly_in_a_class_folder(run, pictures, tmp_path):
    """timm would make a class of the innermost folder, and one without a name of the split's folder itself."""
    root = copied(pictures, tmp_path / "data")
    for split in ("train", "val"):
        (root / split / "a" / ".ipynb_checkpoints").mkdir()
        (root / split / "a" / "000.png").rename(root / split / "a" / ".ipynb_checkpoints" / "000.png")
    sentence = (
        rf"the split 'train' of {root}: the folder '.ipynb_checkpoints' of a picture is not one of the class folders"
    )
    with pytest.raises(InputError, match=sentence):
        run(f"data_dir={root}")
    assert len(load_data(load_config([f"data_dir={root}", "dataset=torch/folder"]), workers=0).class_names) == 3


def test_a_single_class(run, tmp_path):
    with pytest.raises(InputError, match=r"one has one class: a classifier needs two or more"):
        run(f"data_dir={draw(tmp_path / 'one', classes='a')}")


def test_class_folders_that_differ(run, pictures, tmp_path):
    root = copied(pictures, tmp_path / "data")
    (root / "val" / "c").rename(root / "val" / "d")
    with pytest.raises(InputError, match=r"differ .*\(only in train: c; only in validation: d\)"):
        run(f"data_dir={root}")


@pytest.mark.parametrize(
    ("split", "content", "workers"),
    [("train", b"", 0), ("train", "truncated", 1), ("val", "truncated", 0), ("val", b"no picture", 1)],
)
def test_unreadable_picture_is_named(split, content, workers, run, pictures, tmp_path):
    root = copied(pictures, tmp_path / "data")
    file = root / split / "b" / "001.png"
    file.write_bytes(file.read_bytes()[:200] if content == "truncated" else content)
    with pytest.raises(
        InputError, match=rf"cannot use the picture {file} \(.*\): repair it, remove it, or leave "
    ) as error:
        run(f"data_dir={root}", f"workers={workers}", "epochs=1")
    assert "\n" not in str(error.value)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_stream_that_gives_other_pictures_than_it_states(run, pictures, tmp_path):
    shards = pack(tmp_path / "wds", pictures, train=1, val=1)
    settings = ["dataset=wds/local", f"data_dir={shards}", "num_classes=3", "epochs=1"]
    for split, sentence in (
        ("val_split=val-{0000..0000}.tar|10", r"has 10 pictures, and its stream gave 9: .*, use one process, or give"),
        (
            "val_split=val-{0000..0000}.tar",
            r"its number of pictures is not given: .* as in val-\{0000..0000\}.tar\|50000",
        ),
    ):
        with pytest.raises(InputError, match=sentence):
            run(*settings, split, output=split.replace("/", ""))


def test_unreadable_pictures_of_a_stream(run, pictures, tmp_path):
    """timm's reader itself would leave them out of the training and say nothing that reaches the run."""
    root = copied(pictures, tmp_path / "data")
    for split in ("train", "val"):
        (root / split / "b" / "001.png").write_bytes(b"")
    damaged = pack(tmp_path / "damaged", root, train=1, val=1)
    settings = ["dataset=wds/local", f"data_dir={damaged}", "num_classes=3", "epochs=1"]
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"cannot use the picture number \d+ of a stream \(UnidentifiedImageError"):
            run(*settings, f"workers={workers}", output=f"workers{workers}")
    folder = run(*settings, "bad_pictures=skip", output="skip")
    assert json.loads((folder / "run.json").read_text())["skipped"] == {"training": 1, "validation": 1}
    with pytest.raises(InputError, match=r"number 0 of a stream \(ValueError: didn't find \['jpeg'\] in "):
        run(*settings, "dataset_args={input_key: jpeg}", output="key")


def test_a_stream_of_too_few_shards(run, pictures, tmp_path):
    shards = pack(tmp_path / "wds", pictures, train=1, val=1)
    settings = ["dataset=wds/local", f"data_dir={shards}", "num_classes=3", "epochs=1"]
    with pytest.raises(
        InputError, match=r"ended at step 2 of 3: .* shards than the 2 loader processes: .* fewer workers="
    ):
        run(*settings, "workers=2")
    reader = open_split(load_config(settings), "validation", workers=0).reader
    with pytest.raises(InputError, match=r"has 1 shards, too few for 2 processes: make more shards"):
        share_shards(reader, Processes(torch.device("cpu"), world=2))


def test_a_picture_without_a_name_is_numbered(run, pictures, tmp_path):
    """Of Hugging Face's data sets, those with the bytes of their pictures."""
    import datasets

    for split in ("train", "validation"):
        files = sorted((pictures / split[:5].replace("valid", "val")).glob("*/*.png"))
        images = [{"bytes": file.read_bytes(), "path": None} for file in files]
        images[5]["bytes"] = b"no picture"
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list("abc")))
        columns = {"image": images, "label": ["abc".index(file.parent.name) for file in files]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "hf" / f"{split}.parquet")
    with pytest.raises(InputError, match=r"cannot use the picture number 5 \(UnidentifiedImageError"):
        run(f"dataset=hfds/{tmp_path}/hf", f"data_dir={tmp_path}/cache")


def test_label_out_of_range():
    batch = Batch(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 2, 1]), [])
    assert list(checked(iter([batch]), num_classes=3)) == [batch[:2]]
    with pytest.raises(InputError, match="the data have a label 2, but num_classes is 2"):
        list(checked(iter([batch]), num_classes=2))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["model_args={depths: [1, 1, 1, 1], dims: [8, 12, 16, 24]}"], r"was trained as poolformer_s12 with .*depths"),
        (["model=metaformer_s12_identity"], r"and the model here is metaformer_s12_identity"),
        (["replace_head=true"], None),
        ([], r"has a classifier of 3 classes and the model one of 2: use replace_head=true"),
    ],
)
def test_checkpoints_that_do_not_fit(settings, sentence, run, shared_run, tmp_path):
    best = shared_run() / "best.pt"
    draw(tmp_path / "two", classes="ab")
    settings = [f"data_dir={tmp_path / 'two'}", "global_batch=4", f"checkpoint={best}", "epochs=1", *settings]
    if sentence is None:
        run(*settings, output="fits")
        return
    with pytest.raises(InputError, match=sentence):
        run(*settings, output="does-not-fit")
    assert not (tmp_path / "does-not-fit").exists()


@pytest.mark.parametrize(
    ("at", "sentence"),
    [
        (1, r"not finite by epoch 1, step 1; there was no checkpoint yet; try a lower lr="),
        (5, r"not finite by epoch 2, step 2; the last good checkpoint is run/last.pt; try a lower lr="),
    ],
)
def test_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(at, sentence, run, tmp_path, monkeypatch):
    original, taken = train.Trainer.optimizer_step, []

    def step(self, batches):
        taken.append(1)
        if len(taken) == at:
            with torch.no_grad():
                self.model.stem.weight.fill_(float("nan"))
        original(self, batches)

    monkeypatch.setattr(train.Trainer, "optimizer_step", step)
    with pytest.raises(InputError, match=sentence):
        run("epochs=3")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "diverged"
    if at == 5:
        state = read_checkpoint(tmp_path / "run" / "last.pt")
        assert state["epoch"] == 1
        assert all(value.isfinite().all() for value in state["state_dict"].values())


def test_a_run_is_not_overwritten(run):
    folder = run("epochs=1")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match=r"run already holds a run: add --resume to continue it, or give another"):
        run("epochs=1")
    with pytest.raises(InputError, match=r"trained with lr=0.002 and cannot continue with lr=0.1"):
        run("epochs=1", "lr=0.1", "--resume")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_folder_has_one_run_at_a_time(run, monkeypatch):
    folder = run("epochs=1")
    with locked(folder):
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        for settings in (["epochs=1"], ["epochs=1", "--resume"]):
            with pytest.raises(InputError, match=r"a run is under way in run: wait for it or stop it"):
                run(*settings)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
            run("epochs=1", "--resume")
    run("epochs=1", "--resume")


def test_a_lock_ends_with_its_process_and_not_with_those_of_the_loader(tmp_path):
    forked = multiprocessing.get_context("fork")
    begun = forked.Event()
    with locked(tmp_path):
        loader = forked.Process(target=lambda: (begun.set(), time.sleep(60)))
        loader.start()
    begun.wait()
    with locked(tmp_path):
        assert loader.is_alive()
    loader.kill()
    loader.join()


def test_the_command_is_the_process_of_its_script(tmp_path):
    """So that it gets the signals that are sent to the script."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $$ $@\n")
    python.chmod(0o755)
    command = ["bash", str(ROOT / "classification/dist_train.sh"), "a.yaml", "lr=1"]
    script = subprocess.Popen(command, env={**os.environ, "PYTHON": str(python)}, stdout=subprocess.PIPE, text=True)
    assert script.communicate()[0] == f"{script.pid} {ROOT}/classification/launch.py a.yaml lr=1\n"


def test_the_command_prints_one_line_and_exits_with_2(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    done = subprocess.run(
        ["bash", str(ROOT / "classification" / "dist_train.sh"), "empty.yaml", "data_dir=nowhere"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "GPUS": "1"},
        capture_output=True,
        text=True,
    )
    sentence = "error: there is no data folder nowhere: give data_dir the path of one\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)


def test_two_processes_that_fail_print_one_line(pictures, tmp_path):
    root = copied(pictures, tmp_path / "data")
    for file in root.glob("train/b/*.png"):
        file.write_bytes(b"")
    (tmp_path / "empty.yaml").write_text("")
    settings = ["empty.yaml", f"data_dir={root}", *TINY, "output=run"]
    status, _, error = Script("classification/launch.py", settings, tmp_path, GPUS="2").ended()
    assert (status, error.count("\n")) == (2, 1), error
    assert error.startswith("error: cannot use the picture")


def test_the_traceback_is_printed_if_asked_for(tmp_path, monkeypatch, command, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAFORMER_TRACEBACK", "1")
    status, _, error = command("classification/train.py", "nowhere.yaml")
    assert (status, error.startswith("Traceback")) == (2, True)
    # As one of several processes: torchrun's file takes the error, which the launcher prints.
    file = tmp_path / "error.json"
    worker = Script("classification/train.py", ["nowhere.yaml"], tmp_path, TORCHELASTIC_ERROR_FILE=str(file))
    assert worker.ended() == (2, "", "")
    failure = ChildFailedError("train.py", {1: ProcessFailure(1, worker.pid, 2, str(file))})
    report = runpy.run_path(str(ROOT / "classification/launch.py"))["report"]
    assert report(failure) == 2
    assert capsys.readouterr().err.startswith("Traceback")
    monkeypatch.delenv("METAFORMER_TRACEBACK")
    assert report(failure) == 2
    assert capsys.readouterr().err.startswith("error: there is no config nowhere.yaml: give")


def test_wrong_environment_of_the_launcher(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for environment, sentence in (
            ({"GPUS": "²"}, "error: GPUS=² in the environment: use a whole number from 1"),
            ({"GPUS": "2", "PORT": port}, f"error: the processes cannot meet at 127.0.0.1:{port}"),
        ):
            folder = tmp_path / environment["GPUS"]
            folder.mkdir()
            status, _, error = Script("classification/launch.py", [], folder, **environment).ended()
            assert (status, error.count("\n")) == (2, 1), error
            assert error.startswith(sentence)
