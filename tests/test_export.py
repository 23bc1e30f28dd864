"""Exported files against the model they were made from, at other batches and sizes than they were traced at."""

import sys

import onnxruntime
import pytest
import timm
import torch

from metaformer import export
from metaformer.errors import InputError
from metaformer.weights import read_checkpoint
from oracles import randomise, relative_error

SMALL = {"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 24]}
FORMATS = ("onnx", "torch-export")


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    export.main()


def outputs_of(file, to, images):
    """The file's outputs, as its user gets them: by name from ONNX Runtime, in order from torch."""
    if to == "onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        values = session.run(names, {"images": images.numpy()})
        return dict(zip(names, map(torch.from_numpy, values), strict=True))
    values = torch.export.load(file).module()(images)
    return {"logits": values} if isinstance(values, torch.Tensor) else {f"level{i}": v for i, v in enumerate(values)}


def randomised(folder, name="poolformer_s12", **arguments):
    """Draw the weights of a run's checkpoint anew, large enough to matter; returns the model."""
    model = randomise(timm.create_model(name, num_classes=3, **arguments)).eval()
    checkpoint = read_checkpoint(folder / "best.pt")
    torch.save({**checkpoint, "state_dict": model.state_dict()}, folder / "best.pt")
    return model


def assert_same(outputs, references):
    assert list(outputs) == list(references)
    for name, reference in references.items():
        assert outputs[name].shape == reference.shape
        assert relative_error(outputs[name], reference) < 1e-5


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".export-")]


@pytest.mark.parametrize("to", FORMATS)
def test_run_at_other_batches_and_sizes(run, monkeypatch, capsys, tmp_path, to):
    folder = run("epochs=1")
    model = randomised(folder, **SMALL)
    file = tmp_path / "exported" / "file.pt2"
    command(monkeypatch, folder, "--to", to, "--out", file, "--size", 64, 96)
    smallest = 32 if to == "onnx" else 35
    report = capsys.readouterr().out
    assert f"images (batch, 3, height, width) from {smallest} pixels a side" in report
    assert f"batches of 1 and 3 at 64 x 96 and {smallest} x 141 pixels" in report
    assert not leftovers(file.parent)
    for shape in ((1, 3, 64, 96), (5, 3, 77, 45), (2, 3, smallest, smallest)):
        images = torch.randn(shape)
        assert_same(outputs_of(file, to, images), {"logits": model(images)})


@pytest.mark.parametrize("to", FORMATS)
def test_images_with_one_position_in_the_last_map(run, monkeypatch, capsys, tmp_path, to):
    folder = run("epochs=1")
    model = randomised(folder, **SMALL)
    command(monkeypatch, folder, "--to", to, "--out", tmp_path / "file")
    takes = "(batch, 3, height, width) from 32 pixels a side" if to == "onnx" else "(batch, 3, 32, 32)"
    assert f"images {takes}; " in capsys.readouterr().out
    for batch in (1, 4):
        images = torch.randn(batch, 3, 32, 32)
        assert_same(outputs_of(tmp_path / "file", to, images), {"logits": model(images)})


@pytest.mark.parametrize("to", FORMATS)
def test_features_are_the_levels_of_the_backbone(run, monkeypatch, tmp_path, to):
    folder = run("epochs=1")
    model = randomised(folder, **SMALL)
    command(monkeypatch, folder, "--to", to, "--out", tmp_path / "file", "--features", "--size", 64)
    images = torch.randn(3, 3, 70, 101)
    levels = model.forward_intermediates(images, intermediates_only=True)
    assert_same(outputs_of(tmp_path / "file", to, images), {f"level{i}": level for i, level in enumerate(levels)})


@pytest.mark.parametrize("to", FORMATS)
def test_fixed_number_of_tokens(run, monkeypatch, capsys, tmp_path, to):
    folder = run("model=metaformer_s12_ppff", "img_size=64", "epochs=1")
    model = randomised(folder, "metaformer_s12_ppff", img_size=64, **SMALL)
    file = tmp_path / "file"
    with pytest.raises(InputError, match=r"metaformer_s12_ppff can be exported for its own 64 x 64 pixels only"):
        command(monkeypatch, folder, "--to", to, "--out", file, "--size", 96)
    assert not file.exists()
    command(monkeypatch, folder, "--to", to, "--out", file)
    assert "images (batch, 3, 64, 64); " in capsys.readouterr().out
    images = torch.randn(5, 3, 64, 64)
    assert_same(outputs_of(file, to, images), {"logits": model(images)})


