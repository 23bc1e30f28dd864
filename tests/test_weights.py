"""Weights between libraries: logits of the same weights there and here, names, and files that are refused."""

import argparse
import hashlib
import json
import re
import sys
from runpy import run_module

import numpy as np
import pytest
import timm
import timm.models.metaformer as timm_metaformer
import torch
from huggingface_hub import save_torch_model
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerImageProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)

import metaformer
from metaformer import POOLFORMERS, VARIANTS, InputError, open_checkpoint
from metaformer.formats import TO, recognised
from metaformer.prediction import predict
from metaformer.training.config import Config
from metaformer.training.model import released_weights
from metaformer.weights import fetch, read_checkpoint, weights_of
from metaformer.weights.described import of_folder, of_timm_train
from metaformer.weights.opener import build, create
from metaformer.weights.writers import write
from oracles import SMALL, hf_twin, randomise, randomised, relative_error, save_run, timm_twin

RELEASED = {  # in the official release: models/metaformer.py and poolformer.py of sail-sg/poolformer, model_urls
    **{name: name for name in POOLFORMERS},
    "metaformer_s12_identity": "metaformer_id_s12",
    "metaformer_s12_pppa": "metaformer_pppa_s12_224",
    "metaformer_s12_ppaa": "metaformer_ppaa_s12_224",
    "metaformer_s12_pppf": "metaformer_pppf_s12_224",
    "metaformer_s12_ppff": "metaformer_ppff_s12_224",
}


def drawn(name: str, dtype: torch.dtype = torch.float32, **arguments):
    return randomised(name, num_classes=10, **arguments).to(dtype).eval()


def small(name: str = "poolformer_s12", **arguments) -> nn.Module:
    return timm.create_model(name, **{"num_classes": 10, **SMALL, **arguments}).eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.fixture
