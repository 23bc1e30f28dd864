"""Counts, tables, records and figures: against torch's own counter, published figures, and wrong input."""

import json
import re
import shutil
from base64 import b64decode
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import mmdet
import modelindex
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import timm
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from timm.models import PretrainedCfg, _registry
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT
from metaformer import ABLATIONS, POOLFORMERS, InputError, open_checkpoint, records
from metaformer.analysis import count, figures, gradcam, measured, outputs, paper, tables
from metaformer.analysis.baselines import window_mlp
from metaformer.records.schema import without_machine_paths
from metaformer.training.config import load_config

PAPER = yaml.safe_load((ROOT / "analysis/paper.yaml").read_text())
TABLES = [name for name in PAPER if name.startswith("table")]


# Counting

MATRIX_OPERATORS = ("conv", "linear", "matmul", "bmm", "addmm", "scaled_dot_product_attention")


def macs_by_torch(model: nn.Module, *inputs) -> int:
    """Multiply-accumulates of convolutions, products and attention by PyTorch's own counter.

    It does not know the fused attention of a CPU, so that this is left out.
    """
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(*inputs)
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() // 2


def macs_of_matrices(counted: dict) -> int:
    return sum(macs for operator, macs in counted["macs"].items() if operator in MATRIX_OPERATORS)


@pytest.mark.parametrize(
    "name",
    [
        "poolformer_s12",
        *(f"metaformer_s12_{row}" for row in ("random", "dwconv", "ln", "bn", "nomlp", "ppaa", "ppff")),
        *("resnet18", "deit_tiny_patch16_224", "mixer_s32_224", "gmlp_ti16_224", "resmlp_12_224", "pvt_tiny"),
        "swin_mixer_tiny_d6_256",
        *("eca_resnet33ts", "mixnet_s", "swin_tiny_patch4_window7_224"),  # 1-d, padded and grouped convolutions
    ],
)
def test_macs_equal_those_of_torchs_counter(name):
    counted = count.count(name)
    model = count.build_timm(name, None)[0].to("meta")  # where nothing is computed but shapes
    assert macs_of_matrices(counted) == macs_by_torch(model, torch.zeros(1, 3, *counted["size"], device="meta"))
    learnable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted["learnable"] == learnable
    assert counted["learnable"] + counted["frozen"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        "detection/retinanet_poolformer-s12_fpn_8xb2-1x_coco.py",
        "detection/mask-rcnn_r18_fpn_8xb2-1x_coco.py",
        "segmentation/fpn_pvt-tiny_8xb4-40k_ade20k-512x512.py",
    ],
)
def test_macs_of_configs_equal_those_of_torchs_counter(config, monkeypatch):
    monkeypatch.setattr(count, "PROPOSALS", 7)
    monkeypatch.setattr(count, "MASKS", 3)
    path = str(ROOT / "configs" / config)
    counted = count.count(path, (128, 96))
    model, size = count.build_config(path, (128, 96))
    assert size == (3, 128, 96)
    images = torch.zeros(1, 3, 128, 96, device="meta")
    assert macs_of_matrices(counted) == macs_by_torch(model.to("meta"), images)
    regions = {"bbox_head": (7, 256, 7, 7), "mask_head": (3, 256, 14, 14)} if hasattr(model, "roi_head") else {}
    for head, shape in regions.items():
        macs = macs_by_torch(model.roi_head.get_submodule(head), torch.zeros(shape, device="meta"))
        assert counted["parts"][f"roi_head.{head}"]["macs"] == macs
    built = Config.fromfile(path)
    init_default_scope(built.default_scope)
    with torch.device("cpu" if "pvt" in config else "meta"):  # mmdet's PVT computes as it is built
        parameters = list(MODELS.build(built.model).parameters())
    assert counted["learnable"] + counted["frozen"] == sum(p.numel() for p in parameters)


@pytest.mark.parametrize(
    ("name", "gmacs", "device"),  # infer_gmacs of timm's results/benchmark-infer-amp-*.csv
    [
        ("poolformer_s12", 1.82, "meta"),
        ("poolformer_s24", 3.41, "meta"),
        ("poolformer_s36", 5.00, "meta"),
        ("poolformer_s12", 1.82, "cpu"),  # as with an older PyTorch
    ],
)
def test_macs_with_norms_are_timms_published_ones(name, gmacs, device, monkeypatch):
    monkeypatch.setattr(count, "DEVICE", device)
    counted = count.count(name)
    assert round(sum(counted["macs"].values()) / 1e9, 2) == gmacs
    assert sum(part["macs"] for part in counted["parts"].values()) == sum(counted["macs"].values())
    assert sum(part["parameters"] for part in counted["parts"].values()) == counted["learnable"]
    assert list(counted["parts"]) == ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "norm", "head"]
    blocks = sum(POOLFORMERS[name].arguments["depths"])
    assert counted["uncounted"]["avg_pool2d"] == counted["uncounted"]["gelu"] == blocks
    # 5 for each element of two norms a block and of the head's; LayerScale is two vectors a block
    assert counted["layer_scale"] == 2 * sum(
        depth * dim for depth, dim in zip(*(POOLFORMERS[name].arguments[k] for k in ("depths", "dims")), strict=True)
    )


@pytest.mark.parametrize("shift", [0, 3])
def test_the_windows_of_swin_mixer_go_back_to_their_places(shift):
    """What mixes nothing leaves all as it is; what averages a head's window leaves its mean, with zeros around."""
    block = SwinTransformerBlock(6, (14, 21), num_heads=2, window_size=7, shift_size=shift)
    block.attn = nn.Conv1d(2 * 49, 2 * 49, 1, groups=2)
    x = torch.randn(2, 14, 21, 6)
    with torch.no_grad():
        block.attn.bias.zero_()
        block.attn.weight[..., 0] = torch.eye(49).repeat(2, 1)
        torch.testing.assert_close(window_mlp(block, x), x)
        block.attn.weight.fill_(1 / 49)
        first = 7 if shift == 0 else shift  # the side of the first window that is not padding
        mean = x[:, :first, :first].sum((1, 2)) / 49
        torch.testing.assert_close(window_mlp(block, x)[:, 0, 0], mean)


def test_same_padding_and_transposed_convolutions_are_counted():
    model = nn.Sequential(
        nn.Conv2d(3, 4, (3, 4), padding="same", dilation=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Conv2d(6, 2, 2, padding="valid"),
    )
    images = torch.zeros(1, 3, 15, 17)
    macs, shape = macs_by_torch(model.eval(), images), model(images).shape
    model, images = model.to("meta"), images.to("meta")
    with count.traceable():
        assert count.FlopCountAnalysis(model, images).total() == macs
        assert model(images).shape == shape


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, tokens):
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def test_attention_in_one_operator_is_counted():
    model, tokens = SelfAttention().eval(), torch.zeros(1, 10, 32)
    macs = macs_by_torch(model, tokens)
    analysis = count.FlopCountAnalysis(model.to("meta"), tokens.to("meta")).set_op_handle(*count.ATTENTION)
    with count.traceable():
        assert analysis.total() == macs == 4 * 10 * 32 * 32 + 2 * 10 * 10 * 32


