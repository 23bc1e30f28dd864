import csv
import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data import create_dataset
from torchvision import transforms

import metaformer
from conftest import EVERYTHING_RANDOM, ROOT, TINY, draw, pack, run_script, trained
from metaformer import InputError
from metaformer.training import batches, recipe, runlog
from metaformer.training import engine as train
from metaformer.training.config import CONFIGS, load_config
from metaformer.training.data import Digits, class_names, load_data
from metaformer.training.model import with_input_of
from metaformer.training.runlog import plot
from metaformer.weights import read_checkpoint
from test_model import PARAMETERS

README = (ROOT / "README.md").read_text()


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(folder):
    return [(row["epoch"], row["train_loss"], row["val_loss"], row["top1"], row["top5"]) for row in rows(folder)]


def same_weights(one, other):
    for key in ("state_dict", "state_dict_ema"):
        a, b = (read_checkpoint(folder / "last.pt").get(key, {}) for folder in (one, other))
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            return False
    return True


def interrupt(monkeypatch, after, number=signal.SIGTERM):
    """Send this process a signal while its optimizer takes step ``after`` (counted from 1) of the run."""
    original, taken = train.Trainer.optimizer_step, []

    def step(self, batches):
        original(self, batches)
        taken.append(1)
        if len(taken) == after:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train.Trainer, "optimizer_step", step)


def listed(split):
    """SHA-256 of the names and sizes of the files below a folder, by the shell."""
    script = r"find -L . -type f -printf '%P %s\n' | LC_ALL=C sort | sha256sum"
    return subprocess.run(["bash", "-c", script], cwd=split, capture_output=True, text=True, check=True).stdout[:64]


def test_run_folder(shared_run, pictures):
    folder = shared_run(*EVERYTHING_RANDOM, "epochs=3")
    assert [row["epoch"] for row in rows(folder)] == ["1", "2", "3"]
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["data"] | {"data_dir": None} == {
        "dataset": "folder",
        "data_dir": None,
        "classes": 3,
        "train_images": 24,
        "val_images": 9,
        "train_sha256": listed(pictures / "train"),
        "val_sha256": listed(pictures / "val"),
    }
    assert record["epochs"] == {"done": 3, "planned": 3}
    start = record["starts"][0]
    assert start["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (
        start["commit"]
        == subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    )
    assert record["best"]["top1"] == max(float(row["top1"]) for row in rows(folder))
    assert record["seed"] == 42
    assert record["images_per_s"] > 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["mixup"] == 0.8
    with Image.open(folder / "curve.png") as curve:
        assert curve.size[0] > 800
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 10))
    assert [event.step for event in events.Scalars("val/top1")] == [3, 6, 9]
    # timm reads the checkpoints as they are.
    arguments = yaml.safe_load(TINY[0].partition("=")[2])
    model = timm.create_model("poolformer_s12", num_classes=3, checkpoint_path=str(folder / "best.pt"), **arguments)
    best = read_checkpoint(folder / "best.pt")
    assert torch.equal(model.stem.weight, best["state_dict_ema"]["stem.weight"])
    assert best["class_names"] == ["a", "b", "c"]


@pytest.mark.parametrize(("step", "number"), [(2, signal.SIGTERM), (3, signal.SIGINT), (4, signal.SIGUSR2)])
def test_an_interrupted_run_continues_to_the_same_weights_and_curve(step, number, run, shared_run, monkeypatch, capsys):
    whole = shared_run(*EVERYTHING_RANDOM)
    with monkeypatch.context() as patch:
        interrupt(patch, after=step, number=number)
        stopped = run(*EVERYTHING_RANDOM, "workers=1", output="stopped", status=128 + number)
    assert json.loads((stopped / "run.json").read_text())["status"] == "stopped"
    assert "dist_train.sh stopped" in capsys.readouterr().out
    assert not same_weights(whole, stopped)
    assert trained("stopped") == 0  # a run's folder as CONFIG continues it
    assert same_weights(whole, stopped)
    assert losses(stopped) == losses(whole)
    assert len(json.loads((stopped / "run.json").read_text())["starts"]) == 2
    events = EventAccumulator(str(stopped)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 7))
    assert trained("stopped") == 0  # finished: nothing to do
    assert losses(stopped) == losses(whole)