def images():
    return torch.randn(2, 3, 75, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trips_lose_nothing(name):
    with torch.device("meta"):
        weights = timm.create_model(name).state_dict()
    for to in TO:
        there = metaformer.convert(weights, to)
        assert recognised(there) == to
        back = metaformer.convert(there)
        assert back.keys() == weights.keys(), to
        assert all(back[key] is weights[key] for key in weights), to
        assert len(there) == len(weights), to


@pytest.mark.parametrize("name", POOLFORMERS)
def test_every_tensor_has_its_place_in_transformers_and_timm(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
        for to, twin in (("hf", hf_twin(model)), ("timm", timm_twin(name, model))):
            twin.load_state_dict(metaformer.convert(model.state_dict(), to), assign=True)


# In float32 either side is within 4e-7 of the float64 result.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_logits_are_equal_in_transformers_and_back_and_features_in_timm(dtype, tolerance, images):
    name = "poolformer_s12"
    model, images = drawn(name, dtype), images.to(dtype)
    theirs = hf_twin(model).eval()
    theirs.load_state_dict(metaformer.convert(model.state_dict(), "hf"))
    back = timm.create_model(name, num_classes=10).to(dtype).eval()
    back.load_state_dict(metaformer.convert(theirs.state_dict()))
    in_timm = timm_twin(name, model).eval()
    in_timm.load_state_dict(metaformer.convert(model.state_dict(), "timm"))
    with torch.inference_mode():
        logits = model(images)
        assert relative_error(theirs(images).logits, logits) < tolerance
        assert torch.equal(back(images), logits)
        features = in_timm.forward_features(images)
        assert relative_error(features, model.forward_features(images)) < tolerance
        norm = in_timm.head.norm
        normed = nn.functional.group_norm(features, 1, norm.weight, norm.bias)
        assert relative_error(logits, in_timm.head.fc(normed.mean((2, 3)))) < tolerance  # the paper's order
        assert relative_error(in_timm(images), logits) > 1e-3  # timm's order is another function


def test_official_names_of_the_hybrids():
    """As models/metaformer.py of the official code numbers its network: a position embedding takes a place."""
    names = metaformer.convert(drawn("metaformer_s12_ppaa", img_size=64).state_dict(), "official").keys()
    expected = {
        "patch_embed.proj.weight", "network.0.0.norm1.weight", "network.1.proj.bias", "network.2.1.mlp.fc2.bias",
        "network.3.proj.weight", "network.4.pos_embed", "network.5.0.token_mixer.qkv.weight",
        "network.5.5.layer_scale_1", "network.6.proj.weight", "network.7.1.token_mixer.proj.bias", "norm.weight",
        "head.bias",
    }  # fmt: skip
    assert expected <= names
    names = metaformer.convert(drawn("metaformer_s12_pppa", img_size=64).state_dict(), "official").keys()
    assert {"network.5.proj.weight", "network.6.pos_embed", "network.7.0.token_mixer.proj.weight"} <= names
    names = metaformer.convert(drawn("metaformer_s12_ppff", img_size=64).state_dict(), "official").keys()
    assert {"network.4.0.token_mixer.fc.weight", "network.6.1.token_mixer.fc.weight"} <= names


@pytest.mark.parametrize("name", RELEASED)
def test_pretrained_fetches_the_released_file(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    url = timm.get_pretrained_cfg(name).url
    assert url == f"https://github.com/sail-sg/poolformer/releases/download/v1.0/{RELEASED[name]}.pth.tar"
    if name != "metaformer_s12_ppaa":
        return  # every layout is converted above, and test_model.py fetches poolformer_s12
    model = randomised(name)
    path = tmp_path / f"{RELEASED[name]}.pth.tar"
    torch.save(metaformer.convert(model.state_dict(), "official"), path)
    options = {"pretrained_cfg_overlay": {"url": path.as_uri()}, "cache_dir": tmp_path / "cache"}
    loaded = timm.create_model(name, pretrained=True, **options)
    assert not (tmp_path / "home").exists()
    assert all(
        torch.equal(*pair) for pair in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_a_source_that_the_user_names_replaces_the_release(monkeypatch):
    def fetch(url, cache_dir):
        raise AssertionError(url)

    monkeypatch.setattr(metaformer.variants, "fetch", fetch)
    model = randomised("poolformer_s12")
    overlay = {"state_dict": metaformer.convert(model.state_dict(), "official")}
    assert same(timm.create_model("poolformer_s12", pretrained=True, pretrained_cfg_overlay=overlay), model)
    overlay = {"hf_hub_id": "someone/else"}
    assert metaformer.variants.released_file("poolformer_s12", pretrained_cfg_overlay=overlay) is None


def test_a_damaged_download_is_refused_and_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    model = randomised("poolformer_s12")
    release = tmp_path / "poolformer_s12.pth.tar"
    torch.save(metaformer.convert(model.state_dict(), "official"), release)
    whole = release.read_bytes()
    release.write_bytes(whole[: len(whole) // 2])
    overlay = {"url": release.as_uri()}
    for _ in range(2):
        with pytest.raises(InputError, match=r"poolformer_s12\.pth\.tar is not a checkpoint or is damaged"):
            timm.create_model("poolformer_s12", pretrained=True, pretrained_cfg_overlay=overlay)
    release.write_bytes(whole)
    assert same(timm.create_model("poolformer_s12", pretrained=True, pretrained_cfg_overlay=overlay), model)
    release.unlink()  # from now on from the cache
    assert same(timm.create_model("poolformer_s12", pretrained=True, pretrained_cfg_overlay=overlay), model)
    next((tmp_path / "cache/hub/checkpoints").rglob("poolformer_s12.pth.tar")).unlink()
    with pytest.raises(InputError, match=r"cannot fetch file://.*name the file as checkpoint"):
        timm.create_model("poolformer_s12", pretrained=True, pretrained_cfg_overlay=overlay)
    with pytest.raises(InputError, match=r"cannot fetch http://localhost/a b\.pth .*can't contain control characters"):
        fetch("http://localhost/a b.pth")


def test_a_run_records_the_released_file(run, tmp_path, monkeypatch):
    file = tmp_path / "poolformer_s12.pth.tar"
    torch.save(metaformer.convert(randomised("poolformer_s12").state_dict(), "official"), file)
    monkeypatch.setattr(metaformer.variants, "fetch", lambda *_: file)
    folder = run("pretrained=true", "model_args={}", "epochs=1")
    record = json.loads((folder / "run.json").read_text())
    assert record["pretrained"] == {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert released_weights(Config()) is None
    elsewhere = {"pretrained_cfg_overlay": {"file": "mine.pth"}}
    assert released_weights(Config(pretrained=True, model_args=elsewhere)) is None
    monkeypatch.setattr(metaformer.variants, "fetch", None)  # without a network the run continues all the same
    run("pretrained=true", "model_args={}", "epochs=1", "--resume")


def test_nothing_else_claims_to_be_released():
    assert {name for name in VARIANTS if timm.get_pretrained_cfg(name).url} == RELEASED.keys()


def test_mmpretrain_names():
    """As mmpretrain's configs/poolformer builds them: ImageClassifier of PoolFormer, average, LinearClsHead."""
    names = metaformer.convert(small(depths=[2, 2, 6, 2]).state_dict(), "mmpretrain").keys()
    prefixes = {name.split(".")[0] for name in names}
    assert prefixes == {"backbone", "head"}
    assert {"backbone.patch_embed.proj.weight", "backbone.network.1.proj.weight", "backbone.network.6.1.layer_scale_2",
            "backbone.network.4.5.mlp.fc1.bias", "backbone.norm6.bias", "head.fc.weight"} <= names  # fmt: skip


# Files


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"model": w, "epoch": 3},
                                  lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}},
                                  lambda w: {f"_orig_mod.module.{k}": v for k, v in w.items()}])  # fmt: skip
def test_load_weights_takes_every_format(to, wrap, tmp_path):
    model, loaded = randomise(small()), small()
    torch.save(wrap(metaformer.convert(model.state_dict(), to)), tmp_path / "weights.pth")
    assert metaformer.load_weights(loaded, tmp_path / "weights.pth") == to
    assert same(loaded, model)
    with pytest.raises(InputError, match=r"another architecture.*missing"):
        metaformer.load_weights(small(depths=[1, 1, 3, 1]), tmp_path / "weights.pth")


def test_an_averaged_model_of_pytorch(tmp_path):
    model, loaded = randomise(small()), small()
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), tmp_path / "weights.pth")
    metaformer.load_weights(loaded, tmp_path / "weights.pth")
    assert same(loaded, model)


def test_a_folder_with_weights_in_several_files(tmp_path):
    save_torch_model(small(), tmp_path, max_shard_size="10KB")
    with pytest.raises(InputError, match="has its weights in several files: save it again with a larger max_shard"):
        read_checkpoint(tmp_path)