class MultiQuery(nn.Module):
    def forward(self, queries):
        shared = queries[:, :1].repeat(1, 1, 2, 1)  # one head, twice the positions
        return nn.functional.scaled_dot_product_attention(queries, shared, shared[..., :3])


def test_attention_of_shared_keys_and_narrow_values_is_counted():
    model, queries = MultiQuery().eval(), torch.zeros(1, 4, 10, 8)
    macs = macs_by_torch(model, queries)
    analysis = count.FlopCountAnalysis(model, queries.to("meta")).set_op_handle(*count.ATTENTION)
    with count.traceable():
        assert analysis.total() == macs == 4 * 10 * 20 * (8 + 3)


def test_models_that_compute_with_their_weights_as_they_are_built():
    model, found = count.build_timm("swinv2_tiny_window8_256", (512, 512))
    assert (3, *model.patch_embed.img_size) == found == (3, 512, 512)


@pytest.mark.parametrize("shape", [None, (1, 28, 20)])
def test_a_model_that_a_user_has_registered(shape, monkeypatch):
    channels, height, width = shape or (3, 224, 224)
    model = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.AdaptiveAvgPool2d(1))
    monkeypatch.setitem(_registry._model_entrypoints, "my_model", lambda **_: model)
    if shape:
        monkeypatch.setitem(_registry._model_pretrained_cfgs, "my_model", PretrainedCfg(input_size=shape))
    counted = count.count("my_model")
    assert (counted["size"], counted["macs"]["conv"]) == ([height, width], channels * 4 * height * width)


def test_a_count_is_kept_until_the_definition_changes(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(count, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(count, "count", lambda model: calls.append(model) or {"learnable": len(calls)})
    assert [count.cached_count("a")["learnable"] for _ in range(3)] == [1, 1, 1]
    assert count.cached_count("b")["learnable"] == 2
    shutil.copytree(ROOT / "metaformer", tmp_path / "metaformer")
    shutil.copytree(ROOT / "analysis", tmp_path / "analysis", ignore=shutil.ignore_patterns(".cache"))
    monkeypatch.setattr(count, "ROOT", tmp_path)
    assert count.cached_count("a")["learnable"] == 1
    with (tmp_path / "metaformer/mixers.py").open("a") as file:
        file.write("# changed\n")
    assert count.cached_count("a")["learnable"] == 3
    monkeypatch.setattr(count, "installed", lambda: {"fvcore": "0.0"})
    assert count.cached_count("a")["learnable"] == 4
    shutil.copytree(ROOT / "configs/detection", tmp_path / "configs/detection")
    config = "configs/detection/retinanet_poolformer-s12_fpn_8xb2-1x_coco.py"
    assert [count.cached_count(config)["learnable"] for _ in range(2)] == [5, 5]
    for number, file in enumerate([config, "configs/detection/_base_/coco_1x.py"], start=6):
        with (tmp_path / file).open("a") as text:
            text.write("# changed\n")
        assert count.cached_count(config)["learnable"] == number


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["poolformer_s112"], "there is no model 'poolformer_s112' (did you mean 'poolformer_s12'?)"),
        (["configs/detection/none.py"], "there is no config configs/detection/none.py"),
        ([ROOT / "configs/detection/_base_/coco_1x.py"], "is not the config of a model"),
        (["resnet50.a100"], "resnet50.a100 does not take these arguments: Invalid pretrained tag"),
        (["poolformer_s12", "--size", "1"], "cannot count poolformer_s12 at 1 x 1 pixels: the model must take"),
        (["poolformer_s12", "--size", "1", "2", "3"], "give one side or height and width"),
    ],
)
def test_wrong_input_to_count(arguments, says, command):
    status, _, error = command("analysis/count.py", *arguments)
    assert status == 2
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("model = dict(", "cannot read the config"),
        ("model = 1 / 0", "cannot read the config"),
        ("default_scope = 'mmdet'\nmodel = dict(type='Nothing')", "cannot build the model of"),
        ("model = dict(type='RetinaNet')", "is not the config of a model of mmdet or mmseg"),
    ],
)
def test_broken_configs(content, says, tmp_path):
    (tmp_path / "broken.py").write_text(content)
    with pytest.raises(InputError, match=says):
        count.count(str(tmp_path / "broken.py"))


@pytest.mark.parametrize("config", ["cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py", "detr/detr_r50_8xb2-150e_coco.py"])
def test_configs_that_cannot_be_counted(config):
    """Three heads for boxes, and a transformer that needs the sizes of the images before padding."""
    path = Path(mmdet.__file__).parent / ".mim/configs" / config
    with pytest.raises(InputError, match=r"cannot count .* at 800 x 1280 pixels: the model must take images of this"):
        count.count(str(path))


def test_count_prints_and_gives_json(command):
    status, out, _ = command("analysis/count.py", "metaformer_s12_random", "--size", 64, 32)
    assert status == 0
    assert "at 64 x 32" in out
    assert "frozen" in out
    status, out, _ = command("analysis/count.py", "metaformer_s12_random", "--size", 64, "--json")
    assert json.loads(out)["frozen"] == 2 * 256**2 + 2 * 64**2 + 6 * 16**2 + 2 * 4**2


# The report