def test_attention_varies_in_size(tmp_path):
    arguments = {"depths": [1, 1, 1, 1], "dims": [32] * 4, "pos_embeds": False}
    model = randomise(timm.create_model("metaformer_s12_ppaa", num_classes=3, **arguments)).eval()
    for to in FORMATS:
        export.export(model, (64, 64), to, tmp_path / "file")
        images = torch.randn(3, 3, 80, 131)
        assert_same(outputs_of(tmp_path / "file", to, images), {"logits": model(images)})


def test_moving_average_and_other_architectures(run, monkeypatch, tmp_path):
    folder = run("model=resnet18", "model_args={}", "ema_decay=0.5", "epochs=1")
    model = timm.create_model("resnet18", num_classes=3).eval()
    model.load_state_dict(read_checkpoint(folder / "best.pt")["state_dict_ema"])
    command(monkeypatch, folder / "best.pt", "--to", "torch-export", "--out", tmp_path / "file")
    images = torch.randn(4, 3, 32, 32)
    assert_same(outputs_of(tmp_path / "file", "torch-export", images), {"logits": model(images)})
    with pytest.raises(InputError, match="resnet18 is not a MetaFormer: export it without --features"):
        command(monkeypatch, folder, "--to", "torch-export", "--out", tmp_path / "file", "--features")
    with pytest.raises(InputError, match="its own 32 x 32 pixels only, because it is not a MetaFormer"):
        command(monkeypatch, folder, "--to", "torch-export", "--out", tmp_path / "file", "--size", 64)


def test_checkpoint_from_elsewhere(monkeypatch, capsys, tmp_path):
    model = randomise(timm.create_model("poolformer_s12", num_classes=5)).eval()
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    arguments = (tmp_path / "bare.pth", "--to", "torch-export", "--out", tmp_path / "file")
    with pytest.raises(InputError, match="does not say what model it is of: give --model"):
        command(monkeypatch, *arguments)
    command(monkeypatch, *arguments, "--model", "poolformer_s12")
    assert "at 224 x 224 and 35 x 269 pixels" in capsys.readouterr().out
    images = torch.randn(1, 3, 64, 64)
    assert_same(outputs_of(tmp_path / "file", "torch-export", images), {"logits": model(images)})


def test_what_computes_something_else_is_not_kept(monkeypatch, tmp_path):
    model = randomise(timm.create_model("poolformer_s12", num_classes=3, **SMALL)).eval()
    file = tmp_path / "file"
    file.write_text("of before")
    for wrong in (1.001, float("nan")):
        monkeypatch.setattr(export, "read_torch_export", lambda _, wrong=wrong: lambda images: (model(images) * wrong,))
        with pytest.raises(InputError, match=r"differs from the model by (1.0e-03|nan) of its output"):
            export.export(model, (64, 64), "torch-export", file)
    assert file.read_text() == "of before"
    assert not leftovers(tmp_path)


def test_wrong_input(run, monkeypatch, tmp_path):
    folder = run("epochs=1")
    (tmp_path / "a_file").write_text("")
    out = ("--out", tmp_path / "file")
    for arguments, message in [
        ((folder, "--to", "onxx", *out), r"no format 'onxx' \(did you mean 'onnx'\?\): there are onnx, torch-export"),
        ((tmp_path / "absent.pt", "--to", "onnx", *out), r"there is no checkpoint .*absent\.pt"),
        ((tmp_path, "--to", "onnx", *out), r"there is no checkpoint .*best\.pt"),
        ((folder, "--to", "onnx", "--model", "poolformer_s24", *out), "is a checkpoint of poolformer_s12, not of"),
        ((folder, "--to", "onnx", "--size", 16, 64, *out), "--size 16 x 64 is too small: .* from 32 pixels a side"),
        ((folder, "--to", "onnx", "--size", 64, 64, 64, *out), "--size has 3 numbers"),
        ((folder, "--to", "onnx", "--out", tmp_path / "a_file" / "file"), r"cannot write .*a_file.*: "),
    ]:
        with pytest.raises(InputError, match=message):
            command(monkeypatch, *arguments)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match="to export to onnx, more packages are needed: pip install onnxscript"):
        command(monkeypatch, folder, "--to", "onnx", *out)
    assert not (tmp_path / "file").exists()