def test_renamed_safetensors(tmp_path):
    model, loaded = randomise(small()), small()
    save_file(model.state_dict(), tmp_path / "weights.pth")
    metaformer.load_weights(loaded, tmp_path / "weights.pth")
    assert same(loaded, model)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("/proc/self/mem", "^cannot read /proc/self/mem: Input/output error$"),
        ("x" * 300, "^there is no checkpoint x{300}: give"),
    ],
)
def test_what_the_system_refuses_to_read(source, says):
    for read in (read_checkpoint, open_checkpoint):
        with pytest.raises(InputError, match=says):
            read(source)


def test_the_moving_averages_that_timm_reads_are_read(tmp_path):
    """Under either of its names; timm's own reader gives the same tensors."""
    model, average = small().state_dict(), randomise(small()).state_dict()
    for keys in (("state_dict", "state_dict_ema"), ("model", "model_ema")):
        torch.save(dict(zip(keys, (model, average), strict=True)), tmp_path / "weights.pth")
        theirs = timm.models.load_state_dict(tmp_path / "weights.pth")
        ours = weights_of(read_checkpoint(tmp_path / "weights.pth"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face_folders(file, tmp_path):
    model, loaded = randomise(small()), small()
    weights = metaformer.convert(model.state_dict(), "hf")
    save_file(weights, tmp_path / file) if file.endswith("safetensors") else torch.save(weights, tmp_path / file)
    for source in (tmp_path, tmp_path / file):
        loaded = small()
        assert metaformer.load_weights(loaded, source) == "hf"
        assert same(loaded, model)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:1000])
    with pytest.raises(InputError, match=f"{file} is not a checkpoint or is damaged"):
        metaformer.load_weights(loaded, tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(InputError, match="there is no checkpoint in"):
        metaformer.load_weights(loaded, tmp_path)


@pytest.mark.parametrize(
    ("weights", "to", "says"),
    [
        ({"stem.weight": torch.zeros(1)}, "onnx", "there is no format 'onnx'"),
        ({"conv1.weight": torch.zeros(1)}, "hf", "no weights of a MetaFormer in a known format"),
        ({}, "hf", "the first name is 'none'"),
        ({0: torch.zeros(1)}, "hf", "the first name is 0"),
        ({"backbone.stem.weight": torch.zeros(1)}, "hf", "has no classifier and cannot become a whole hf model"),
        (metaformer.fuse(small()).state_dict(), "hf", "made these weights, for this package alone"),
    ],
)
def test_wrong_input_to_convert(weights, to, says):
    with pytest.raises(InputError, match=says):
        metaformer.convert(weights, to)


def history():
    from mmengine.logging import HistoryBuffer

    return HistoryBuffer([1.0, 2.0], [1, 1])


def test_mmengine_s_history_is_read_without_mmengine(tmp_path, monkeypatch):
    torch.save({"history": history(), "state_dict": {"a": torch.ones(2)}}, tmp_path / "mmengine.pth")
    monkeypatch.delitem(sys.modules, "mmengine.logging")
    read = read_checkpoint(tmp_path / "mmengine.pth")
    assert read["history"]._log_history.tolist() == [1.0, 2.0]
    assert torch.equal(read["state_dict"]["a"], torch.ones(2))


class Calls:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    "what",
    [Calls(print, "executed"), Calls(getattr, dict, "get"), Calls(getattr, argparse.Namespace, "__init__")],
)
def test_nothing_else_is_allowed_beside_a_history(what, tmp_path, capsys):
    torch.save({"history": history(), "what": what}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="could run code"):
        read_checkpoint(tmp_path / "weights.pth")
    assert "executed" not in capsys.readouterr().out


# Loading with another classifier


def test_the_classifiers_of_a_distilled_deit_are_replaced_and_nothing_else(tmp_path):
    def deit(**arguments):
        arguments = {"embed_dim": 24, "depth": 1, "num_heads": 2, **arguments}
        return timm.create_model("deit_tiny_distilled_patch16_224", **arguments)

    torch.save(deit(num_classes=3).state_dict(), tmp_path / "three.pt")
    torch.save(deit(num_classes=3, embed_dim=48).state_dict(), tmp_path / "other.pt")
    model = deit(num_classes=5)
    heads = [model.head.weight.clone(), model.head_dist.weight.clone()]
    with pytest.raises(InputError, match="has a classifier of 3 classes and the model one of 5"):
        metaformer.load_weights(model, tmp_path / "three.pt")
    with pytest.raises(InputError, match="another architecture"):
        metaformer.load_weights(model, tmp_path / "other.pt", replace_head=True)
    metaformer.load_weights(model, tmp_path / "three.pt", replace_head=True)
    given = torch.load(tmp_path / "three.pt")
    assert torch.equal(model.pos_embed, given["pos_embed"])
    assert torch.equal(model.blocks[0].attn.qkv.weight, given["blocks.0.attn.qkv.weight"])
    assert all(torch.equal(*pair) for pair in zip(heads, (model.head.weight, model.head_dist.weight), strict=True))


@pytest.mark.parametrize("name", ["poolformer_s12", "resnet18"])
def test_a_source_without_classifier_keeps_the_model_s_own(name, tmp_path):
    torch.save(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "features.pt")
    model = timm.create_model(name, num_classes=5)
    head = model.get_classifier().weight.clone()
    with pytest.raises(InputError, match="without a classifier: use replace_head=true"):
        metaformer.load_weights(model, tmp_path / "features.pt")
    metaformer.load_weights(model, tmp_path / "features.pt", replace_head=True)
    assert torch.equal(model.get_classifier().weight, head)
    given = torch.load(tmp_path / "features.pt")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in given.items())