class Page(HTMLParser):
    """Tables as {id of their section: rows of texts, the heading's first}; states of rows; addresses; all ids."""

    EMPTY = ("meta", "img", "input", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tables, self.states, self.addresses, self.ids, self.cell = [], {}, {}, [], [], None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "section":
            self.section = attributes["aria-labelledby"]
        elif tag == "tr":
            self.tables.setdefault(self.section, []).append([])
            self.states.setdefault(self.section, []).append(attributes.get("data-state"))
        elif tag in ("th", "td"):
            assert attributes.get("scope", "col") == ("row" if not self.tables[self.section][-1] and
                                                      len(self.tables[self.section]) > 1 else "col")  # fmt: skip
            self.cell = ""

    def handle_startendtag(self, tag, attributes):
        assert tag in ("path", "polyline")  # in SVG only; HTML ignores the slash

    def handle_data(self, text):
        if self.cell is not None:
            self.cell += text

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("th", "td"):
            self.tables[self.section][-1].append(self.cell)
            self.cell = None


def test_the_report_has_the_tables_and_needs_nothing_else():
    text = (ROOT / "analysis/report.html").read_text()
    page = Page(text)
    assert page.tables.keys() == outputs.TABLES.keys()
    for name, rows in page.tables.items():
        lines = (ROOT / f"analysis/tables/{name}.md").read_text().splitlines()
        head, _, *body = [line for line in lines if line.startswith("|")]
        assert rows == [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *body)], name
    assert all(address.startswith(("data:image/svg+xml;base64,", "#")) for address in page.addresses)
    assert {address[1:] for address in page.addresses if address[0] == "#"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|://", text)
    # The number by which the page sorts a cell
    number = re.compile(re.search(r"\(/(\^.*?)/\.exec", text)[1])
    assert [number.match(cell)[0] for cell in ("1.1e-14", "+1,234.5 (1 to 2)", "-0.3 ± 0.1", "50 %")] == [
        *("1.1e-14", "+1,234.5", "-0.3", "50"),
    ]
    images = [b64decode(address.partition(",")[2]) for address in page.addresses if address.startswith("data:")]
    drawn = [name for name, make in figures.FIGURES.items() if make()]
    assert images == [(ROOT / f"analysis/figures/{name}.svg").read_bytes() for name in drawn]


def test_the_report_tells_measured_rows():
    page = Page((ROOT / "analysis/report.html").read_text())
    summaries = re.findall(r"^- (\w+): (.*)", (ROOT / "analysis/README.md").read_text(), re.MULTILINE)
    for name, summary in summaries:
        found = [page.states[name].count(state) for state in ("measured", "not run")]
        kinds = {kind: int(count) for count, kind in re.findall(r"(\d+) ([a-z ]+)", summary)}
        if name in ("table3", "fastest"):  # several such cells in each row
            assert sum(found) == kinds["rows"]
        elif name == "conclusions":
            head, *rows = page.tables[name]
            missing = [row[head.index("verdict")] for row in rows].count("not run")
            assert found == [kinds["rows"] - missing, missing]
        else:
            assert found == [kinds.get("measured", 0), kinds.get("not run", 0)], name


def test_curves_of_a_study_in_the_report():
    """A run in two panels where it is the baseline's; the scale ends at tens around all values."""
    epochs = [[40.0, 50.0, 55.0], [20.0, 30.0, 35.0], []]
    runs = [("baseline", 0, "finished"), ("identity", 0, "finished"), ("identity", 1, "diverged")]
    records_ = [
        SimpleNamespace(
            settings=SimpleNamespace(row=row), curve=[SimpleNamespace(top1=value) for value in values], status=status
        )
        for (row, _, status), values in zip(runs, epochs, strict=True)
    ]
    results = SimpleNamespace(
        study=SimpleNamespace(title="A study"),
        records=records_,
        runs=pd.DataFrame(
            [("baseline", 0, 55.0, False), ("identity", 1, 10.0, True), ("identity", 0, 35.0, False)],
            columns=["row", "seed", "top1", "diverged"],
        ),
    )
    drawn = outputs.curves("small", results)
    assert (drawn["low"], drawn["high"], drawn["last"]) == (20, 60, 3)
    baseline, identity = drawn["panels"]
    assert baseline["lines"] == baseline["baseline"] == identity["baseline"] == ["0.0,50.0 100.0,25.0 200.0,12.5"]
    assert identity["lines"] == ["0.0,100.0 100.0,75.0 200.0,62.5"]
    assert (identity["top1"], identity["diverged"]) == ("35.0, 10.0", 1)


# The metafile


def test_openmmlabs_reader_takes_the_metafile():
    index = modelindex.load(str(ROOT / "model-index.yml"))
    assert index.check(silent=True) == []
    index.build_models_with_collections()
    models = {model.name: model for model in index.models}
    assert models.keys() == POOLFORMERS.keys() | ABLATIONS.keys()
    for name, model in models.items():
        assert load_config([str(ROOT / model.config), "data_dir=data"]).model == name
        with torch.device("meta"):
            assert model.metadata.parameters == sum(p.numel() for p in timm.create_model(name).parameters())
        assert model.data.get("Weights", "") == timm.get_pretrained_cfg(name).url
    # mmpretrain's metafile of these models; its FLOPs are by another count.
    published = {"s12": 11915176, "s24": 21388968, "s36": 30862760, "m36": 56172520, "m48": 73473448}
    assert {size: models[f"poolformer_{size}"].metadata.parameters for size in published} == published
    assert models["poolformer_s12"].results[0].metrics["Top 1 Accuracy"] == 77.2


# The paper as data


def test_paper_yaml_names_its_sources_and_recalls_nothing():
    text = (ROOT / "analysis/paper.yaml").read_text()
    assert "recalled" not in text
    for name in [*TABLES, "claims"]:
        table = PAPER[name]
        assert table["confidence"] == "quoted"
        for row in [table, *table["rows"]]:
            explained = row.get("explained", {})
            explanations = [explained] if "text" in explained else list(explained.values())
            for source in sum((e.get("source", []) for e in [row, *explanations]), row.get("xcheck", [])):
                assert source.partition(" ")[0] in PAPER["sources"], (name, row)
            for explanation in explanations:
                checked = not str(explanation["as"]).startswith("counted")
                assert explanation.get("source") or checked, row


def test_no_text_of_a_claim_is_cut():
    """An unquoted comma in it would begin a key without a value."""
    assert not [row for row in PAPER["claims"]["rows"] if None in row.values()]


def test_every_model_and_config_is_a_row():
    builds = {name: {row["build"] for row in paper.rows_of(name) if "build" in row} for name in TABLES}
    assert builds["table1"] == POOLFORMERS.keys()
    assert builds["table2"] >= POOLFORMERS.keys()
    assert builds["table5"] == ABLATIONS.keys() | {"poolformer_s12"}
    configs = {str(path.relative_to(ROOT)) for path in ROOT.glob("configs/*/*_*x*.py")}
    assert builds["table3"] | builds["table4"] == configs
    assert [len(PAPER[name]["rows"]) for name in TABLES] == [5, 27, 12, 14, 18, 25, 8]


def test_the_recipes_expect_what_the_paper_prints():
    for table, folder in (("table2", "classification"), ("table5", "ablations")):
        for row in paper.rows_of(table):
            config = ROOT / f"configs/{folder}/{row.get('build')}.yaml"
            if config.is_file():
                assert yaml.safe_load(config.read_text())["expected_top1"] == row["top1"]


def test_the_stages_of_table_1_are_the_models():
    model = timm.create_model("poolformer_s12")
    for row, stage in zip(PAPER["table1"]["stages"], model.stages, strict=True):
        conv = stage.downsample if isinstance(stage.downsample, nn.Conv2d) else model.stem
        block = stage.blocks[0]
        assert conv.kernel_size == (row["patch"],) * 2
        assert conv.stride == (row["stride"],) * 2
        assert conv.padding == (row["padding"],) * 2
        assert block.token_mixer.pool.kernel_size == row["pool"]
        assert block.mlp.fc1.out_channels == row["mlp_ratio"] * block.mlp.fc1.in_channels
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert dropouts == [0]  # the classifier's; Table 6 has no other either


# Verdicts


@pytest.mark.parametrize(
    ("printed", "explained", "kind"),
    [
        (12.3, None, "equal"),
        (12, None, "equal"),
        (12.35, None, "equal"),
        (12.2, None, "unexplained"),
        (12.2, {"text": "because", "as": "counted 12.3"}, "explained"),
        (12.2, {"text": "because", "as": "counted 12.4"}, "unexplained"),
        (12.2, {"text": "because", "as": "truncated"}, "unexplained"),
        (12.34, {"text": "because", "as": "truncated"}, "explained"),
        (12.1, {"text": "because", "as": "without layer_scale"}, "explained"),
        (12.0, {"text": "because", "as": "without layer_scale"}, "unexplained"),
        (12.4, {"text": "because", "as": "rounded from 12.35"}, "explained"),
        (12.4, {"text": "because", "as": "rounded from 12.36"}, "unexplained"),
    ],
)
def test_verdicts(printed, explained, kind, monkeypatch):
    counts = {"learnable": 12_346_000, "frozen": 0, "layer_scale": 250_000, "macs": {"conv": 10**9}}
    monkeypatch.setattr(paper, "cached_count", lambda build: counts)
    cell = paper.compare({"build": "x", "params": printed, "explained": {"params": explained}}, "params")
    assert cell["verdict"].kind == kind
    digits = len(str(printed).partition(".")[2]) + 2
    assert Decimal(str(cell["counted"])) == round(Decimal("12.346"), digits)
    assert Decimal(str(cell["difference"])) == round(Decimal("12.346") - Decimal(str(printed)), digits)
    assert str(cell["difference"]).startswith(("+", "-"))


@pytest.mark.parametrize(("rate", "kind"), [(4e-4, "equal"), (4e-3, "explained"), (4e-2, "unexplained")])
def test_another_setting_than_the_explained_one_is_unexplained(rate, kind, monkeypatch):
    own = tables.recipe
    monkeypatch.setattr(tables, "recipe", lambda size: {**own(size), "peak_lr": rate})
    rows = {row["setting"]: row for row in tables.table6(None).rows}
    assert (rows["peak_lr"]["verdict"].kind, rows["auto_augment"]["verdict"].kind) == (kind, "explained")


def test_half_is_rounded_up_on_exact_numbers(monkeypatch):
    counts = {"learnable": 12_250_000, "frozen": 0, "macs": {"conv": 2_450_000_000}}
    monkeypatch.setattr(paper, "cached_count", lambda build: counts)
    assert paper.compare({"build": "x", "params": 12.3}, "params")["verdict"].kind == "equal"
    assert paper.compare({"build": "x", "macs": 2.5}, "macs")["verdict"].kind == "equal"


# The command, in a copy of what it reads and writes


@pytest.fixture
def root(tmp_path, monkeypatch):
    for file in ["analysis/paper.yaml", "analysis/captions.yaml", "README.md", *(f"{task}/README.md" for task in
                 ("analysis", "classification", "detection", "segmentation"))]:  # fmt: skip
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    shutil.copytree(ROOT / "configs/classification", tmp_path / "configs/classification")
    (tmp_path / "analysis/results").mkdir()
    for module in (outputs, paper, tables):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    paper.paper.cache_clear()
    yield tmp_path
    paper.paper.cache_clear()


@pytest.fixture
def make_tables(command):
    return lambda *arguments: command("analysis/make_tables.py", *arguments)


def evaluation(model="poolformer_s12", top1=77.0, file="best.pt", epochs=300, sha256="0" * 64, **changes) -> dict:
    """A record as validate.py writes it, of ImageNet-1K unless changed."""
    return {
        "kind": "classification",
        "model": model,
        "checkpoint": {"file": file, "sha256": sha256},
        "training": {"epochs": epochs, "seed": 0},
        "data": {"dataset": "folder", "data_dir": "imagenet", "classes": 1000, "val_images": 50000},
        "settings": {"img_size": 224, "crop_pct": 0.9, "precision": "float32"},
        "metrics": {"top1": top1, "top5": 93.0, "loss": 1.0, "images": 50000, "images_per_s": 100.0},
        "command": "python classification/validate.py run",
        "commit": "0" * 40,
        "versions": {"torch": "2.14.0", "cuda": None},
        "hardware": {"cpu": "a", "cores": 2, "gpus": []},
        "date": "2026-01-01T00:00:00+00:00",
        **changes,
    }


def common() -> dict:
    return {key: evaluation()[key] for key in ("command", "commit", "versions", "hardware", "date")}


def toolbox_record(task: str, model: str, data: dict, metrics: dict, tta: bool = False, **changes) -> dict:
    """A record as ResultRecord writes it, with changes of its settings."""
    config = Config.fromfile(ROOT / f"configs/{task}/{model}.py")
    pipeline = config.tta_pipeline if tta else config.test_dataloader.dataset.pipeline
    config.model.backbone.init_cfg = None
    evaluator = {name: value for name, value in config.test_evaluator.items() if name != "ann_file"}
    settings = {
        **{"seed": 0, "gpus": 0, "model": config.model, "pipeline": pipeline, "batch_size": 1},
        **{"loop": {"type": "TestLoop"}, "evaluators": [evaluator], **changes},
    }
    return {
        **{"kind": task, "model": model, "checkpoint": evaluation()["checkpoint"], "data": data, "metrics": metrics},
        **{"settings": json.loads(json.dumps(settings)), **common()},
    }


def detection(metrics: dict, **changes) -> dict:
    data = {"images": 5000, "classes": 80}
    return toolbox_record("detection", "mask-rcnn_poolformer-s12_fpn_8xb2-1x_coco", data, metrics, **changes)


def other_threshold() -> dict:
    record = detection({"coco/bbox_mAP": 0.371})
    record["settings"]["model"]["test_cfg"]["rcnn"]["score_thr"] = 0.001
    return record


def segmentation(metrics: dict, **changes) -> dict:
    data = {"images": 2000, "classes": 150}
    return toolbox_record("segmentation", "fpn_poolformer-s12_8xb4-40k_ade20k-512x512", data, metrics, **changes)


TRAINING = {
    **{"kind": "training", "model": "poolformer_s24", "data": {"classes": 1000}, "devices": 8, "seed": 0},
    **{"images_per_s": 8000.0, "settings": {"img_size": 224}},
}


def put(root: Path, name: str, record: dict | str) -> Path:
    path = root / "analysis/results" / f"{name}.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path


def table(root: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(root / f"analysis/tables/{name}.csv", dtype=str)


def test_writes_all_tables_and_then_nothing_changes(root, make_tables):
    status, out, _ = make_tables()
    assert status == 0
    lines = out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *TABLES,
        "claims",
        "cost",
        "speed",
        "fastest",
        "loader",
        "proxy",
        "conclusions",
        "faults",
        "parity",
    ]
    assert len(list((root / "analysis/tables").iterdir())) == 3 * len(lines)
    for line in lines:
        assert line in (root / "analysis/README.md").read_text()
    for file in (root / "configs/ablations").iterdir():
        assert file.read_text() == (ROOT / "configs/ablations" / file.name).read_text()
    assert make_tables("--check")[0] == 0

    # Published: what the counts must reproduce, and the one figure that nobody could explain.
    unexplained = [
        (name, row[0], column)
        for name in TABLES
        for row in table(root, name).itertuples(index=False)
        for column, cell in zip(table(root, name).columns, row, strict=True)
        if str(cell).startswith("unexplained")
    ]
    assert unexplained == [("table2", "ViT-L/16", "MACs, G (verdict)")]
    ablation = table(root, "table5").set_index("model")
    assert (ablation["parameters, M (verdict)"] == "equal").all()
    assert ablation["MACs, G (verdict)"].str.startswith("equal").sum() == 17
    assert ablation["top-1, % (here)"].eq("not run").all()
    claims = table(root, "claims").set_index("claim")
    false = claims.index[claims["printed figures agree"] == "false"]
    assert set(false) == {"pool size 9 loses 0.5 points", "2000 epochs gain 1.8 points"}
    assert claims.loc["M36 has 50 % fewer MACs than DeiT-B", "printed figures"] == "1 - 8.8 / 17.5 = 49.7 %"

    path = root / "analysis/paper.yaml"
    path.write_text(path.read_text().replace("top1: 82.5", "top1: 82.6"))
    paper.paper.cache_clear()
    status, _, error = make_tables("table2", "--check")
    assert status == 1
    assert "out of date: analysis/tables/table2.md" in error


def test_a_record_fills_the_cells_of_its_row(root, make_tables):
    put(root, "a", evaluation(top1=77.0))
    put(root, "b", evaluation(top1=77.4, sha256="1" * 64))
    put(root, "c", evaluation(top1=77.24, file="poolformer_s12.pth.tar", training=None))
    put(root, "d", evaluation(top1=78.83, epochs=2000, sha256="2" * 64))
    assert make_tables("table2", "table5", "table7", "--format", "csv")[0] == 0
    half = scipy.stats.t.ppf(0.975, 1) * scipy.stats.sem([77.0, 77.4])
    both = f"77.2 ± {half:.1f} (95 %) of 2 runs (best.pt); 77.2 (poolformer_s12.pth.tar)"
    assert table(root, "table2").set_index("model").loc["PoolFormer-S12", "top-1, % (here)"] == both
    assert table(root, "table5").set_index("model").loc["poolformer_s12", "top-1, % (here)"] == both
    longer = table(root, "table7").set_index("epochs")["top-1, % (here)"]
    assert (longer["300"], longer["2000"], longer["400"]) == (both, "78.8 (best.pt)", "not run")
    assert not (root / "analysis/tables/table2.md").exists()
    assert f"| {both} " in (root / "README.md").read_text()


def test_records_of_detection_segmentation_and_training(root, make_tables):
    put(root, "det", detection({"coco/bbox_mAP": 0.371, "coco/bbox_mAP_50": 0.59, "coco/segm_mAP": 0.344}))
    put(root, "seg", segmentation({"mIoU": 37.01, "aAcc": 70.0}))
    put(root, "speed", {**TRAINING, "starts": [common()]})
    assert make_tables("table3", "table4", "cost", "--format", "csv")[0] == 0
    row = table(root, "table3").set_index(["head", "backbone"]).loc["Mask R-CNN", "PoolFormer-S12"]
    assert (row["AP, % (here)"], row["mask AP, % (here)"]) == ("37.1 (best.pt)", "34.4 (best.pt)")
    assert row["AP75, % (here)"] == "not run"
    row = table(root, "table4").set_index("backbone").loc["PoolFormer-S12"]
    assert row["mIoU, % (here)"] == "37.0 (best.pt)"
    row = table(root, "cost").set_index(["table", "row"]).loc["table2", "PoolFormer-S24"]
    assert row["images/s per device"] == "1,000.0"
    assert row["device-hours"] == f"{300 * 1281167 / 1000 / 3600:,.0f}"


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("{", "cannot read "),
        ("[1]", "it holds a list, not a mapping"),
        ({"kind": "poem"}, "is not a result record: kind"),
        (evaluation(metrics={"top1": None, "images": 50000}), "metrics.top1: Input should be a valid number"),
        (evaluation(data={"classes": "many"}), "data.classes: Input should be a valid integer"),
        (evaluation(metrics={"top1": float("nan"), "top5": 99, "images": 50000}), "metrics.top1"),
        (detection({"coco/segm_mAP_50": float("nan")}), "metrics.coco/segm_mAP_50: Input should be a finite number"),
        (segmentation({"mIoU": float("nan")}), "metrics.mIoU: Input should be a finite number"),
        (segmentation({"mIoU": 39.0}, tta=True), "settings.pipeline is not that of configs/segm"),
        *(
            (detection({"coco/bbox_mAP": 0.5}, **change), f"settings.{part} is not that of configs/detection/mask-rcnn")
            for part, change in (
                (
                    "evaluators",
                    {"evaluators": [{"type": "CheckedCocoMetric", "metric": ["bbox", "segm"], "iou_thrs": [0.5]}]},
                ),
                ("batch_size", {"batch_size": 8}),
                ("loop", {"loop": {"type": "TestLoop", "fp16": True}}),
            )
        ),
        (other_threshold(), "settings.model is not that of configs/detection/mask-rcnn_poolformer-s12"),
        ({**segmentation({"mIoU": 39.0}), "settings": {}}, "settings.model is not that of configs/segm"),
        (evaluation(model="poolformer_s21"), "model 'poolformer_s21' is in no table (did you mean 'poolformer_s"),
        (evaluation(data={"classes": 10}), "data.classes is 10, but table2 has 1000"),
        (
            evaluation(metrics={"top1": 7.5, "top5": 10, "images": 40}),
            "images is 40.0, but table2 has 50000",
        ),
        (evaluation(settings={"img_size": 128}), "settings.img_size is 128, but table2 has 224"),
        (evaluation(settings={"img_size": 224, "crop_pct": 1.0}), "settings.crop_pct is 1.0, but table2 has 0.9"),
        (
            evaluation(settings={"img_size": 224, "interpolation": "bilinear"}),
            "settings.interpolation is bilinear, but table2 has bicubic",
        ),
        (evaluation(settings={"img_size": 224, "mean": [0.5, 0.5, 0.5]}), "settings.mean is [0.5, 0.5, 0.5], but"),
        (evaluation(settings={"img_size": 224, "model_args": {"dims": [8]}}), "settings.model_args is {'dims': [8]}"),
        (evaluation(epochs=7), "training.epochs is 7, but the paper has [300, 400, 500, 1000, 1500, 2000, 2500, 3000]"),
        (evaluation(model="poolformer_s24", epochs=400), "training.epochs is 400, but the paper has [300] for this"),
        (
            evaluation(model="deit_small_patch16_224", settings={"img_size": 224, "crop_pct": 1.0}),
            "settings.crop_pct is 1.0, but table2 has 0.9",
        ),
        (
            evaluation(model="fpn_r50_8xb4-40k_ade20k-512x512", data={"classes": 150}),
            "kind is classification, but table4 has segmentation",
        ),
    ],
)
def test_a_wrong_record_is_named(record, says, root):
    path = put(root, "wrong", record)
    put(root, "right", evaluation(top1=77.1))
    with pytest.raises(InputError) as error:
        measured.Measured(root / "analysis/results")
    assert str(path) in str(error.value)
    assert says in str(error.value)


