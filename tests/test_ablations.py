"""The rows of Table 5 as models: against timm's MetaFormer, torch's own operators, and published counts."""

import re

import pytest
import timm
import timm.models.metaformer as timm_metaformer
import torch
import yaml
from timm.layers import GroupNorm1, LayerNorm, LayerNorm2d
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn import functional as F

import metaformer
from conftest import ROOT
from metaformer import ABLATIONS, QUESTIONS, VARIANTS, InputError
from metaformer.analysis.cells import Table
from metaformer.analysis.measured import Measured
from metaformer.analysis.outputs import outputs
from metaformer.analysis.paper import rows_of
from metaformer.training.config import load_config
from metaformer.variants import LABELS, ROWS
from oracles import TIMM_NAMES, randomise, randomised, relative_error, renamed, timm_twin

# Table 5: learnable parameters in millions as printed, top-1 of the paper.
TABLE_5 = {
    "identity": (11.9, 74.3),
    "random": (11.9, 75.8),
    "dwconv": (11.9, 78.1),
    "pool5": (11.9, 77.2),
    "pool7": (11.9, 77.1),
    "pool9": (11.9, 76.8),
    "ln": (11.9, 76.5),
    "bn": (11.9, 76.4),
    "nonorm": (11.9, 46.1),
    "relu": (11.9, 76.4),
    "silu": (11.9, 77.2),
    "noresidual": (11.9, 0.1),
    "nomlp": (2.5, 5.7),
    "pppa": (14.0, 78.3),
    "ppaa": (16.5, 81.0),
    "pppf": (11.9, 77.5),
    "ppff": (12.2, 77.9),
}


SMALL = {"depths": (1, 1, 2, 1), "dims": (32, 64, 96, 128), "num_classes": 10}
"""Fewer and narrower blocks; the rows differ in what a block is made of."""


def row_model(row: str, **arguments) -> nn.Module:
    return timm.create_model("poolformer_s12" if row == "baseline" else f"metaformer_s12_{row}", **arguments)


def test_no_row_is_missing():
    assert {f"metaformer_s12_{row}" for row in TABLE_5} == ABLATIONS.keys()
    assert ABLATIONS.keys() | QUESTIONS.keys() == set(timm.list_models("metaformer_s12_*"))


@pytest.mark.parametrize("row", TABLE_5)
def test_parameters_are_the_published_ones(row):
    with torch.device("meta"):
        model = row_model(row)
    learnable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert round(learnable / 1e6, 1) == TABLE_5[row][0]
    # 2 * 3136^2 + 2 * 784^2 + 6 * 196^2 + 2 * 49^2; the paper says 21 M
    assert frozen == (21_133_602 if row == "random" else 0)


@pytest.mark.parametrize("row", TABLE_5)
def test_every_row_has_its_recipe(row):
    baseline = load_config([str(ROOT / "configs/classification/poolformer_s12.yaml")]).model_dump()
    config = load_config([str(ROOT / f"configs/ablations/metaformer_s12_{row}.yaml")])
    differs = {key for key, value in config.model_dump().items() if value != baseline[key]}
    assert (config.model, config.expected_top1) == (f"metaformer_s12_{row}", TABLE_5[row][1])
    assert config.crop_pct == ABLATIONS[config.model].crop_pct
    assert differs - {"model", "expected_top1", "crop_pct"} == ({"global_batch"} if row in ("pppa", "ppaa") else set())
    assert config.base_lr * config.global_batch / 1024 == (1e-3 if row in ("pppa", "ppaa") else 4e-3)  # appendix A


def test_registry_paper_and_recipes_agree():
    printed = yaml.safe_load((ROOT / "analysis/paper.yaml").read_text(encoding="utf-8"))["table5"]["rows"]
    rows = rows_of("table5")
    assert [row["build"] for row in rows] == ["poolformer_s12", *ABLATIONS]
    assert [VARIANTS[row["build"]].row for row in rows] == [row["row"] for row in printed]
    files = outputs({"table5": Table("table5", "", [], [])}, [], Measured(ROOT / "analysis/results"))
    texts = {path: text for path, text in files.items() if path.parent == ROOT / "configs/ablations"}
    assert texts == {file: file.read_text(encoding="utf-8") for file in (ROOT / "configs/ablations").iterdir()}