def test_models_that_tell_no_classifier_are_loaded_whole_or_not_at_all(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    torch.save(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)).state_dict(), tmp_path / "same.pt")
    torch.save(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5)).state_dict(), tmp_path / "other.pt")
    metaformer.load_weights(model, tmp_path / "same.pt", replace_head=True)
    assert torch.equal(model[1].weight, torch.load(tmp_path / "same.pt")["1.weight"])
    with pytest.raises(InputError, match=r"another architecture .* 2 of another shape"):
        metaformer.load_weights(model, tmp_path / "other.pt", replace_head=True)


# The opener


def test_a_run_is_opened_as_it_was_trained(tmp_path, images):
    arguments = {**SMALL, "stem_stride": 1, "pool_before_norm": True}
    model = save_run(
        tmp_path / "run", model_args=arguments, img_size=48, interpolation="bilinear", mean=(0.5, 0.4, 0.3)
    )
    for source in (tmp_path / "run", tmp_path / "run" / "best.pt", str(tmp_path / "run")):
        opened = open_checkpoint(source)
        assert torch.equal(opened.model(images), model(images))
        assert not opened.model.training
        assert (opened.name, opened.size, opened.crop_pct) == ("poolformer_s12", (48, 48), 0.9)
        assert (opened.interpolation, opened.mean, opened.class_names) == ("bilinear", (0.5, 0.4, 0.3), ["a", "b", "c"])
        assert (opened.config["epochs"], opened.config["model_args"], opened.path) == (
            *(300, arguments),
            tmp_path / "run" / "best.pt",
        )
    assert timm.data.resolve_data_config(model=opened.model)["mean"] == (0.5, 0.4, 0.3)
    torch.save({**read_checkpoint(opened.path), "class_names": ["a"]}, opened.path)
    with pytest.raises(InputError, match="names 1 classes, but its classifier has 3"):
        open_checkpoint(opened.path)


def test_the_moving_average_is_what_every_way_takes(convert, tmp_path, images):
    model = save_run(tmp_path / "run", ema_decay=0.9)
    raw = read_checkpoint(tmp_path / "run")["state_dict"]
    assert not torch.equal(raw["stem.weight"], model.stem.weight)
    assert torch.equal(open_checkpoint(tmp_path / "run").model(images), model(images))
    for to in ("hf", "timm-hf", "ours"):
        convert(tmp_path / "run", tmp_path / to, "--to", to)
        assert torch.equal(open_checkpoint(tmp_path / to).model.stem.weight, model.stem.weight)
    metaformer.load_weights(model, tmp_path / "run", ema=False)
    assert torch.equal(raw["stem.weight"], model.stem.weight)


def test_a_released_name_is_fetched(tmp_path, monkeypatch, images):
    model = randomised("poolformer_s12").eval()
    file = tmp_path / "poolformer_s12.pth.tar"
    torch.save(metaformer.convert(model.state_dict(), "official"), file)
    monkeypatch.setattr(metaformer.variants, "fetch", lambda *_: file)
    opened = open_checkpoint("poolformer_s12")
    assert torch.equal(opened.model(images), model(images))
    assert (opened.path, opened.size, opened.crop_pct, opened.config) == (file, (224, 224), 0.9, None)
    assert opened.format == "official"
    assert open_checkpoint("poolformer_s12.sail_in1k").path == file
    for depths, classes in ((2, None), (2, 10), (7, 10)):  # timm would leave out tensors, or draw them at random
        with pytest.raises(InputError, match=r"the released file of poolformer_s12 holds another architecture"):
            create("poolformer_s12", classes, {"depths": [2, 2, depths, 2]}, pretrained=True)
    with pytest.raises(InputError, match=r"cannot fetch the released weights of metaformer_s12_relu .*No pretrained"):
        open_checkpoint("metaformer_s12_relu")


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("name", ["poolformer_s12", "resnet18", "regnetx_002"])  # the last has a tensor stem.conv.*
def test_checkpoints_of_timm_s_own_training_script(name, ours, tmp_path, images):
    """As timm.utils.CheckpointSaver writes them, with the class of ours, or with timm's own, which averages first."""
    arguments = {"num_classes": 5, "in_chans": 3}
    build = getattr(timm_metaformer, name, timm.create_model) if not ours else timm.create_model
    model = randomise(build(name, **arguments) if build is timm.create_model else build(**arguments)).eval()
    args = argparse.Namespace(
        **{"model": name, "num_classes": 5, "img_size": 64, "input_size": None, "in_chans": None, "gp": None},
        **{"crop_pct": 0.8, "mean": [0.5, 0.5, 0.5], "std": None, "interpolation": "bilinear"},
        **{"drop": 0.0, "drop_path": None, "model_kwargs": {}, "opt": "adamw", "epochs": 300},
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = timm.utils.CheckpointSaver(model, optimizer, args=args, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(1, metric=0.5)
    for source in (tmp_path, tmp_path / "model_best.pth.tar"):
        opened = open_checkpoint(source)
        assert relative_error(opened.model(images), model(images)) < 1e-5  # by the other order, over 1e-3
        assert (opened.name, opened.size, opened.crop_pct) == (name, (64, 64), 0.8)
        assert (opened.interpolation, opened.mean) == ("bilinear", (0.5, 0.5, 0.5))
        assert opened.std == timm.get_pretrained_cfg(name).std


def test_timm_s_class_is_known_by_its_names(tmp_path, images):
    """Its head averages first. The checkpoint is one of PyTorch's ImageNet example."""
    model = randomise(timm_metaformer.poolformer_s12(num_classes=5)).eval()
    torch.save({"epoch": 1, "arch": "poolformer_s12", "state_dict": model.state_dict()}, tmp_path / "weights.pth")
    assert relative_error(open_checkpoint(tmp_path / "weights.pth").model(images), model(images)) < 1e-5


def test_timm_s_input_size_need_not_be_a_square():
    settings = of_timm_train({"model": "poolformer_s12", "input_size": (1, 64, 96)}, None)
    assert (settings["img_size"], settings["model_args"]["in_chans"]) == ([64, 96], 1)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("poolformer_s12", {"in_chans": -1}, "negative dimension"),
        ("poolformer_s12", {"drop_rate": 2}, "dropout probability has to be between 0 and 1"),
        ("vit_tiny_patch16_224", {"num_heads": 0}, "by zero"),
    ],
)
def test_arguments_that_pytorch_refuses(name, arguments, says):
    with pytest.raises(InputError, match=f"^{name} does not take these arguments: .*{says}"):
        create(name, None, arguments)