def test_no_tables_are_made_with_a_wrong_record(root, make_tables):
    path = put(root, "wrong", "{")
    put(root, "right", evaluation(top1=77.1))
    status, _, error = make_tables("table2", "--format", "csv")
    assert (status, error.count("\n")) == (2, 1)
    assert f"error: cannot read {path}: " in error
    assert not (root / "analysis/tables").exists()


def test_the_same_weights_evaluated_again_are_no_further_run(root):
    later = {"date": "2026-02-01T00:00:00+00:00"}
    put(root, "a", evaluation(top1=77.0))
    put(root, "b", evaluation(top1=77.2, **later))
    put(root, "c", {**TRAINING, "starts": [common()], "images_per_s": 100.0})
    put(root, "d", {**TRAINING, "starts": [common(), {**common(), **later}], "images_per_s": 110.0})
    found = measured.Measured(root / "analysis/results")
    assert str(found.accuracy("poolformer_s12", "top1")) == "77.2 (best.pt)"
    assert [record.images_per_s for record in found.of_model("training", "poolformer_s24")] == [110.0]


def test_runs_that_agree_have_no_interval(root):
    """mmdet rounds its accuracies to thousandths."""
    for name in "ab":
        record = detection({"coco/bbox_mAP": 0.371})
        put(root, name, {**record, "checkpoint": {"file": "epoch_12.pth", "sha256": 64 * name}})
    found = measured.Measured(root / "analysis/results")
    assert str(found.accuracy(record["model"], "coco/bbox_mAP")) == "37.1 of 2 runs (epoch_12.pth)"


