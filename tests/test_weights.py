"""Weights between libraries: logits of the same weights there and here, names, and files that are refused."""

import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import timm.models.metaformer as timm_metaformer
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import PoolFormerForImageClassification, PoolFormerImageProcessor, pipeline

import metaformer
from metaformer import POOLFORMERS, VARIANTS, InputError
from metaformer.formats import TO, recognised
from oracles import randomise, relative_error

PRECISIONS = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
RELEASED = {  # in the official release: models/metaformer.py and poolformer.py of sail-sg/poolformer, model_urls
    **{name: name for name in POOLFORMERS},
    "metaformer_s12_identity": "metaformer_id_s12",
    "metaformer_s12_pppa": "metaformer_pppa_s12_224",
    "metaformer_s12_ppaa": "metaformer_ppaa_s12_224",
    "metaformer_s12_pppf": "metaformer_pppf_s12_224",
    "metaformer_s12_ppff": "metaformer_ppff_s12_224",
}


def drawn(name: str, dtype: torch.dtype = torch.float32, **arguments):
    return randomise(timm.create_model(name, num_classes=10, **arguments)).to(dtype).eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.fixture
def images():
    return torch.randn(2, 3, 75, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize("name", VARIANTS)
def test_round_trips_lose_nothing(name, to):
    with torch.device("meta"):
        weights = timm.create_model(name).state_dict()
    there = metaformer.convert(weights, to)
    assert recognised(there) == to
    back = metaformer.convert(there)
    assert back.keys() == weights.keys()
    assert all(back[key] is weights[key] for key in weights)
    assert len(there) == len(weights)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", POOLFORMERS)
def test_logits_are_equal_in_transformers_and_back(name, dtype, tolerance, images):
    model = drawn(name, dtype)
    from_here = POOLFORMERS[name].arguments
    config = PoolFormerForImageClassification.config_class(
        depths=list(from_here["depths"]), hidden_sizes=list(from_here["dims"]), num_labels=10
    )
    theirs = PoolFormerForImageClassification(config).to(dtype).eval()
    theirs.load_state_dict(metaformer.convert(model.state_dict(), "hf"))
    back = timm.create_model(name, num_classes=10).to(dtype).eval()
    back.load_state_dict(metaformer.convert(theirs.state_dict()))
    with torch.inference_mode():
        logits = model(images.to(dtype))
        assert relative_error(theirs(images.to(dtype)).logits, logits) < tolerance
        assert torch.equal(back(images.to(dtype)), logits)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", POOLFORMERS)
def test_features_are_equal_in_timm_and_logits_but_for_its_head(name, dtype, tolerance, images):
    model = drawn(name, dtype)
    theirs = getattr(timm_metaformer, name)(num_classes=10).to(dtype).eval()
    theirs.load_state_dict(metaformer.convert(model.state_dict(), "timm"))
    with torch.inference_mode():
        features = theirs.forward_features(images.to(dtype))
        assert relative_error(features, model.forward_features(images.to(dtype))) < tolerance
        norm = theirs.head.norm
        normed = nn.functional.group_norm(features, 1, norm.weight, norm.bias)
        logits = theirs.head.fc(normed.mean((2, 3)))  # the paper's order
        assert relative_error(model(images.to(dtype)), logits) < tolerance
        assert relative_error(theirs(images.to(dtype)), logits) > 1e-3  # timm's order is another function


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
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    url = timm.get_pretrained_cfg(name).url
    assert url == f"https://github.com/sail-sg/poolformer/releases/download/v1.0/{RELEASED[name]}.pth.tar"
    if name in POOLFORMERS and name != "poolformer_s12":
        return  # the same layout, and larger
    model = randomise(timm.create_model(name))
    path = tmp_path / f"{RELEASED[name]}.pth.tar"
    torch.save(metaformer.convert(model.state_dict(), "official"), path)
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"url": path.as_uri()})
    assert all(
        torch.equal(*pair) for pair in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_a_damaged_download_is_refused_and_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    model = randomise(timm.create_model("poolformer_s12"))
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
    (tmp_path / "cache/hub/checkpoints/poolformer_s12.pth.tar").unlink()
    with pytest.raises(InputError, match=r"cannot fetch file://.*name the file as checkpoint"):
        timm.create_model("poolformer_s12", pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_run_records_the_released_file(run, tmp_path, monkeypatch):
    model = timm.create_model("poolformer_s12")
    file = tmp_path / "poolformer_s12.pth.tar"
    torch.save(metaformer.convert(model.state_dict(), "official"), file)
    monkeypatch.setattr(metaformer.variants, "fetch", lambda url: file)
    folder = run("pretrained=true", "model_args={}", "epochs=1")
    record = json.loads((folder / "run.json").read_text())
    assert record["pretrained"] == {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert json.loads((run("epochs=1", output="other") / "run.json").read_text())["pretrained"] is None


def test_nothing_else_claims_to_be_released():
    assert {name for name in VARIANTS if timm.get_pretrained_cfg(name).url} == RELEASED.keys()


def test_mmpretrain_names():
    """As mmpretrain's configs/poolformer builds them: ImageClassifier of PoolFormer, average, LinearClsHead."""
    names = metaformer.convert(drawn("poolformer_s12").state_dict(), "mmpretrain").keys()
    prefixes = {name.split(".")[0] for name in names}
    assert prefixes == {"backbone", "head"}
    assert {"backbone.patch_embed.proj.weight", "backbone.network.1.proj.weight", "backbone.network.6.1.layer_scale_2",
            "backbone.network.4.5.mlp.fc1.bias", "backbone.norm6.bias", "head.fc.weight"} <= names  # fmt: skip


# Files


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"model": w, "epoch": 3},
                                  lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}}])  # fmt: skip