def test_every_step_counts_the_same_if_a_run_continues_in_other_passes(run, monkeypatch):
    """As it does on another number of devices."""
    whole = run("epochs=1")
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        stopped = run("epochs=1", output="stopped", status=128 + signal.SIGTERM)
    monkeypatch.setattr(recipe, "split_batch", lambda *_, **options: (8, 1))
    assert trained("stopped") == 0
    assert float(rows(stopped)[0]["train_loss"]) == pytest.approx(float(rows(whole)[0]["train_loss"]), rel=1e-4)


def test_interrupted_while_validating(run, shared_run, monkeypatch):
    whole = shared_run(*EVERYTHING_RANDOM)
    original = train.Trainer.interruptible

    def signal_then_validate(self, batches):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "interruptible", signal_then_validate)
        stopped = run(*EVERYTHING_RANDOM, output="stopped", status=128 + signal.SIGTERM)
    assert not (stopped / "metrics.csv").exists()
    trained("stopped")
    assert same_weights(whole, stopped)
    assert losses(stopped) == losses(whole)


def test_deterministic_changes_nothing_on_a_cpu_and_asks_pytorch_for_it(run, shared_run, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    whole = shared_run(*EVERYTHING_RANDOM)
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        folder = run(*EVERYTHING_RANDOM, "deterministic=true", output="deterministic")
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_weights(whole, folder)


def test_wall_time_is_that_of_all_starts(run, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        folder = run(status=128 + signal.SIGTERM)
    state = read_checkpoint(folder / "last.pt")
    torch.save({**state, "wall_s": state["wall_s"] + 1e6}, folder / "last.pt")
    trained("run")
    assert json.loads((folder / "run.json").read_text())["wall_s"] > 1e6


def test_of_equally_good_epochs_the_first_is_the_best(run):
    folder = run("lr=0", "weight_decay=0")
    assert [row["top1"] for row in rows(folder)] == [rows(folder)[0]["top1"]] * 2
    assert read_checkpoint(folder / "best.pt")["epoch"] == 1


def test_what_is_random_about_a_picture_follows_from_seed_epoch_and_index(pictures):
    config = load_config(["img_size=32"])
    config = with_input_of(config, timm.create_model(config.model))
    folders = torchvision.datasets.ImageFolder(pictures / "train")
    one, same, other = (batches.Images(folders, batches.transform(config, True), seed) for seed in (0, 0, 1))
    drawn = {key: one[key][0] for key in ((0, 3), (1, 3), (2, 3))}
    assert all((same[key][0] == drawn[key]).all() for key in reversed(drawn))
    assert len({pixels.numpy().tobytes() for pixels in (*drawn.values(), other[0, 3][0])}) == 4


def test_class_names_are_in_the_order_of_the_labels(tmp_path):
    """timm sorts folders by the numbers in their names."""
    dataset = create_dataset("", root=str(draw(tmp_path, classes=["10", "9", "2"])), split="train")
    names = class_names(dataset)
    assert names == ["2", "9", "10"]
    assert all(names[dataset[i][1]] == Path(dataset.filename(i)).parts[0] for i in range(len(dataset)))


def test_classes_are_counted_by_their_labels_where_a_label_has_several_names(pictures, tmp_path):
    """A class map can join folders, and torchvision's ImageNet lists the synonyms of its classes."""
    joined = ["dataset_args={class_map: {a: 0, b: 0, c: 2}}", f"data_dir={pictures}"]
    with pytest.raises(InputError, match=r"does not tell its number of classes: give num_classes=N"):
        load_data(load_config(joined), workers=0)
    data = load_data(load_config([*joined, "num_classes=3"]), workers=0)
    assert (data.num_classes, data.class_names) == (3, None)
    shutil.copytree(pictures, tmp_path / "imagenet")
    torch.save(({"a": ("tench", "Tinca tinca"), "b": ("crane",), "c": ("crane",)}, []), tmp_path / "imagenet/meta.bin")
    data = load_data(load_config(["dataset=torch/imagenet", f"data_dir={tmp_path / 'imagenet'}"]), workers=0)
    assert (data.num_classes, data.class_names) == (3, ["a", "b", "c"])


def test_a_config_goes_before_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("epochs: 7\nlr: 0.5\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nepochs: 9\n")
    config = load_config([str(tmp_path / "mine.yaml")])
    assert (config.epochs, config.lr) == (9, 0.5)
    assert load_config([str(tmp_path / "mine.yaml"), "epochs=11"]).epochs == 11


def test_the_papers_top1_is_that_of_the_model():
    s12 = str(CONFIGS / "poolformer_s12.yaml")
    assert load_config([s12, "epochs=30"]).expected_top1 == 77.2
    assert load_config([s12, "model=poolformer_s24"]).expected_top1 is None
    assert load_config([s12, "model=poolformer_s24", "expected_top1=80.3"]).expected_top1 == 80.3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA_VISIBLE_DEVICES=0 and a GPU")
def test_deterministic_runs_are_equal_on_a_gpu(run):
    try:
        folders = [run(*EVERYTHING_RANDOM, "deterministic=true", output=name) for name in ("one", "other")]
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_weights(*folders)


def test_the_number_of_loader_processes_changes_nothing_and_the_seed_does(run, shared_run):
    one = shared_run(*EVERYTHING_RANDOM)
    assert same_weights(one, run(*EVERYTHING_RANDOM, "workers=2", output="other"))
    assert not same_weights(one, run(*EVERYTHING_RANDOM, "seed=43", output="seed"))


def test_accumulation_equals_one_large_batch(run):
    """Without what is drawn per pass, the gradient of two passes is that of one twice as large.

    AdamW's steps would hardly depend on the scale of the gradient.
    """
    settings = ("opt=sgd", "opt_betas=null", "lr=0.1")
    passes = run(*settings, "device_batch=4")
    whole = run(*settings, "device_batch=8", output="whole")
    for a, b in zip(rows(passes), rows(whole), strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-4)


@pytest.mark.parametrize(
    ("batch", "device", "world", "even", "expected"),
    [
        (4096, 128, 8, True, (128, 4)),
        (4096, 128, 1, True, (128, 32)),
        (4096, 128, 32, True, (128, 1)),
        (4096, 128, 64, True, (64, 1)),
        (4096, 100, 8, True, (64, 8)),
        (1000, 128, 2, False, (125, 4)),
        (1000, 128, 2, True, (100, 5)),
    ],
)
def test_split_batch(batch, device, world, even, expected):
    images, passes = recipe.split_batch(batch, device, world, even)
    assert (images, passes) == expected
    assert images * passes * world == batch


def test_schedule_and_weight_decay_are_the_official_ones(pictures, tmp_path):
    """Stepped once an epoch: a linear warm-up of 5, a cosine over 300 counted from epoch 0, then 10 at the minimum."""
    keep = [setting for setting in TINY if not setting.startswith(("lr=", "epochs="))]
    settings = [f"data_dir={pictures}", "num_classes=3", f"output={tmp_path}", "base_lr=0.128", *keep]
    trainer = train.Trainer(load_config([str(CONFIGS / "poolformer_s12.yaml"), *settings]), train.join())
    peak = 0.128 * 8 / 1024
    assert trainer.epochs == 310
    for epoch in range(310):
        trainer.scheduler.step(epoch)
        if epoch < 5:
            expected = 1e-6 + epoch * (peak - 1e-6) / 5
        elif epoch < 300:
            expected = 1e-5 + 0.5 * (peak - 1e-5) * (1 + math.cos(math.pi * epoch / 300))
        else:
            expected = 1e-5
        assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([expected] * 2)
    decay = {
        parameter: group["weight_decay"] for group in trainer.optimizer.param_groups for parameter in group["params"]
    }
    for parameter in trainer.model.parameters():
        assert decay[parameter] == (0.05 if parameter.ndim > 1 else 0)


# Table 6 of the paper, and for the crop the official models' default_cfg.
@pytest.mark.parametrize(
    ("name", "drop_path", "crop", "top1"),
    [
        ("s12", 0.1, 0.90, 77.2),
        ("s24", 0.1, 0.90, 80.3),
        ("s36", 0.2, 0.90, 81.4),
        ("m36", 0.3, 0.95, 82.1),
        ("m48", 0.4, 0.95, 82.5),
    ],
)
def test_configs_hold_the_papers_recipe(name, drop_path, crop, top1):
    config = load_config([str(CONFIGS / f"poolformer_{name}.yaml")])
    assert (config.model, config.drop_path, config.crop_pct, config.expected_top1) == (
        f"poolformer_{name}",
        drop_path,
        crop,
        top1,
    )
    assert (config.epochs, config.warmup_epochs, config.global_batch, config.weight_decay) == (300, 5, 4096, 0.05)
    assert config.base_lr * config.global_batch / 1024 == 4e-3
    assert (config.mixup, config.cutmix, config.mixup_switch_prob, config.smoothing) == (0.8, 1.0, 0.5, 0.1)
    assert (config.erase_prob, config.ema_decay, config.drop, config.clip_grad) == (0.25, 0, 0, None)
    assert (config.opt, config.opt_eps, config.opt_betas) == ("adamw", 1e-8, (0.9, 0.999))
    assert f"{top1} % top-1" in (CONFIGS / f"poolformer_{name}.yaml").read_text()
    line = next(line for line in README.splitlines() if f"`poolformer_{name}.yaml`" in line and line.startswith("|"))
    cells = [cell.strip() for cell in line.split("|")]
    assert (cells[2], cells[4]) == (f"{PARAMETERS[f'poolformer_{name}']:,}", f"{top1} %")


def test_the_recipes_augmentation_runs_on_every_draw(pictures):
    strongest = "auto_augment=rand-m10-inc1"  # the recipe's operations, each at the largest magnitude it can draw
    config = load_config([str(CONFIGS / "poolformer_s12.yaml"), "img_size=32", strongest])
    config = with_input_of(config, timm.create_model(config.model))
    images = batches.Images(
        torchvision.datasets.ImageFolder(pictures / "train"), batches.transform(config, True), seed=0
    )
    assert {images[epoch, 3][0].shape for epoch in range(500)} == {(3, 32, 32)}


def test_every_config_loads_and_names_a_model():
    files = sorted(CONFIGS.glob("*.yaml"))
    assert {file.stem for file in files} == {"imagenet", "mnist", *metaformer.POOLFORMERS}
    assert all(timm.is_model(load_config([str(file)]).model) for file in files)


def test_a_classifier_of_as_many_other_classes_is_refused(run, shared_run, tmp_path):
    first = shared_run()
    draw(tmp_path / "other", classes="abd")
    with pytest.raises(InputError, match="only in the checkpoint: c; only in the data: d"):
        run(f"data_dir={tmp_path / 'other'}", f"checkpoint={first / 'best.pt'}", output="tuned")


def test_fine_tuning_on_other_classes(run, shared_run, tmp_path):
    first = shared_run()
    draw(tmp_path / "two", classes="xy")
    tuned = run(
        f"data_dir={tmp_path / 'two'}",
        f"checkpoint={first / 'best.pt'}",
        "replace_head=true",
        "lr=0",
        "weight_decay=0",
        output="tuned",
    )
    before, after = (read_checkpoint(folder / "best.pt")["state_dict"] for folder in (first, tuned))
    assert after["head.weight"].shape == (2, 24)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("head"))


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_continues_without_the_checkpoint_that_it_began_with(killed, run, shared_run, tmp_path, monkeypatch):
    first = shutil.copytree(shared_run(), tmp_path / "first")
    settings = [f"checkpoint={first / 'best.pt'}", "seed=43"]
    whole = run(*settings, output="whole")
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        stopped = run(*settings, output="stopped", status=128 + signal.SIGTERM)
    shutil.rmtree(first)
    if killed:  # between the two renamings of a checkpoint
        (stopped / "last.pt").rename(stopped / "previous.pt")
    assert trained("stopped") == 0
    assert same_weights(whole, stopped)


def test_data_sets_of_every_kind(run, pictures, tmp_path):
    """The same pictures as folders, tars, torchvision's ImageFolder, WebDataset and a Hugging Face data set."""
    import datasets

    reference = run("epochs=1")
    for split in ("train", "val"):
        subprocess.run(["tar", "cf", f"{tmp_path}/{split}.tar", "-C", str(pictures / split), "a", "b", "c"], check=True)
        (tmp_path / "hf").mkdir(exist_ok=True)
        files = sorted((pictures / split).glob("*/*.png"))
        labels = ["abc".index(file.parent.name) for file in files]
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list("abc")))
        columns = {"image": [str(file) for file in files], "label": labels}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "hf" / f"{split}.parquet")
    kinds = {
        "tar": [f"data_dir={tmp_path}", "train_split=train.tar", "val_split=val.tar"],
        "torchvision": ["dataset=torch/image_folder"],
        "hfds": [f"dataset=hfds/{tmp_path}/hf", f"data_dir={tmp_path}/cache"],
        "wds": ["dataset=wds/local", f"data_dir={tmp_path}/wds", "num_classes=3"],
    }
    shards = pack(tmp_path / "wds", pictures, train=1, val=1)
    staged_shard = tmp_path / "shard"
    staged_shard.mkdir()
    (staged_shard / "train-0000.tar").symlink_to(shards / "train-0000.tar")
    for kind, settings in kinds.items():
        folder = run("epochs=1", *settings, output=kind)
        record = json.loads((folder / "run.json").read_text())
        assert (record["data"]["train_images"], record["data"]["val_images"]) == (24, 9), kind
        files = {"wds": listed(staged_shard), "hfds": None}.get(kind, listed(pictures / "train"))
        assert record["data"]["train_sha256"] == files, kind
        if kind == "wds":  # a stream has an order of its own
            continue
        assert losses(folder) == losses(reference), kind
    # The same weights give the same validation loss, whatever the data come from.
    for kind, settings in kinds.items():
        metrics = validated([str(reference), *settings], tmp_path / f"{kind}.json")["metrics"]
        assert metrics["loss"] == pytest.approx(float(rows(reference)[0]["val_loss"]), rel=1e-5), kind
        assert metrics["images"] == 9