def test_a_run_of_another_recipe_is_named_and_not_averaged(root):
    own = load_config([str(ROOT / "configs/classification/poolformer_s12.yaml")]).model_dump(mode="json")
    for i, changes in enumerate(
        [{}, {"device_batch": 64, "seed": 1}, {"layer_decay": 0.7, "lr": 1e-3, "opt_eps": 0.1, "pretrained": True}]
    ):
        put(root, str(i), evaluation(top1=77.0 + 2 * i, sha256=64 * str(i), training={**own, **changes}))
    first, second = str(measured.Measured(root / "analysis/results").accuracy("poolformer_s12", "top1")).split("; ")
    assert re.fullmatch(r"78\.0 ± .* \(95 %\) of 2 runs \(best\.pt\)", first)
    assert second == "81.0 (best.pt, layer_decay=0.7, lr=0.001, opt_eps=0.1, pretrained=True)"


def test_runs_of_a_baseline_are_averaged_where_the_recipe_is_the_same(root):
    own = load_config([str(ROOT / "configs/classification/imagenet.yaml")]).model_dump(mode="json")
    settings = {"img_size": 224, "crop_pct": 0.95}
    for i, changes in enumerate([{}, {}, {"lr": 0.1}, {"train_split": "val"}]):
        training = {**own, "model": "resnet18", **changes}
        put(root, str(i), evaluation("resnet18", 70.0 + i, sha256=64 * str(i), training=training, settings=settings))
    shown = str(measured.Measured(root / "analysis/results").accuracy("resnet18", "top1"))
    assert re.fullmatch(
        r"70\.5 ± .* of 2 runs \(best\.pt\); 72\.0 \(best\.pt, lr=0\.1\); 73\.0 \(.*train_split=val\)", shown
    )