def test_load_weights_takes_every_format(to, wrap, tmp_path):
    model = drawn("poolformer_s12")
    torch.save(wrap(metaformer.convert(model.state_dict(), to)), tmp_path / "weights.pth")
    loaded = timm.create_model("poolformer_s12", num_classes=10)
    assert metaformer.load_weights(loaded, tmp_path / "weights.pth") == to
    assert all(
        torch.equal(*pair) for pair in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    with pytest.raises(InputError, match=r"another architecture.*missing"):
        metaformer.load_weights(timm.create_model("poolformer_s24", num_classes=10), tmp_path / "weights.pth")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face_folders(file, tmp_path):
    model = drawn("poolformer_s12")
    weights = metaformer.convert(model.state_dict(), "hf")
    save_file(weights, tmp_path / file) if file.endswith("safetensors") else torch.save(weights, tmp_path / file)
    for source in (tmp_path, tmp_path / file):
        loaded = timm.create_model("poolformer_s12", num_classes=10)
        assert metaformer.load_weights(loaded, source) == "hf"
        assert torch.equal(loaded.stem.weight, model.stem.weight)
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
    ],
)
def test_wrong_input_to_convert(weights, to, says):
    with pytest.raises(InputError, match=says):
        metaformer.convert(weights, to)


# The command


def command(*arguments, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "metaformer.weights", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert "Warning" not in done.stderr.partition("metaformer")[0]
    return done.stdout if status == 0 else done.stderr


@pytest.mark.parametrize(("name", "crop"), [("poolformer_s12", 0.9), ("poolformer_m36", 0.95)])
def test_the_command_writes_what_transformers_loads(name, crop, tmp_path):
    model = drawn(name)
    torch.save(metaformer.convert(model.state_dict(), "official"), tmp_path / "weights.pth.tar")
    printed = command(tmp_path / "weights.pth.tar", tmp_path / "hf", "--to", "hf", "--model", name)
    assert "(official, " in printed
    assert {"config.json", "preprocessor_config.json", "model.safetensors"} <= {
        p.name for p in (tmp_path / "hf").iterdir()
    }
    theirs = PoolFormerForImageClassification.from_pretrained(tmp_path / "hf").eval()
    processor = PoolFormerImageProcessor.from_pretrained(tmp_path / "hf")
    assert processor.crop_pct == crop
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 280, 3), dtype=np.uint8))
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        assert relative_error(theirs(pixels).logits, model(pixels)) < 1e-6
        expected = model(pixels).softmax(1)[0]
    found = pipeline("image-classification", model=str(tmp_path / "hf"), top_k=1)(picture)[0]
    assert found["label"] == f"LABEL_{expected.argmax()}"
    assert found["score"] == pytest.approx(expected.max().item(), rel=1e-4)


@pytest.mark.parametrize("to", ["timm", "official", "mmpretrain", "ours"])
def test_the_command_converts_a_run(to, run, tmp_path):
    folder = run("epochs=1", "model_args={}")
    printed = command(folder / "best.pt", tmp_path / "out" / "weights.pth", "--to", to)
    assert "(ours, poolformer_s12)" in printed
    assert bool(re.search(r"its logits differ by \d+\.\d % on random images", printed)) == (to == "timm")
    loaded = timm.create_model("poolformer_s12", num_classes=3)
    assert metaformer.load_weights(loaded, tmp_path / "out" / "weights.pth") == to
    best = torch.load(folder / "best.pt")["state_dict"]
    assert all(torch.equal(loaded.state_dict()[name], best[name]) for name in best)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "hgf"], "there is no format 'hgf' (did you mean 'hf'?)"),
        (["--to", "hf"], "does not say what model it is of: give --model"),
        (["--to", "hf", "--model", "poolformer_s21"], "there is no model 'poolformer_s21' (did you mean"),
        (["--to", "hf", "--model", "poolformer_s24"], "another architecture than the model"),
        (
            ["--to", "hf", "--model", "metaformer_s12_identity"],
            "hf has no metaformer_s12_identity",
        ),
    ],
)
def test_wrong_input_to_the_command(arguments, says, tmp_path):
    torch.save(drawn("poolformer_s12").state_dict(), tmp_path / "weights.pth")
    error = command(tmp_path / "weights.pth", tmp_path / "target", *arguments, status=2)
    assert says in error
    assert not (tmp_path / "target").exists()


def test_class_names_go_along(run, tmp_path):
    folder = run("epochs=1", "model_args={}")
    command(folder / "best.pt", tmp_path / "hf", "--to", "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["id2label"] == {"0": "a", "1": "b", "2": "c"}