def test_a_run_continues_with_a_copy_of_its_data_and_says_if_a_picture_was_replaced(
    run, shared_run, pictures, tmp_path, monkeypatch, capsys
):
    whole = shared_run()
    copy, mended = (shutil.copytree(pictures, tmp_path / name) for name in ("copy", "mended"))
    with (mended / "train" / "b" / "001.png").open("ab") as file:
        file.write(b"more bytes after the picture")
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        stopped = run(status=128 + signal.SIGTERM)
        capsys.readouterr()
    shutil.copytree(stopped, tmp_path / "other")
    assert trained("run", f"data_dir={copy}") == 0
    assert "warning" not in capsys.readouterr().err
    assert same_weights(whole, stopped)
    assert trained("other", f"data_dir={mended}") == 0
    assert "warning: pictures have other names or sizes than when other was last trained" in capsys.readouterr().err
    starts = json.loads((tmp_path / "other" / "run.json").read_text())["starts"]
    assert [start["train_sha256"] for start in starts] == [listed(pictures / "train"), listed(mended / "train")]


def test_a_run_of_a_version_without_the_hashes_continues(run, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        stopped = run(status=128 + signal.SIGTERM)
    state = read_checkpoint(stopped / "last.pt")
    torch.save({key: value for key, value in state.items() if not key.endswith("_sha256")}, stopped / "last.pt")
    assert trained("run") == 0


def validated(arguments, record):
    assert run_script("classification/validate.py", *arguments, "--record", record) == 0
    return json.loads(record.read_text())


def test_validate_agrees_with_torchvisions_transforms(run, pictures, tmp_path):
    folder = run("epochs=2", "crop_pct=0.9")
    record = validated([str(folder)], tmp_path / "record.json")
    checkpoint = read_checkpoint(folder / "best.pt")
    model = timm.create_model("poolformer_s12", num_classes=3, **checkpoint["config"]["model_args"]).eval()
    model.load_state_dict(checkpoint["state_dict"])
    prepare = transforms.Compose(
        [
            transforms.Resize(35, transforms.InterpolationMode.BICUBIC),  # floor(32 / 0.9)
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    logits, labels = [], []
    for label, name in enumerate("abc"):
        for file in sorted((pictures / "val" / name).iterdir()):
            with torch.inference_mode():
                logits.append(model(prepare(Image.open(file).convert("RGB"))[None]))
            labels.append(label)
    logits, labels = torch.cat(logits), torch.tensor(labels)
    assert record["metrics"]["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert record["metrics"]["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4
    )
    assert record["metrics"]["top5"] == 100  # of 3 classes
    assert record["kind"] == "classification"
    assert len(record["checkpoint"]["sha256"]) == 64
    assert {"command", "commit", "versions", "hardware", "date"} <= record.keys()
    assert (record["settings"]["img_size"], record["settings"]["precision"]) == (32, "float32")


def test_validate_takes_a_bare_checkpoint(shared_run, pictures, tmp_path):
    folder = shared_run()
    torch.save(read_checkpoint(folder / "best.pt")["state_dict"], tmp_path / "bare.pth.tar")
    settings = ["model=poolformer_s12", f"data_dir={pictures}", TINY[0], "img_size=32", "workers=0"]
    bare = validated([str(tmp_path / "bare.pth.tar"), *settings], tmp_path / "bare.json")
    own = validated([str(folder)], tmp_path / "own.json")
    assert bare["metrics"]["loss"] == pytest.approx(own["metrics"]["loss"])


@pytest.mark.parametrize("settings", [["precision=bfloat16"], ["grad_checkpointing=true"], ["layer_decay=0.7"]])
def test_other_ways_to_train(settings, run):
    folder = run(*settings, "clip_grad=1")
    assert float(rows(folder)[-1]["train_loss"]) < math.log(3) * 1.2
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("name", ["lamb", "lion", "adopt", "adafactor", "novograd"])
def test_optimizers_other_than_adamw_have_their_own_epsilon_and_betas(name):
    model = torch.nn.Linear(2, 2)
    for settings, options in (([], {}), (["opt_eps=0.1"], {"eps": 0.1})):
        made = recipe.build_optimizer(load_config([f"opt={name}", *settings]), model, 0.1)
        own = timm.optim.create_optimizer_v2(model, name, lr=0.1, weight_decay=0.05, **options)
        groups = [[{**group, "params": None} for group in each.param_groups] for each in (made, own)]
        assert groups[0] == groups[1]


@pytest.mark.parametrize("name", ["kron", "muon"])
def test_optimizers_change_the_weights_of_all_devices_alike(name, monkeypatch):
    """Each device has random numbers of its own, and equal gradients."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # would take seconds
    results = []
    for rank in range(2):
        model = torch.nn.Linear(4, 3)
        torch.nn.init.ones_(model.weight)
        optimizer = recipe.build_optimizer(load_config([f"opt={name}"]), model, 0.1)
        batches.seed_everything(rank)
        for step in range(3):
            model.weight.grad = torch.arange(12.0).view(3, 4) + step
            optimizer.step()
        results.append(model.weight.detach())
    assert torch.equal(*results)


def test_gradient_clipping_limits_the_step(run, monkeypatch):
    norms = []
    original = torch.nn.utils.clip_grad_norm_

    def clip(parameters, largest):
        parameters = list(parameters)
        original(parameters, largest)
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    run("clip_grad=0.01", "epochs=1")
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)


def test_the_ema_is_what_is_validated_and_averages_the_weights(run):
    folder = run("ema_decay=0.5", "epochs=1", "global_batch=24", "device_batch=24")
    checkpoint = read_checkpoint(folder / "last.pt")
    torch.manual_seed(0)
    start = run("lr=0", "weight_decay=0", "epochs=1", output="start")
    start = read_checkpoint(start / "last.pt")["state_dict"]
    for name, value in checkpoint["state_dict"].items():
        assert torch.allclose(checkpoint["state_dict_ema"][name], (start[name] + value) / 2, atol=1e-6), name


def test_the_curve_is_drawn_at_the_end_and_at_intervals(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(runlog, "plot", lambda history, title: drawn.append(len(history)) or plot(history, title))
    run("epochs=3", output="short")
    monkeypatch.setattr(runlog, "BETWEEN_DRAWINGS", 0)
    run("epochs=3", output="long")
    assert drawn == [3, 1, 2, 3, 3]


def test_mnist5k_is_stratified():
    splits = [Digits(is_training=training) for training in (True, False)]
    for digits, number in zip(splits, (400, 100), strict=True):
        assert [int(number_of) for number_of in torch.bincount(torch.tensor(digits.labels))] == [number] * 10
        picture, label = digits[len(digits) - 1]
        assert (picture.size, picture.mode, label) == ((28, 28), "L", 9)
    pixels = {digits[i][0].tobytes() for digits in splits for i in range(len(digits))}
    assert len(pixels) > 4990  # hardly any digit is there twice, let alone in both splits


def test_a_folder_replaces_the_digits_of_the_demo(pictures):
    assert load_data(load_config([f"data_dir={pictures}"]), workers=0).class_names == ["a", "b", "c"]
    assert load_data(load_config([]), workers=0).summary["train_images"] == 4000