def test_weights_of_timm_are_shown_in_the_row_of_their_model(root):
    for i, tag in enumerate(("", ".a2_in1k")):
        of = {"model": f"resnet50{tag}", "file": f"resnet50{tag}", "sha256": None, "training": None}
        put(root, str(i), evaluation(top1=79.0 + i, settings={"img_size": 224, "crop_pct": 0.95}, **of))
    found = measured.Measured(root / "analysis/results")
    assert str(found.accuracy("resnet50", "top1")) == "79.0 (resnet50); 80.0 (resnet50.a2_in1k)"


def test_sizes_without_objects_have_no_accuracy(root):
    put(root, "det", detection({"coco/bbox_mAP": 0.371, "coco/bbox_mAP_s": -1.0}))
    found = measured.Measured(root / "analysis/results")
    model = "mask-rcnn_poolformer-s12_fpn_8xb2-1x_coco"
    assert str(found.accuracy(model, "coco/bbox_mAP")) == "37.1 (best.pt)"
    assert str(found.accuracy(model, "coco/bbox_mAP_s")) == "not run"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["table22"], "there is no table 'table22' (did you mean 'table2'?)"),
        (["table2", "--format", "html"], "there is no format 'html'"),
    ],
)
def test_wrong_arguments_to_make_tables(arguments, says, root, make_tables):
    status, _, error = make_tables(*arguments)
    assert status == 2
    assert says in error
    assert not (root / "analysis/tables").exists()


def test_a_readme_without_its_section_is_named(root, make_tables):
    (root / "README.md").write_text("nothing")
    status, _, error = make_tables("table2")
    assert status == 2
    assert "README.md has no section 'imagenet'" in error


# Records of runs