def test_classes_are_counted_at_the_model_s_own_classifier(tmp_path):
    """safetensors files order their tensors by size or name: the last matrix is a query matrix here."""
    arguments = {"depths": [1, 1, 1, 1], "dims": [32] * 4, "img_size": 64}
    model = drawn("metaformer_s12_ppaa", **arguments)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    opened = open_checkpoint(tmp_path / "weights.safetensors", "metaformer_s12_ppaa", model_args=arguments)
    assert opened.model.num_classes == 10
    save_file(timm.create_model("resnet18", num_classes=7).state_dict(), tmp_path / "resnet.safetensors")
    assert open_checkpoint(tmp_path / "resnet.safetensors", "resnet18").model.num_classes == 7
    with torch.device("meta"):  # a classifier with a hidden layer, whose matrix comes first
        shapes = timm.create_model("caformer_s18", num_classes=7).state_dict()
    weights = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in shapes.items()}
    assert build("caformer_s18", weights, {}, tmp_path).num_classes == 7
    save_file(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(InputError, match="has no classifier: only whole models can be opened"):
        open_checkpoint(tmp_path / "resnet.safetensors", "resnet18")


def test_mmpretrain_s_class_names(tmp_path):
    weights = metaformer.convert(drawn("poolformer_s12", depths=[1] * 4).state_dict(), "mmpretrain")
    meta = {"dataset_meta": {"classes": tuple("abcdefghij")}, "epoch": 3}
    torch.save({"meta": meta, "state_dict": weights}, tmp_path / "epoch_3.pth")
    opened = open_checkpoint(tmp_path / "epoch_3.pth", "poolformer_s12", model_args={"depths": [1] * 4})
    assert opened.class_names == list("abcdefghij")
    assert opened.format == "mmpretrain"


@pytest.mark.parametrize(
    ("content", "arguments", "says"),
    [
        (None, {}, "does not say what model it is of: give --model"),
        (None, {"model": "poolformer_s21"}, r"there is no model 'poolformer_s21' \(did you mean"),
        (None, {"model": "poolformer_s24"}, "another architecture than the model"),
        (None, {"model": "poolformer_s12", "model_args": {"depth": 3}}, "does not take these arguments"),
        (
            {"config": {"model": "poolformer_s24"}},
            {"model": "poolformer_s12"},
            "is a checkpoint of poolformer_s24, not",
        ),
        ({"config": {"model": 3}}, {}, "there is no model 3"),
        (None, {"model": "poolformer_s12", "imgsize": 64}, r"no setting of open_checkpoint 'imgsize' \(did you mean"),
        (
            {"config": {"model": "poolformer_s12", "model_args": {"num_classes": 3}}},
            {},
            "does not take these arguments",
        ),
    ],
)
def test_what_cannot_be_opened(content, arguments, says, tmp_path):
    weights = small().state_dict()
    torch.save(weights if content is None else {**content, "num_classes": 10, "state_dict": weights}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=says):
        open_checkpoint(tmp_path / "w.pt", **arguments)


def test_two_tensors_of_one_name_are_refused():
    weights = {"stem.conv.weight": torch.zeros(1), "stem.weight": torch.ones(1)}
    with pytest.raises(InputError, match=r"two tensors that are 'stem\.weight' under other names"):
        metaformer.convert(weights)


# The command


@pytest.fixture
def convert(monkeypatch, capsys):
    """The command in this process: its exit status and what it prints."""

    def convert(*arguments, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["weights", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_module("metaformer.weights.__main__", run_name="__main__")
        printed = capsys.readouterr()
        assert ended.value.code == status, printed.err
        return printed.err if status else printed.out

    return convert


@pytest.fixture
def picture():
    rough = np.random.default_rng(0).integers(0, 256, (7, 8, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((100, 100), Image.Resampling.BICUBIC)


def probabilities_of(opened, picture, tmp_path):
    """What predict.py says of the picture: class to probability."""
    picture.save(tmp_path / "picture.png")
    (prediction,), _ = predict(opened, [tmp_path / "picture.png"], top=10)
    return {best["class"]: best["probability"] for best in prediction["classes"]}


SETTINGS = [
    {},
    {"model_args": {**SMALL, "stem_stride": 1}, "mean": (0.5, 0.4, 0.3), "interpolation": "bilinear"},
    {"model_args": {}, "img_size": 64, "crop_pct": 0.95},
    {"model": "metaformer_s12_nolayerscale", "crop_pct": 1.0},
    {"model_args": {"depths": [1] * 3, "dims": [8, 12, 16], "stem_stride": 2, "overlap": False, "mlp_ratio": 3.2}},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_transformers_gets_what_was_trained(settings, convert, picture, tmp_path):
    model = save_run(tmp_path / "run", **settings)
    printed = convert(tmp_path / "run", tmp_path / "hf", "--to", "hf")
    opened, back = open_checkpoint(tmp_path / "run"), open_checkpoint(tmp_path / "hf")
    for field in ("name", "size", "crop_pct", "interpolation", "class_names"):
        assert getattr(back, field) == getattr(opened, field), field
    assert back.model_args.keys() == opened.model_args.keys()
    assert np.allclose([back.mean, back.std], [opened.mean, opened.std])
    assert same(back.model, model)
    theirs = PoolFormerForImageClassification.from_pretrained(tmp_path / "hf").eval()
    pixels = PoolFormerImageProcessor.from_pretrained(tmp_path / "hf")(picture, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        assert relative_error(theirs(pixels).logits, model(pixels)) < 1e-6
    # The picture is a square, cut by the same margin on all sides, which transformers rounds down.
    side = opened.size[0]
    margin = int(side / opened.crop_pct) - side
    shift = round(margin / 2) - margin // 2
    assert ("one pixel further up and left" in printed) == bool(shift)
    percent = float(re.search(r"changes the logits of a square test picture by (\d+\.\d\d) %", printed)[1])
    assert percent >= 0.1 * shift
    inputs = {name: getattr(opened, name) for name in ("mean", "std", "crop_pct", "interpolation")}
    ours = timm.data.create_transform(side, **inputs)(picture)[:, : side - shift, : side - shift]
    difference = (ours - pixels[0, :, shift:, shift:]).abs() * 255 * torch.tensor(opened.std)[:, None, None]
    assert difference.max() <= 2.01
    found = pipeline("image-classification", model=str(tmp_path / "hf"), top_k=3)(picture)
    expected = model(pixels).softmax(1)[0].tolist()
    assert {best["label"]: best["score"] for best in found} == pytest.approx(
        dict(zip("abc", expected, strict=True)), rel=1e-4
    )


@pytest.mark.parametrize(
    ("to", "settings", "says"),
    [
        (
            "hf",
            {"model_args": {"pool_before_norm": True}},
            r"\(pool_before_norm=True\): with equal weights, its output",
        ),
        ("hf", {"model": "metaformer_s12_timmhead"}, "with equal weights, its output would differ by"),
        ("hf", {"model": "metaformer_s12_pool5"}, "with equal weights, its output would differ by"),
        ("hf", {"model": "metaformer_s12_relu"}, "with equal weights, its output would differ by"),
        ("hf", {"model": "metaformer_s12_noresidual"}, "with equal weights, its output would differ by"),
        ("hf", {"model": "metaformer_s12_nomlp"}, "another architecture"),
        ("hf", {"interpolation": "box"}, r"no filters box and hamming: .* \(32, 32\) with 3 channels and box"),
        ("hf", {"model": "metaformer_s12_bn"}, "another architecture"),
        ("hf", {"model": "resnet18", "model_args": {}}, "hf has no resnet18, which is not a MetaFormer: use timm-hf"),
        ("official", {"model_args": {"pool_before_norm": True}}, r"\(pool_before_norm=True\): with equal weights"),
        ("official", {"model_args": {"stem_stride": 1}}, r"\(stem_stride=1\): with equal weights"),
        ("official", {"model_args": SMALL}, "another architecture"),
        ("official", {"model": "metaformer_s12_relu", "model_args": {}}, "official has no metaformer_s12_relu"),
        # SpatialFc(spatial_shape=[7, 7]) in the official code
        ("official", {"model": "metaformer_s12_pppf", "model_args": {}, "img_size": 64}, "2 of another shape"),
        ("mmpretrain", {"model_args": {"stem_stride": 2}}, r"\(stem_stride=2\): with equal weights"),
        ("timm", {"model_args": {"stem_stride": 2}}, r"\(stem_stride=2\): with equal weights"),
        ("timm", {"model": "metaformer_s12_identity", "model_args": {}}, "timm has no metaformer_s12_identity"),
        ("hgf", {}, r"there is no format 'hgf' \(did you mean 'hf'\?\)"),
    ],
)
def test_what_a_library_cannot_represent_is_refused(to, settings, says, convert, tmp_path):
    save_run(tmp_path / "run", **settings)
    assert re.search(says, convert(tmp_path / "run", tmp_path / "out", "--to", to, status=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["timm", "official", "mmpretrain", "ours"])
def test_files_of_weights(to, convert, images, tmp_path):
    model = save_run(tmp_path / "run", model_args={}, interpolation="bilinear")
    printed = convert(tmp_path / "run", tmp_path / "out" / "weights.pth", "--to", to)
    assert "(ours, poolformer_s12)" in printed
    assert bool(re.search(r"its logits differ by \d+\.\d % on random images", printed)) == (to == "timm")
    loaded = timm.create_model("poolformer_s12", num_classes=3)
    assert metaformer.load_weights(loaded, tmp_path / "out" / "weights.pth") == to
    assert same(loaded, model)
    if to == "ours":
        back = open_checkpoint(tmp_path / "out" / "weights.pth")
        assert (back.size, back.interpolation, back.class_names) == ((32, 32), "bilinear", ["a", "b", "c"])


def test_a_name_with_timm_s_tag_is_that_of_the_model(tmp_path):
    model = timm.create_model("poolformer_s12", num_classes=3).eval()
    torch.save({"arch": "poolformer_s12.sail_in1k", "state_dict": model.state_dict()}, tmp_path / "weights.pt")
    write(open_checkpoint(tmp_path / "weights.pt"), "official", tmp_path / "official.pt")
    loaded = timm.create_model("poolformer_s12", num_classes=3)
    assert metaformer.load_weights(loaded, tmp_path / "official.pt") == "official"
    assert same(loaded, model)


def test_timm_s_head_is_written_for_timm_without_a_difference(convert, images, tmp_path):
    model = save_run(tmp_path / "run", model_args={"pool_before_norm": True})
    assert "differ" not in convert(tmp_path / "run", tmp_path / "weights.pth", "--to", "timm")
    theirs = timm_metaformer.poolformer_s12(num_classes=3).eval()
    theirs.load_state_dict(torch.load(tmp_path / "weights.pth"))
    assert relative_error(theirs(images), model(images)) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"model_args": {**SMALL, "stem_stride": 1, "pool_before_norm": True}, "mean": (0.5, 0.4, 0.3), "crop_pct": 0.8},
        {"model": "metaformer_s12_ppaa", "model_args": {"depths": [1] * 4, "dims": [32] * 4}, "img_size": 64},
        {"model": "metaformer_s12_bn", "interpolation": "bilinear", "drop_path": 0.1, "classes": ["B", "a", "c", "D"]},
        {"model": "resnet18", "model_args": {}, "img_size": 64},
    ],
)
def test_timm_folders_are_our_implementation_in_transformers(settings, convert, picture, tmp_path):
    """transformers' TimmWrapper builds the model by timm's registry, in which importing metaformer puts ours."""
    model = save_run(tmp_path / "run", **settings)
    convert(tmp_path / "run", tmp_path / "folder", "--to", "timm-hf")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "folder").eval()
    assert type(theirs.timm_model) is type(model)
    assert same(theirs.timm_model, model)
    found = pipeline("image-classification", model=str(tmp_path / "folder"), top_k=10)(picture)
    expected = probabilities_of(open_checkpoint(tmp_path / "run"), picture, tmp_path)
    assert {best["label"]: best["score"] for best in found} == pytest.approx(expected, abs=1e-6)
    opened, back = open_checkpoint(tmp_path / "run"), open_checkpoint(tmp_path / "folder")
    for field in ("name", "size", "crop_pct", "interpolation", "mean", "std", "class_names"):
        assert getattr(back, field) == getattr(opened, field), field
    assert same(back.model, model)
    assert same(timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True), model)


def test_transformers_trains_a_timm_folder_and_what_it_saves_is_read_back(convert, tmp_path):
    save_run(tmp_path / "run", "metaformer_s12_identity")
    convert(tmp_path / "run", tmp_path / "folder", "--to", "timm-hf")
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path / "folder", num_labels=2, id2label={0: "x", 1: "y"}, ignore_mismatched_sizes=True
    )
    model.config.label_names = ["x", "y"]  # transformers would keep those of before
    processor = AutoImageProcessor.from_pretrained(tmp_path / "folder")
    generator = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i % 2} for i in range(8)]
    settings = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "report_to": "none"}
    arguments = TrainingArguments(str(tmp_path / "trained"), save_strategy="no", use_cpu=True, **settings)
    trainer = Trainer(model, arguments, train_dataset=data, processing_class=processor)
    before = model.timm_model.stem.weight.clone()
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    assert not torch.equal(before, model.timm_model.stem.weight)
    opened = open_checkpoint(tmp_path / "trained")
    assert (opened.name, opened.class_names, opened.size) == ("metaformer_s12_identity", ["x", "y"], (32, 32))
    images = torch.stack([picture["pixel_values"] for picture in data])
    with torch.inference_mode():
        assert relative_error(opened.model(images), model.eval()(images).logits) < 1e-6