def test_every_row_has_a_label_and_settings():
    questions = {name.removeprefix("metaformer_s12_") for name in QUESTIONS}
    assert ROWS.keys() == LABELS.keys() == {"baseline", *TABLE_5, *questions, "nodroppath"}
    paper = {row["row"] for row in rows_of("table5")}
    assert {name for name, variant in VARIANTS.items() if variant.row and variant.row not in paper} == QUESTIONS.keys()


# Whole networks, on the weights of a random draw


class TimmPooling5(timm_metaformer.Pooling):
    def __init__(self, **kwargs):
        super().__init__(pool_size=5)


class TimmPooling7(timm_metaformer.Pooling):
    def __init__(self, **kwargs):
        super().__init__(pool_size=7)


class TimmPooling9(timm_metaformer.Pooling):
    def __init__(self, **kwargs):
        super().__init__(pool_size=9)


class TimmUnsubtracted(timm_metaformer.Pooling):
    def forward(self, x):
        return self.pool(x)


class TimmBorder(timm_metaformer.Pooling):
    def __init__(self, **kwargs):
        super().__init__()
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)  # counts its border


class TimmDepthwise(nn.Conv2d):
    def __init__(self, dim, **kwargs):
        super().__init__(dim, dim, 3, padding=1, groups=dim)


class TimmAttention(timm_metaformer.Attention):
    def __init__(self, dim, **kwargs):
        super().__init__(dim, proj_bias=True)


class Ln(LayerNorm2d):
    def __init__(self, dim, **kwargs):
        super().__init__(dim, eps=1e-5)


class LnTokens(LayerNorm):
    def __init__(self, dim, **kwargs):
        super().__init__(dim, eps=1e-5)


class Bn(nn.BatchNorm2d):
    def __init__(self, dim, **kwargs):
        super().__init__(dim)


POOL = timm_metaformer.Pooling
TWINS = {
    "identity": {"token_mixers": nn.Identity},
    "dwconv": {"token_mixers": TimmDepthwise},
    "pool5": {"token_mixers": TimmPooling5},
    "pool7": {"token_mixers": TimmPooling7},
    "pool9": {"token_mixers": TimmPooling9},
    "ln": {"norm_layers": Ln},
    "bn": {"norm_layers": Bn},
    "nonorm": {"norm_layers": nn.Identity},
    "relu": {"mlp_act": nn.ReLU},
    "silu": {"mlp_act": nn.SiLU},
    "pppa": {"token_mixers": [POOL] * 3 + [TimmAttention], "norm_layers": [Ln] * 3 + [LnTokens]},
    "ppaa": {"token_mixers": [POOL] * 2 + [TimmAttention] * 2, "norm_layers": [Ln] * 2 + [LnTokens] * 2},
    "unsubtracted": {"token_mixers": TimmUnsubtracted},
    "border": {"token_mixers": TimmBorder},
    "nolayerscale": {"layer_scale_init_values": None},
}
"""Arguments of timm's MetaFormer that make the rows it can build."""


def timm_row(row: str, model: nn.Module) -> nn.Module:
    plain = {"mlp_act": nn.GELU, "norm_layers": GroupNorm1, "layer_scale_init_values": 1e-5, "token_mixers": POOL}
    twin = timm_metaformer.MetaFormer(
        depths=SMALL["depths"],
        dims=SMALL["dims"],
        mlp_bias=True,
        downsample_norm=None,
        res_scale_init_values=None,
        use_mlp_head=False,
        output_norm=nn.Identity,
        num_classes=0,
        **{**plain, **TWINS[row]},
    ).to(model.stem.weight.dtype)
    own = twin.state_dict()
    # Where tokens are mixed by attention, timm's MLP is linear layers in place of 1x1 convolutions.
    weights = {
        name: tensor.reshape(own[name].shape)
        for name, tensor in renamed(model.state_dict(), TIMM_NAMES).items()
        if "position" not in name and not name.startswith("head.")
    }
    twin.load_state_dict(weights)
    return twin.train(model.training)