def test_runs_become_records(shared_run, command, tmp_path):
    folder = shutil.copytree(shared_run(), tmp_path / "run")
    assert command("classification/validate.py", folder)[0] == 0
    targets = records.import_records([folder], tmp_path / "results")
    names = [re.sub(r"-\d{8}T\d{6}-[0-9a-f]{6}.json$", "", path.name) for path in targets]
    assert sorted(names) == ["classification-poolformer_s12", "training-poolformer_s12"]
    assert records.import_records([folder], tmp_path / "results") == targets  # the same again are the same files
    for target in targets:
        record = records.read_record(target)
        assert record.model == "poolformer_s12"
        assert str(tmp_path.parent) not in target.read_text()  # the folder of all tests
        assert "/" not in json.loads(target.read_text())["data"]["data_dir"]
    evaluated = next(records.read_record(path) for path in targets if path.name.startswith("class"))
    assert evaluated.training.epochs == 2
    with pytest.raises(InputError, match="there are no records in"):
        records.import_records([tmp_path / "results/none"])


def test_paths_of_the_machine_are_cut(tmp_path):
    cut = without_machine_paths
    assert cut("python /home/me/x/validate.py run data_dir=/data/imagenet/ --a=~/b") == (
        "python validate.py run data_dir=imagenet --a=b"
    )
    assert cut({"a": ["/x/y", 3, None], "b": "configs/detection/x.py"}) == {
        "a": ["y", 3, None],
        "b": "configs/detection/x.py",
    }
    for kept in ("https://github.com/sail-sg/poolformer/a.pth", "2.1 and/or 3", "rand-m9-mstd0.5-inc1"):
        assert cut(kept) == kept


def test_records_of_the_same_second_are_both_kept(tmp_path):
    for seed in (0, 1):
        record = evaluation(model="hf_hub:a/b", training={"epochs": 300, "seed": seed})
        (tmp_path / f"{seed}.json").write_text(json.dumps(record))
    assert len(records.import_records([tmp_path / "0.json", tmp_path / "1.json"], tmp_path / "results")) == 2
    assert len(list((tmp_path / "results").glob("classification-hf_hub-a-b-*.json"))) == 2


def test_another_run_of_a_row_and_seed_does_not_replace_the_first(tmp_path):
    settings = {"study": "cifar10", "row": "baseline"}
    first = {**TRAINING, "settings": settings, "curve": [{"top1": 50.0}], "starts": [common()]}
    (tmp_path / "first.json").write_text(json.dumps(first))
    (tmp_path / "other.json").write_text(json.dumps({**first, "starts": [{**common(), "date": "2026-02-02"}]}))
    for _ in range(2):
        (target,) = records.import_records([tmp_path / "first.json"], tmp_path / "results")
    for given in ([tmp_path / "other.json"], [tmp_path / "first.json", tmp_path / "other.json"]):
        with pytest.raises(InputError, match=r"other.json and .*baseline-0.json are different runs"):
            records.import_records(given, tmp_path / "results")
    assert json.loads(target.read_text()) == first


def test_a_damaged_run_of_a_study_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    for content in ("[1]", "{"):
        (tmp_path / "baseline-0").mkdir(exist_ok=True)
        (tmp_path / "baseline-0/run.json").write_text(content)
        with pytest.raises(InputError, match=r"cannot read .*run\.json: "):
            records.import_records([tmp_path], tmp_path / "results")


def test_import_is_all_or_nothing(tmp_path):
    (tmp_path / "good.json").write_text(json.dumps(evaluation()))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"bad.json is not a result record: kind"):
        records.import_records([tmp_path / "good.json", tmp_path / "bad.json"], tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_the_command_refuses_what_the_tables_cannot_show(tmp_path, command):
    """A run on other data, as `make demo` leaves it; nothing is copied, neither of a study that does not exist."""
    results = ROOT / "analysis/results"
    before = sorted(results.rglob("*"))
    (tmp_path / "good.json").write_text(json.dumps(evaluation()))
    other = {**TRAINING, "starts": [common()], "model": "street"}
    study = {**TRAINING, "starts": [common()], "settings": {"study": "none", "row": "baseline"}, "curve": [{"top1": 1}]}
    for record, says in (
        (evaluation(data={"classes": 10}), "data.classes is 10, but table2 has 1000"),
        (other, "model 'street' is in no table"),
        (study, "none"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(record))
        status, _, error = command("analysis/records.py", tmp_path / "good.json", tmp_path / "bad.json")
        assert status == 2
        assert says in error
        assert sorted(results.rglob("*")) == before


# Figures


def test_figures_show_the_tables(tmp_path, command):
    assert command("analysis/make_figures.py", "--out", tmp_path)[0] == 0
    drawn = ["fig1b", "fig3", "ablation", "proxy", *(["growth"] if figures.growth() else [])]
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    for path in tmp_path.glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 10
    figure = figures.fig1b()
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    assert lines.keys() == {"PoolFormer", "DeiT", "ResMLP", "RSB-ResNet"}
    assert lines["PoolFormer"][:, 1].tolist() == [77.2, 80.3, 81.4, 82.1, 82.5]
    assert lines["PoolFormer"][:, 0].round(1).tolist() == [1.8, 3.4, 5.0, 8.8, 11.6]
    macs, parameters = figures.fig3().axes
    assert len(macs.lines) == len(parameters.lines) == 27


def test_curves_of_runs(shared_run, command, tmp_path):
    folder = shutil.copytree(shared_run(), tmp_path / "run")
    assert command("analysis/make_figures.py", "--runs", folder, "--out", tmp_path / "figures")[0] == 0
    assert (tmp_path / "figures/curves.png").is_file()
    table = pd.read_csv(folder / "metrics.csv")
    loss, accuracy = figures.curves([folder]).axes
    assert loss.lines[0].get_ydata().tolist() == table["train_loss"].tolist()
    assert accuracy.lines[0].get_ydata().tolist() == table["top1"].tolist()

    log = tmp_path / "work/20260101_000000/vis_data/scalars.json"
    log.parent.mkdir(parents=True)
    lines = [
        {"loss": 2.0, "epoch": 1, "iter": 10, "step": 10},
        {"loss": 1.0, "epoch": 1, "iter": 20, "step": 20},
        {"coco/bbox_mAP": 0.25, "step": 1},
    ]
    log.write_text("\n".join(map(json.dumps, lines)))
    loss, accuracy = figures.curves([tmp_path / "work"]).axes
    assert loss.lines[0].get_xydata().tolist() == [[10, 2.0], [20, 1.0]]
    assert accuracy.lines[0].get_xydata().tolist() == [[20, 25.0]]
    with pytest.raises(InputError, match="draw them in two figures"):
        figures.curves([folder, tmp_path / "work"])
    (folder / "metrics.csv").write_text("")
    log.write_text('{"loss": 2.0, "ite')
    for damaged in (folder, tmp_path / "work"):
        with pytest.raises(InputError, match=f"cannot draw the run {damaged}: "):
            figures.curves([damaged])


def test_a_folder_that_cannot_be_written_is_named(command):
    status, _, error = command("analysis/make_figures.py", "ablation", "--out", "/dev/null/figures")
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("error: cannot write /dev/null/figures/ablation.png")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fig1"], "there is no figure 'fig1' (did you mean 'fig1b'?)"),
        (["curves"], "curves and --runs FOLDER... go together"),
        (["fig3", "--runs", "x"], "curves and --runs FOLDER... go together"),
        (["--runs", "nowhere"], "nowhere is no run"),
    ],
)
def test_wrong_arguments_to_make_figures(arguments, says, tmp_path, command):
    status, _, error = command("analysis/make_figures.py", *arguments, "--out", tmp_path)
    assert (status, says in error, error.count("\n")) == (2, True, 1)