def test_folders_of_transformers_tell_their_model_classes_and_preprocessing(tmp_path, images):
    """As transformers alone writes them, not the command."""
    theirs = hf_twin(drawn("poolformer_s24")).eval()
    theirs.config.id2label = dict(enumerate("jihgfedcba"))
    theirs.save_pretrained(tmp_path)
    PoolFormerImageProcessor(crop_pct=0.8, image_mean=[0.5] * 3, resample=2).save_pretrained(tmp_path)
    opened = open_checkpoint(tmp_path)
    assert relative_error(opened.model(images), theirs(images).logits) < 1e-6
    assert (opened.name, opened.class_names) == ("poolformer_s24", list("jihgfedcba"))
    assert (opened.size, opened.crop_pct, opened.interpolation) == ((224, 224), 0.8, "bilinear")
    assert opened.mean == (0.5, 0.5, 0.5)
    for stated, crop_pct in [({}, PoolFormerImageProcessor().crop_pct), ({"crop_pct": None}, 1.0)]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
        assert open_checkpoint(tmp_path).crop_pct == crop_pct
    for name, content, says in [
        ("preprocessor_config.json", {"do_normalize": False}, "prepares pictures otherwise"),
        ("preprocessor_config.json", {"size": 256, "crop_size": 224}, "prepares pictures otherwise"),
        ("preprocessor_config.json", {"rescale_factor": 1 / 127.5}, "prepares pictures otherwise"),
        ("config.json", {"model_type": "poolformer", "pool_size": 5}, "a PoolFormer with pool_size 5: here it is 3"),
        ("config.json", {"model_type": "vit"}, "does not say what model it is of"),
        ("config.json", {"model_type": "poolformer", "strides": 4}, r"a setting of .* cannot be used, .*: TypeError: "),
        ("config.json", {"architecture": "poolformer_s24", "model_args": {"in_chans": -1}}, "negative dimension"),
        ("config.json", {"architecture": "poolformer_s24", "crop_pct": "all"}, "could not convert string to float"),
        ("config.json", {"architecture": "poolformer_s24", "crop_mode": "squash"}, "with crop_mode='squash'"),
    ]:
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(InputError, match=says):
            open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*config.json"):
        open_checkpoint(tmp_path)


