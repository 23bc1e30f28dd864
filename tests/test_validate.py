"""Validation of checkpoints from everywhere: the same numbers, classes matched by name, and wrong input."""

import json
import re

import pytest
import torch
from timm.data import ImageNetInfo
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import BasicBlock, ResNet
from timm.models.volo import VOLO

from conftest import draw
from metaformer import InputError, open_checkpoint
from metaformer.training.config import Config
from metaformer.training.model import build_model, class_order, match_classes
from metaformer.weights import read_checkpoint
from metaformer.weights.writers import write
from oracles import SMALL, randomise, save_run


@pytest.fixture
def validated(command, tmp_path):
    """Run the command; gives the record that it writes."""

    def validated(*arguments: object) -> dict:
        status, _, error = command("classification/validate.py", *arguments, "--record", tmp_path / "record.json")
        assert status == 0, error
        return json.loads((tmp_path / "record.json").read_text())

    return validated


@pytest.mark.parametrize("to", ["hf", "timm-hf"])
def test_validate_takes_folders_of_hugging_face(to, validated, pictures, tmp_path):
    save_run(tmp_path / "run", model_args={**SMALL, "stem_stride": 1}, mean=(0.5, 0.4, 0.3), data_dir=str(pictures))
    write(open_checkpoint(tmp_path / "run"), to, tmp_path / "folder")
    own = validated(tmp_path / "run", "workers=0")
    folder = validated(tmp_path / "folder", f"data_dir={pictures}", "workers=0")
    assert folder["metrics"]["loss"] == pytest.approx(own["metrics"]["loss"])
    assert (folder["settings"]["img_size"], folder["settings"]["mean"]) == (32, [0.5, 0.4, 0.3])
    assert folder["training"] is None
    assert own["training"].items() >= {"epochs": 300, "seed": 42, "pretrained": False}.items()


def test_a_run_that_has_not_ended_states_the_epochs_so_far(validated, pictures, tmp_path):
    save_run(tmp_path / "run", data_dir=str(pictures), workers=0)
    for status, epochs in (("stopped", 7), ("running", 7), ("finished", 300)):
        record = {"status": status, "epochs": {"done": 7, "planned": 300}}
        (tmp_path / "run/run.json").write_text(json.dumps(record))
        assert validated(tmp_path / "run")["training"]["epochs"] == epochs