@pytest.mark.parametrize(("row", "train"), [*((row, True) for row in TWINS), ("bn", False)])
def test_trunk_and_gradients_equal_timms(row, train):
    model = randomise(row_model(row, **SMALL, img_size=(75, 64))).double().train(train)
    for name, parameter in model.named_parameters():
        if "position" in name:
            nn.init.zeros_(parameter)  # timm has none
    images = torch.randn(2, 3, 75, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    twin = timm_row(row, model)
    ours, theirs = model.forward_features(images), twin.forward_features(images)
    assert relative_error(ours, theirs) < 1e-10
    if train:
        ours.square().mean().backward()
        theirs.square().mean().backward()
        expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
        for name, parameter in renamed(dict(model.named_parameters()), TIMM_NAMES).items():
            # in pool(x) - x the bias of the norm before cancels under MLN; its gradient is rounding
            if parameter.grad is not None and "position" not in name and "norm1.bias" not in name:
                assert relative_error(parameter.grad.reshape(expected[name].shape), expected[name]) < 1e-8, name


def test_timms_head_is_timms():
    model = randomised("metaformer_s12_timmhead", num_classes=10).double().eval()
    images = torch.randn(2, 3, 75, 64, dtype=torch.float64)
    logits = model(images)
    twin = timm_twin("poolformer_s12", model)
    twin.head.norm.eps = model.norm.eps  # timm has 1e-6
    assert relative_error(logits, twin(images)) < 1e-10
    model.pool_before_norm = False
    assert relative_error(model(images), logits) > 1e-3


@pytest.mark.parametrize(("stride", "sizes"), [(1, (32, 16, 8, 4)), (2, (16, 8, 4, 2)), (4, (8, 4, 2, 1))])
def test_the_stems_stride_is_that_of_its_maps(stride, sizes):
    model = row_model("baseline", **SMALL, stem_stride=stride, features_only=True)
    maps = model(torch.randn(1, 3, 32, 32))
    assert tuple(x.shape[2] for x in maps) == sizes
    assert model.feature_info.reduction() == [32 // size for size in sizes]
    fixed = row_model("ppff", **SMALL, stem_stride=stride, img_size=32)  # depends on the sizes of its maps
    assert fixed(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(InputError, match="stem_stride is 3: use 4, as the paper, or 2 or 1"):
        timm.create_model("poolformer_s12", stem_stride=3)


@pytest.mark.parametrize(("row", "seen"), [("patchesidentity", 32), ("patches", 96)])
def test_without_overlap_only_the_token_mixer_sees_other_patches(row, seen):
    """In one stage-4 position, of a patch of 32 pixels; a pooling in each of the stages sees its neighbours."""
    depths = (1, 1, 1, 1) if row == "patchesidentity" else (0, 0, 0, 1)
    model = randomise(row_model(row, **{**SMALL, "depths": depths}, norm_layers=nn.Identity)).eval()
    images = torch.randn(1, 3, 160, 160, requires_grad=True)
    model.forward_features(images)[0, :, 2, 2].abs().sum().backward()
    rows, columns = images.grad[0].abs().sum(0).nonzero().T
    assert {len(rows.unique()), len(columns.unique())} == {seen}
    assert int(rows.min()) == int(columns.min()) == (160 - seen) // 2


@pytest.mark.parametrize("row", ["random", "pppf", "ppff"])
def test_token_matrices_are_multiplications_over_the_tokens(row):
    """Each mixer of the row replaced by an einsum over the positions; the rest is what the tests above cover."""
    model = randomise(row_model(row, **SMALL, img_size=(96, 64))).eval()
    images = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        ours = model.forward_features(images)
        replaced = 0
        for stage in model.stages:
            for block in stage.blocks:
                matrices = dict(block.token_mixer.named_parameters())
                if matrices:
                    assert len(matrices) == 1
                    block.token_mixer = Einsum(next(iter(matrices.values())))
                    replaced += 1
        assert replaced == {"random": 5, "pppf": 1, "ppff": 3}[row]
        assert relative_error(model.forward_features(images), ours) < 1e-5


class Einsum(nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, x):
        b, c, h, w = x.shape
        return torch.einsum("mn, bcn -> bcm", self.matrix, x.reshape(b, c, h * w)).reshape(b, c, h, w)


def test_no_residual_and_no_mlp_are_the_definition_without_a_term():
    images = torch.randn(1, 3, 64, 64)
    for row in ("noresidual", "nomlp"):
        model = randomise(row_model(row, **SMALL)).double().eval()
        x = model.stem(images.double())
        for stage in model.stages:
            x = stage.downsample(x)
            for block in stage.blocks:
                norm = F.group_norm(x, 1, block.norm1.weight, block.norm1.bias)
                pooled = F.avg_pool2d(norm, 3, 1, 1, count_include_pad=False) - norm
                x = block.layer_scale1.view(1, -1, 1, 1) * pooled + (x if row == "nomlp" else 0)
                if row == "noresidual":
                    norm = F.group_norm(x, 1, block.norm2.weight, block.norm2.bias)
                    hidden = F.gelu(F.conv2d(norm, block.mlp.fc1.weight, block.mlp.fc1.bias))
                    x = block.layer_scale2.view(1, -1, 1, 1) * F.conv2d(
                        hidden, block.mlp.fc2.weight, block.mlp.fc2.bias
                    )
        assert relative_error(model.forward_features(images.double()), x) < 1e-10


# Parts


def test_norms_differ_as_they_should():
    """MLN, LN and BN by their definition (appendix D): mean and variance over other axes of (B, C, H, W)."""
    x = 3 * torch.randn(4, 64, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x + torch.arange(64).view(1, 64, 1, 1)
    over = {"baseline": (1, 2, 3), "ln": (1,), "bn": (0, 2, 3)}
    normed = {}
    for row, axes in over.items():
        norm = row_model(row, **{**SMALL, "dims": (64, 64, 64, 64)}).stages[0].blocks[0].norm1.double().train()
        assert {name: tuple(p.shape) for name, p in norm.named_parameters()} == {"weight": (64,), "bias": (64,)}
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        deviation = (x.var(axes, keepdim=True, unbiased=False) + 1e-5).sqrt()
        expected = (x - x.mean(axes, keepdim=True)) / deviation
        expected = expected * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
        normed[row] = norm(x)
        assert relative_error(normed[row], expected) < 1e-12
    assert len({output.sum().item() for output in normed.values()}) == 3


def test_random_matrices_are_drawn_once_and_stay():
    torch.manual_seed(0)
    model = row_model("random", num_classes=10, img_size=64)
    matrices = [block.token_mixer.weight for stage in model.stages for block in stage.blocks]
    assert [len(m) for m in matrices] == [256] * 2 + [64] * 2 + [16] * 6 + [4] * 2
    for matrix in matrices:
        assert torch.allclose(matrix.sum(1), torch.ones(len(matrix)))
        # softmax of a uniform draw from [0, 1): within a row, the largest entry is less than e times the smallest
        ratios = matrix.max(1).values / matrix.min(1).values
        assert ((ratios > 1) & (ratios < torch.e)).all()
        assert len(matrix) < 256 or ratios.min() > 2.5
    assert len({tuple(m.flatten()[:4].tolist()) for m in matrices}) == 12
    model.requires_grad_()  # as after freezing and unfreezing a model
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=0.1)
    before = [m.clone() for m in matrices]
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(matrices, before, strict=True))
    assert "stages.0.blocks.0.token_mixer.weight" in model.state_dict()


@pytest.mark.parametrize(("row", "stage", "size"), [("pppa", 3, (7, 7)), ("ppaa", 2, (14, 14))])
def test_position_embedding_before_the_first_attention_stage(row, stage, size):
    model = row_model(row, num_classes=10)
    names = [name for name, _ in model.named_parameters() if "pos" in name]
    assert names == [f"stages.{stage}.position.pos_embed"]
    position = model.stages[stage].position.pos_embed
    assert position.shape == (1, (320, 512)[stage - 2], *size)
    assert position.count_nonzero() == 0
    nn.init.normal_(position)
    seen = []
    model.stages[stage].blocks.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.stages[stage].downsample.register_forward_hook(lambda _, __, output: seen.append(output))
    model(torch.randn(1, 3, 224, 224))
    assert torch.equal(seen[1], seen[0] + position)
    # four axes, so that timm's rule decays it, as in the official code
    decay = {p: group["weight_decay"] for group in param_groups_weight_decay(model, 0.05) for p in group["params"]}
    assert decay[position] == 0.05


def test_attention_equals_torchs_multihead_attention():
    mixer = randomise(metaformer.Attention(64)).double()
    assert mixer.qkv.bias is None
    theirs = nn.MultiheadAttention(64, num_heads=2, bias=True, batch_first=True).double()
    theirs.in_proj_weight.data.copy_(mixer.qkv.weight)
    nn.init.zeros_(theirs.in_proj_bias)
    theirs.out_proj.load_state_dict(mixer.proj.state_dict())
    x = torch.randn(2, 64, 5, 3, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)
    expected = theirs(tokens, tokens, tokens)[0].transpose(1, 2).unflatten(2, (5, 3))
    assert relative_error(mixer(x), expected) < 1e-12
    with pytest.raises(InputError, match="32 channels per head cannot divide 40 channels"):
        metaformer.Attention(40)


@pytest.mark.parametrize(
    ("row", "module"),
    [("random", "RandomMixing"), ("pppa", "PositionEmbedding"), ("ppaa", "PositionEmbedding"), ("ppff", "SpatialFC")],
)
def test_another_input_size_is_refused_unless_built_for(row, module):
    model = row_model(row, **SMALL)
    says = rf"{module} is made for maps of \d+ x \d+ positions and got \d+ x \d+: build the model with img_size="
    with pytest.raises(InputError, match=says):
        model(torch.randn(1, 3, 256, 224))
    model = row_model(row, **SMALL, img_size=(256, 224))
    assert model(torch.randn(1, 3, 256, 224)).shape == (1, 10)
    with pytest.raises(InputError, match=says):  # as many positions
        model(torch.randn(1, 3, 224, 256))


def test_compile_export_and_layouts():
    """Of a model with all mixers that the other rows of the table have, and a position embedding."""
    mixers = [metaformer.RandomMixing, metaformer.Attention, metaformer.SpatialFC, metaformer.DepthwiseConv]
    arguments = {"token_mixers": mixers, "norm_layers": metaformer.ChannelLayerNorm, "drop_path_rate": 0.1}
    positions = (False, True, False, False)
    model = randomise(metaformer.MetaFormer(**SMALL, **arguments, pos_embeds=positions, img_size=64)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(images)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    last = images.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for output in (compiled(images), exported(images), model.to(memory_format=torch.channels_last)(last)):
            assert relative_error(output, expected) < 1e-5
        assert exported(images.repeat(2, 1, 1, 1)).shape == (4, 10)


def test_layer_decay_puts_the_position_with_its_stage():
    model = row_model("ppaa", num_classes=10)
    groups = [pattern for pattern, _ in model.group_matcher()["blocks"]]
    assert re.match(groups[0], "stages.2.position.pos_embed")
    assert re.match(groups[0], "stages.2.downsample.weight")


def test_training_takes_the_image_size_from_the_config(run):
    folder = run("model=metaformer_s12_ppff", "img_size=64", "epochs=1")
    weights = metaformer.weights.read_checkpoint(folder / "best.pt")["state_dict"]
    assert weights["stages.2.blocks.0.token_mixer.fc.weight"].shape == (16, 16)