def test_defaults_that_transformers_does_not_write(tmp_path):
    PoolFormerConfig().save_pretrained(tmp_path)
    assert of_folder(tmp_path, "hf")["model"] == "poolformer_s12"
    (tmp_path / "config.json").write_text('{"model_type": "poolformer"}')
    assert of_folder(tmp_path, "hf")["model"] == "poolformer_s12"


def test_a_timm_folder_with_timm_s_own_class_has_timm_s_logits(tmp_path, images):
    model = randomise(timm_metaformer.poolformer_s12(num_classes=3)).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    opened = open_checkpoint(tmp_path)
    assert opened.format == "timm"
    assert relative_error(opened.model(images), model(images)) < 1e-5


def test_an_error_of_the_command_is_one_line(convert, tmp_path):
    torch.save(small().state_dict(), tmp_path / "bare.pt")
    assert convert(tmp_path / "bare.pt", tmp_path / "out", "--to", "hf", status=2) == (
        f"error: {tmp_path}/bare.pt does not say what model it is of: give --model poolformer_s12 or another\n"
    )


@pytest.mark.parametrize("to", ["hf", "timm-hf", "ours"])
def test_a_full_disk_leaves_no_part_of_the_weights(to, convert, tmp_path):
    save_run(tmp_path / "run")
    target = tmp_path / "out" / ("" if to == "ours" else "model.safetensors")
    target.parent.mkdir(exist_ok=True)
    target.with_name(f"{target.name}.tmp").symlink_to("/dev/full")
    error = convert(tmp_path / "run", tmp_path / "out", "--to", to, status=2)
    assert error == f"error: cannot write {target}: No space left on device\n"
    assert not target.exists()