@pytest.mark.parametrize("setting", ["crop_pct", "interpolation", "mean", "std"])
def test_null_is_the_value_of_the_checkpoint(setting, validated, pictures, tmp_path):
    own = {"crop_pct": 0.5, "interpolation": "nearest", "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    save_run(tmp_path / "run", data_dir=str(pictures), workers=0, **own)
    plain, null = validated(tmp_path / "run"), validated(tmp_path / "run", f"{setting}=null")
    assert null["settings"] == plain["settings"]
    assert null["metrics"]["loss"] == plain["metrics"]["loss"]


def test_classes_are_matched_by_name(validated, tmp_path):
    """Hugging Face's imagefolder sorts capitals before small letters, timm's reader regards no case."""
    draw(tmp_path / "data", val_images=9)
    for old, new in zip("abc", ("Bee", "ant", "Cat"), strict=True):
        (tmp_path / "data" / "val" / old).rename(tmp_path / "data" / "val" / new)
    data = f"data_dir={tmp_path / 'data'}"
    model = save_run(tmp_path / "ours", classes=["ant", "Bee", "Cat"])
    checkpoint = read_checkpoint(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    order = [1, 2, 0]  # Bee, Cat, ant
    state = {**model.state_dict(), "head.weight": model.head.weight[order], "head.bias": model.head.bias[order]}
    names = [checkpoint["class_names"][i] for i in order]
    torch.save({**checkpoint, "class_names": names, "state_dict": state}, tmp_path / "theirs" / "best.pt")
    metrics = [validated(tmp_path / name, data, "workers=0")["metrics"] for name in ("ours", "theirs")]
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"])
    assert metrics[0]["top1"] == metrics[1]["top1"]
    # Training that starts from a checkpoint has its classifier in the order of the data, or a new one.
    start = {"model": "poolformer_s12", "model_args": SMALL, "img_size": 32, "checkpoint": str(tmp_path / "theirs")}
    started = build_model(Config(**start), 3, ["ant", "Bee", "Cat"])
    assert torch.equal(started.head.weight, model.head.weight)
    with pytest.raises(InputError, match=r"only in the checkpoint: Cat; only in the data: Dog"):
        build_model(Config(**start), 3, ["ant", "Bee", "Dog"])
    started = build_model(Config(**start, replace_head=True), 3, ["ant", "Bee", "Dog"])
    assert torch.equal(started.stem.weight, model.stem.weight)
    assert not set(started.head.weight.flatten().tolist()) & set(model.head.weight.flatten().tolist())


@pytest.mark.parametrize(
    "model",
    [
        VOLO((1, 1, 1, 1), img_size=32, embed_dims=(8, 8, 8, 8), num_heads=(2, 2, 2, 2), num_classes=3),
        VisionTransformerDistilled(img_size=32, embed_dim=8, depth=1, num_heads=2, num_classes=3),
        ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=3),
    ],
    ids=lambda model: type(model).__name__,
)
def test_all_classifiers_of_a_model_are_sorted(model):
    images = torch.randn(2, 3, 32, 32)
    logits = randomise(model).eval()(images)
    match_classes(model, ["a", "b", "c"], ["b", "c", "a"], "it")
    assert torch.allclose(model(images), logits[:, [1, 2, 0]])


def test_a_model_that_does_not_tell_its_classifier_is_not_sorted():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    match_classes(model, ["a", "b"], ["a", "b"], "it")
    with pytest.raises(InputError, match="it has the classes in another order, and the classifier of its model cannot"):
        match_classes(model, ["a", "b"], ["b", "a"], "it")


def test_imagenet_s_folders_and_descriptions_are_the_same_classes():
    imagenet = ImageNetInfo()
    folders, descriptions = imagenet.label_names(), imagenet.label_descriptions()
    assert class_order(descriptions, folders, "it") is None
    with pytest.raises(InputError, match="other classes than it was trained on"):
        class_order(descriptions[1:] + descriptions[:1], folders, "it")


def test_replace_head_keeps_a_classifier_of_the_same_classes(tmp_path):
    imagenet = ImageNetInfo()
    trained = save_run(tmp_path / "run", classes=imagenet.label_descriptions())
    start = {"model_args": SMALL, "img_size": 32, "checkpoint": str(tmp_path / "run"), "replace_head": True}
    started = build_model(Config(**start), 1000, imagenet.label_names())
    assert torch.equal(started.head.weight, trained.head.weight)


def test_wrong_input_to_validate(pictures, tmp_path, command):
    save_run(tmp_path / "run", data_dir=str(pictures), workers=0)
    save_run(tmp_path / "vit", model="vit_tiny_patch16_224", model_args={"img_size": 32, "depth": 1})
    root = draw(tmp_path / "data")
    (root / "val" / "c").rename(root / "val" / "d")
    folder = tmp_path / "run"
    for arguments, sentence in [
        (["nowhere"], r"there is no checkpoint nowhere"),
        ([folder, "--record"], r"--record: expected one argument"),
        ([folder, "crop=0.9"], r"unknown setting 'crop' \(did you mean 'drop'\?\)"),
        ([folder, f"data_dir={root}"], r"other classes .*only in the checkpoint: c; only in the data: d"),
        (
            [folder, "model=poolformer_s24", "model_args={}"],
            r"is a checkpoint of poolformer_s12, not of poolformer_s24",
        ),
        ([folder, "model_args={}"], r"another architecture"),
        ([tmp_path / "vit", "img_size=64"], r"vit_tiny_patch16_224 does not take RGB images of 64 x 64 pixels"),
        ([folder, "data_dir=nowhere"], r"there is no data folder nowhere"),
        ([folder, "num_classes=4"], r"num_classes is 4, but .* has 3 classes"),
    ]:
        status, _, error = command("classification/validate.py", *arguments)
        assert status == 2
        assert re.search(sentence, error), error
        assert "Traceback" not in error


def test_a_record_that_cannot_be_written_costs_no_result(pictures, tmp_path, command):
    save_run(tmp_path / "run", data_dir=str(pictures), workers=0)
    (tmp_path / "file").touch()
    record = tmp_path / "file" / "folder" / "record.json"
    status, printed, error = command("classification/validate.py", tmp_path / "run", "--record", record)
    assert (status, error) == (2, f"error: cannot write {record}: Not a directory\n")
    assert re.match(r"poolformer_s12: top-1 \d+\.\d{3} %", printed)