# Grad-CAM


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def weights(path: Path, name: str) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-4:  # ResMLP and LayerScale start with next to nothing
                parameter.uniform_(0.5, 1)
    torch.save(model.state_dict(), path / f"{name}.pt")
    return path / f"{name}.pt"


def test_gradcam_is_the_gradient_weighted_sum_of_the_papers_layer(picture, tmp_path):
    """By the definition, from the activations and gradients of the last stage."""
    model = open_checkpoint(weights(tmp_path, "poolformer_s12"), "poolformer_s12").model
    pixels = gradcam.read_picture(picture)
    assert pixels.shape == (224, 224, 3)
    (overlay,) = gradcam.cam_of("poolformer_s12", model, [pixels])
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    images = ((torch.from_numpy(pixels) - mean) / std).permute(2, 0, 1)[None]
    features = model.forward_features(images).detach().requires_grad_()
    logits = model.forward_head(features)
    logits[0, logits.argmax()].backward()
    cam = (features.grad.mean((2, 3), keepdim=True) * features).sum(1).relu()[0].detach().numpy()
    cam = (cam - cam.min()) / (1e-7 + cam.max() - cam.min())
    cam = gradcam.cv2.resize(cam, (224, 224))
    expected = gradcam.show_cam_on_image(pixels, cam, use_rgb=True)
    assert np.abs(overlay.astype(int) - expected).max() <= 2


def test_gradcam_turns_pictures_as_the_camera_says(tmp_path):
    upright, exif = Image.linear_gradient("L").convert("RGB"), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    turned, expected = (gradcam.read_picture(tmp_path / f"{name}.png") for name in ("turned", "upright"))
    assert np.array_equal(turned, expected)


def test_gradcam_takes_the_upper_half_of_greys_of_16_bits(tmp_path):
    grey = Image.linear_gradient("L")
    grey.save(tmp_path / "8.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "16.png")
    found, expected = (gradcam.read_picture(tmp_path / f"{bits}.png") for bits in (16, 8))
    assert np.array_equal(found, expected)


def test_gradcam_names_pictures_that_pillow_refuses(picture, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"cannot read the picture .*picture\.png: Image size \(4800 pixels\) exceeds"):
        gradcam.read_picture(picture)


def test_gradcam_shows_a_run_the_pictures_that_it_was_trained_on(shared_run, picture):
    """TINY's pictures have 32 pixels; at 224 the maps would be those of another network."""
    folder = shared_run()
    (overlay,) = gradcam.maps("poolformer_s12", folder, [picture])
    opened = open_checkpoint(folder)
    (expected,) = gradcam.cam_of("poolformer_s12", opened.model, [gradcam.read_picture(picture, (32, 32))])
    assert overlay.shape == (32, 32, 3)
    assert np.array_equal(overlay, expected)


def test_tokens_become_maps_in_reading_order():
    """A map of 2 x 8 has as many positions as one of 4 x 4."""
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=(32, 128), depth=1)
    layer, reshape = gradcam.target_layer("deit", model, (32, 128))
    assert layer is model.blocks[-1].norm1
    tokens = torch.arange(2 * (2 + 2 * 8) * 4).view(2, 18, 4)
    maps = reshape(tokens)
    assert maps.shape == (2, 4, 2, 8)
    assert torch.equal(maps[1, :, 1, 3], tokens[1, 2 + 8 + 3])


def test_gradcam_is_for_rgb_images():
    with pytest.raises(InputError, match="grey takes images of 1 channels"):
        gradcam.target_layer("grey", timm.create_model("test_resnet", in_chans=1), (64, 64))


def test_gradcam_draws_the_papers_models(picture, tmp_path, command):
    names = ("resnet18", "deit_tiny_patch16_224", "resmlp_12_224", "poolformer_s12")  # of the papers' kinds
    given = [f"{name}={weights(tmp_path, name)}" for name in names]
    out = tmp_path / "out" / "cam"  # matplotlib alone would add a suffix
    arguments = [picture, "--models", *names, "--weights", *given, "--out", out]
    assert command("analysis/gradcam.py", *arguments)[0] == 0
    assert np.asarray(Image.open(out).convert("L")).std() > 10
    with torch.device("meta"):
        layers = [gradcam.target_layer(name, timm.create_model(name), (224, 224)) for name in gradcam.PAPER]
    assert [type(layer).__name__ for layer, _ in layers] == ["Bottleneck", "LayerNorm", "ResBlock", "Sequential"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{picture}", "--models", "poolformer_s112"], "there is no model 'poolformer_s112'"),
        (["nowhere.png", "--models", "poolformer_s12"], "cannot read the picture nowhere.png"),
        (["{picture}", "--weights", "resnet50=x"], "--weights resnet50=x: give NAME=FILE"),
        (
            ["{picture}", "--models", "resnet18", "x", "--weights", "resnet18=none.pt", "--weights", "x=y"],
            "there is no checkpoint none.pt",
        ),
        (
            ["{picture}", "--models", "mixnet_s", "--weights", "mixnet_s={mixnet}"],
            "mixnet_s is a EfficientNet: Grad-CAM supports MetaFormer",
        ),
    ],
)
def test_wrong_input_to_gradcam(arguments, says, picture, tmp_path, command):
    if "mixnet_s" in arguments:
        mixnet = weights(tmp_path, "mixnet_s")
        arguments = [argument.replace("{mixnet}", str(mixnet)) for argument in arguments]
    status, _, error = command("analysis/gradcam.py", *(word.replace("{picture}", str(picture)) for word in arguments))
    assert (status, says in error, error.count("\n")) == (2, True, 1)