def test_a_folder_in_the_place_of_a_file(convert, tmp_path):
    save_run(tmp_path / "run")
    for target in (tmp_path, "."):
        assert convert(tmp_path / "run", target, "--to", "ours", status=2).startswith(f"error: cannot write {target}: ")


@pytest.mark.parametrize("to", ["hf", "timm-hf"])
def test_a_file_in_the_place_of_a_folder_is_kept(to, convert, tmp_path):
    save_run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    assert convert(tmp_path / "run", tmp_path / "file", "--to", to, status=2).startswith("error: cannot write ")
    assert (tmp_path / "file").read_text() == "mine"


def test_grey_images(tmp_path):
    model = small(in_chans=1)
    torch.save({"arch": "poolformer_s12", "state_dict": model.state_dict()}, tmp_path / "weights.pt")
    opened = open_checkpoint(tmp_path / "weights.pt", model_args=SMALL)
    with pytest.raises(InputError, match=r"squares of 3 channels, .* takes images of \(224, 224\) with 1 channels"):
        write(opened, "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    whole = opened._replace(model=timm.create_model("poolformer_s12", in_chans=1, num_classes=10).eval())
    for to in ("official", "mmpretrain"):  # PatchEmbed(..., in_chans=3) in both
        with pytest.raises(InputError, match=r"1 of another shape \(stem\.weight\)"):
            write(whole, to, tmp_path / "weights.pt")
    write(opened, "ours", tmp_path / "ours.pt")
    write(opened, "timm-hf", tmp_path / "folder")
    images = torch.randn(1, 1, 64, 64)
    for source in ("ours.pt", "folder"):
        assert torch.equal(open_checkpoint(tmp_path / source).model(images), model(images))
    loaded = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert torch.equal(loaded(images), model(images))
    mean = timm.data.resolve_data_config(model=loaded)["mean"]
    assert mean == pytest.approx([sum(opened.mean) / 3])  # timm's rule


def test_a_folder_that_timm_cannot_describe_is_not_begun(tmp_path):
    save_run(tmp_path / "run")
    own = open_checkpoint(tmp_path / "run")._replace(model=small(token_mixers=nn.Identity))
    with pytest.raises(InputError, match=r"timm-hf cannot represent poolformer_s12 .*token_mixers' is not"):
        write(own, "timm-hf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_images_that_are_no_squares(tmp_path, picture):
    arguments = {**SMALL, "img_size": [32, 64]}
    model = randomise(small("metaformer_s12_random", img_size=(32, 64)))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    opened = open_checkpoint(tmp_path / "weights.safetensors", "metaformer_s12_random", model_args=arguments)
    assert opened.size == (32, 64)
    images = torch.randn(1, 3, 32, 64)
    assert torch.equal(opened.model(images), model(images))
    with pytest.raises(InputError, match="images of 32 x 64 pixels, and pictures are cropped to squares only"):
        probabilities_of(opened, picture, tmp_path)
    with pytest.raises(InputError, match="transformers' processor crops squares"):
        write(opened, "hf", tmp_path / "hf")
    write(opened, "timm-hf", tmp_path / "folder")
    write(opened, "ours", tmp_path / "weights.pt")
    for source in ("folder", "weights.pt"):
        back = open_checkpoint(tmp_path / source)
        assert back.size == (32, 64)
        assert torch.equal(back.model(images), model(images))
