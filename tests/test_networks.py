"""The trained networks in analysis/networks, and the model cards beside the weights of runs."""

import hashlib
import json
import re
import shutil
import signal

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification

from conftest import ROOT
from metaformer import InputError, open_checkpoint
from metaformer.weights.writers import write
from test_training import interrupt

NETWORKS = sorted((ROOT / "analysis/networks").iterdir())


def logits_on(card: ModelCard) -> dict[int, list[float]]:
    """The logits that a card states for its pictures."""
    rows = re.findall(r"^\| (\d+) \| ([-\d.| ]+) \|$", card.text, re.M)
    return {int(k): [float(value) for value in values.split(" | ")] for k, values in rows}


def pictures_of(card: ModelCard, opened) -> torch.Tensor:
    """The pictures that a card describes, normalised as in validation, which leaves 32 x 32 pixels as they are."""
    c, y, x = torch.as_tensor(np.indices((3, 32, 32)))
    pixels = torch.stack([(k * x + 3 * k * y + 85 * c) % 256 for k in logits_on(card)])
    mean, std = (torch.tensor(values)[:, None, None] for values in (opened.mean, opened.std))
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize("folder", NETWORKS, ids=lambda folder: folder.name)
@torch.inference_mode()
def test_a_trained_network_gives_the_logits_of_its_card(folder):
    card, opened = ModelCard.load(folder / "README.md"), open_checkpoint(folder)
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card.text
    images, expected = pictures_of(card, opened), torch.tensor(list(logits_on(card).values()))
    assert expected.shape == (3, 10)
    theirs = AutoModelForImageClassification.from_pretrained(folder)
    for model in (opened.model, timm.create_model(f"local-dir:{folder}", pretrained=True), theirs):
        logits = model.eval()(images)
        assert torch.allclose(getattr(logits, "logits", logits), expected, atol=1e-4)


@pytest.mark.parametrize("folder", NETWORKS, ids=lambda folder: folder.name)
def test_a_trained_network_has_the_accuracy_of_its_record(folder):
    """The runs are those of the study, whose records the tables are made from."""
    card = ModelCard.load(folder / "README.md")
    study, row, seed = (re.search(text, card.text)[1] for text in ("`study=(.*?)`", "`row=(.*?)`", r", seed (\d+)"))
    record = json.loads((ROOT / f"analysis/results/{study}/{row}-{seed}.json").read_text())
    assert card.data.eval_results[0].metric_value == record["curve"][-1]["top1"]
    assert record["starts"][0]["commit"] in card.text


def test_the_card_of_a_run_states_the_accuracy_of_its_checkpoint(run, tmp_path):
    folder = run("crop_pct=1.0")
    curve = json.loads((folder / "run.json").read_text())["curve"]
    write(open_checkpoint(folder / "last.pt"), "timm-hf", tmp_path / "folder")
    card, opened = ModelCard.load(tmp_path / "folder/README.md"), open_checkpoint(tmp_path / "folder")
    [result] = card.data.eval_results
    assert (result.metric_value, result.dataset_name) == (curve[-1]["top1"], "pictures0")
    assert f"| Top-1, top-5 | {curve[-1]['top1']:.2f} %" in card.text
    with torch.inference_mode():
        logits = opened.model(pictures_of(card, opened))
    assert torch.allclose(logits, torch.tensor(list(logits_on(card).values())), atol=1e-4)
    record = json.loads((folder / "run.json").read_text())  # as it is while the next epoch's checkpoint is written
    (folder / "run.json").write_text(json.dumps({**record, "curve": curve[:-1]}))
    write(open_checkpoint(folder / "last.pt"), "timm-hf", tmp_path / "folder")
    assert ModelCard.load(tmp_path / "folder/README.md").data.eval_results is None


def test_the_card_of_weights_within_an_epoch_states_no_accuracy(run, tmp_path, monkeypatch):
    interrupt(monkeypatch, after=4)
    folder = run(status=128 + signal.SIGTERM)
    write(open_checkpoint(folder / "last.pt"), "timm-hf", tmp_path / "folder")
    card = ModelCard.load(tmp_path / "folder/README.md")
    assert card.data.eval_results is None
    assert "Top-1" not in card.text
    assert "| Trained | 1 of 2 epochs on 24 pictures, seed 42 |" in card.text


def test_converted_weights_beside_a_run_get_no_card(shared_run, tmp_path):
    folder = shutil.copytree(shared_run(), tmp_path / "run")
    write(open_checkpoint(folder), "ours", folder / "weights.pt")
    write(open_checkpoint(folder / "weights.pt"), "timm-hf", tmp_path / "folder")
    assert not (tmp_path / "folder/README.md").exists()


def test_a_damaged_record_of_the_run_is_refused(shared_run, tmp_path):
    folder = shutil.copytree(shared_run(), tmp_path / "run")
    (folder / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*run\.json"):
        write(open_checkpoint(folder / "last.pt"), "timm-hf", tmp_path / "folder")
