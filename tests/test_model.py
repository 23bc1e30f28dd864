import re
import runpy
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import timm
import timm.models.metaformer as timm_metaformer
import torch
from timm.data import resolve_input_data_config
from timm.models._features_fx import GraphExtractNet
from timm.models._features_fx import create_feature_extractor as timm_features
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_features

import metaformer
from metaformer import POOLFORMERS, VARIANTS, InputError, MetaFormer, MetaFormerBlock
from metaformer.model import fixes_size
from oracles import (
    HF_NAMES,
    OFFICIAL_NAMES,
    TIMM_NAMES,
    hf_twin,
    randomise,
    randomised,
    relative_error,
    renamed,
    timm_twin,
)

ROOT = Path(__file__).parents[1]
# Published: mmpretrain's configs/poolformer/metafile.yml (Parameters), all five exact.
PARAMETERS = {
    "poolformer_s12": 11_915_176,
    "poolformer_s24": 21_388_968,
    "poolformer_s36": 30_862_760,
    "poolformer_m36": 56_172_520,
    "poolformer_m48": 73_473_448,
}
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-10)]
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 5}


@pytest.fixture
def images():
    return torch.randn(2, 3, 75, 64, generator=torch.Generator().manual_seed(1))


def model_of(name: str, **kwargs) -> MetaFormer:
    return timm.create_model(name, **kwargs)


def test_drop_rate_drops_what_the_classifier_takes(images):
    model = model_of("poolformer_s12", drop_rate=1.0, **SMALL).train()
    nn.init.constant_(model.head.bias, 2.0)
    assert torch.equal(model(images), torch.full((2, 5), 2.0))
    assert not torch.equal(model.eval()(images), torch.full((2, 5), 2.0))


def test_no_variant_is_left_out():
    assert POOLFORMERS.keys() == PARAMETERS.keys()
    timms_own = {name for name in timm_metaformer.default_cfgs if re.match(r"poolformer_[sm]\d", name)}
    assert POOLFORMERS.keys() == timms_own


@pytest.mark.parametrize("name", POOLFORMERS)
def test_parameter_count_is_the_published_one(name):
    with torch.device("meta"):
        model = model_of(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", POOLFORMERS)
def test_registered_with_timm_in_place_of_timms_own(name):
    with torch.device("meta"):
        model = model_of(name, num_classes=10)
        assert type(model) is MetaFormer
        assert type(getattr(timm_metaformer, name)(num_classes=10)) is timm_metaformer.MetaFormer
    theirs = timm_metaformer.default_cfgs[name].default
    ours = model.pretrained_cfg
    assert ours["tag"] == "sail_in1k"
    assert ours["url"] == f"https://github.com/sail-sg/poolformer/releases/download/v1.0/{name}.pth.tar"
    for key in ("crop_pct", "interpolation", "mean", "std", "input_size"):
        assert ours[key] == getattr(theirs, key), key


def test_import_needs_no_other_toolbox_and_works_from_any_folder(tmp_path):
    blocked = "mmdet mmseg mmcv mmengine transformers fvcore matplotlib pandas pydantic"
    code = f"import sys; sys.modules.update(dict.fromkeys('{blocked}'.split())); import metaformer"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in POOLFORMERS), ("poolformer_s12", torch.float64)]
)
def test_equals_timms_trunk_and_transformers_logits(name, dtype, images):
    model = randomised(name, num_classes=10).to(dtype).eval()
    images = images[:, :, :40, :48].to(dtype)
    with torch.inference_mode():
        features = model.forward_features(images)
        tolerance = dict(PRECISIONS)[dtype]
        assert relative_error(features, timm_twin(name, model).forward_features(images)) < tolerance
        assert relative_error(model(images), hf_twin(model)(images).logits) < tolerance
        assert torch.equal(model(images), model.forward_head(features))


def gradients(model: nn.Module, outputs: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs.pow(2).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("oracle", ["timm", "transformers"])
def test_gradients_equal_those_of_timm_and_transformers(oracle, dtype, tolerance, images):
    # Rounding in float32 is another in the fused form (tests/test_fused.py).
    name = "poolformer_s12"
    model = randomised(name, num_classes=10, fused=dtype == torch.float64).to(dtype).train()
    images = images[:, :, :40, :40].to(dtype)
    if oracle == "timm":
        twin, names = timm_twin(name, model), TIMM_NAMES
        theirs = gradients(twin, twin.forward_features(images))
        ours = gradients(model, model.forward_features(images))
    else:
        twin, names = hf_twin(model), HF_NAMES
        theirs = gradients(twin, twin(images).logits)
        ours = gradients(model, model(images))
    ours = renamed(ours, names)
    assert ours.keys() == theirs.keys()
    # norm1.bias cancels in pool(x) - x, so that its gradient is rounding, here as there.
    compared = [key for key in theirs if not re.search(r"(norm1|before_norm)\.bias", key)]
    assert len(compared) >= len(theirs) - sum(POOLFORMERS[name].arguments["depths"])
    assert max(relative_error(ours[key], theirs[key]) for key in compared) < 10 * tolerance
    flat = [torch.cat([grads[key].flatten() for key in compared]) for grads in (ours, theirs)]
    assert relative_error(*flat) < tolerance


@pytest.mark.parametrize("half", ["token mixer", "channel MLP"])
def test_drop_path_drops_whole_branches_per_sample_at_the_right_rate_and_scale(half):
    rate, samples = 0.3, 4000
    if half == "token mixer":
        block = MetaFormerBlock(4, drop_path=rate, layer_scale_init=1.0, mlp_ratio=None)
    else:
        block = MetaFormerBlock(4, drop_path=rate, layer_scale_init=1.0, token_mixer=lambda dim: Zero())
    torch.manual_seed(0)
    x = torch.randn(samples, 4, 3, 3)
    branch = block.eval()(x) - x
    dropped_out = block.train()(x) - x
    kept = dropped_out.flatten(1).abs().sum(1) > 0
    assert torch.allclose(dropped_out[kept], branch[kept] / (1 - rate), atol=1e-5)
    assert dropped_out[~kept].count_nonzero() == 0
    expected, deviation = samples * (1 - rate), (samples * rate * (1 - rate)) ** 0.5
    assert abs(kept.sum().item() - expected) < 4 * deviation


class Zero(nn.Module):
    def forward(self, x):
        return 0 * x


def test_the_two_branches_are_dropped_independently():
    torch.manual_seed(0)
    block = MetaFormerBlock(4, drop_path=0.5, layer_scale_init=1.0, token_mixer=lambda dim: Plus(1.0))
    block.mlp = Plus(10.0)
    block.norm1 = block.norm2 = Zero()
    outcomes = Counter(block.train()(torch.zeros(4000, 4, 2, 2))[:, 0, 0, 0].int().tolist())
    assert outcomes.keys() == {0, 2, 20, 22}
    assert all(abs(count - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5 for count in outcomes.values())


class Plus(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x + self.value


@pytest.mark.parametrize("name", POOLFORMERS)
def test_drop_path_grows_linearly_as_in_timm(name):
    def rates(model):
        return [getattr(m, "drop_prob", None) for m in model.modules() if type(m).__name__ == "DropPath"]

    with torch.device("meta"):
        ours = rates(model_of(name, drop_path_rate=0.4))
        theirs = rates(getattr(timm_metaformer, name)(drop_path_rate=0.4))
    assert len(ours) == sum(POOLFORMERS[name].arguments["depths"]) - 1  # the first block drops nothing
    assert ours == pytest.approx(theirs[::2])  # timm has one module for each half of a block
    assert ours == pytest.approx(torch.linspace(0, 0.4, len(ours) + 1)[1:].tolist())


@pytest.mark.parametrize(("name", "layer_scale"), [("poolformer_s24", 1e-5), ("poolformer_s36", 1e-6)])
def test_initialisation_is_the_official_one(name, layer_scale):
    torch.manual_seed(0)
    model = model_of(name, depths=(1, 1, 1, 1))
    for key, parameter in model.state_dict().items():
        if "layer_scale" in key:
            assert (parameter == layer_scale).all()
        elif "norm" in key:
            assert (parameter == float(key.endswith("weight"))).all()
        elif key.startswith("stem") or "downsample" in key:  # PyTorch's default: uniform within 1 / sqrt(fan in)
            bound = model.state_dict()[key.replace("bias", "weight")][0].numel() ** -0.5
            assert parameter.abs().max() <= bound
            assert parameter.std() == pytest.approx(bound / 3**0.5, rel=0.3)
        elif key.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.std() == pytest.approx(0.02, rel=0.02)


def test_classifier_arguments(images):
    features = model_of("poolformer_s12", num_classes=0).eval()
    assert features(images).shape == (2, 512)
    assert model_of("poolformer_s12", num_classes=0, global_pool="")(images).shape == (2, 512, 3, 2)
    model = model_of("poolformer_s12", num_classes=7, in_chans=1)
    assert model(images[:, :1]).shape == (2, 7)
    assert model.forward_head(model.forward_features(images[:, :1]), pre_logits=True).shape == (2, 512)
    model.reset_classifier(11)
    with pytest.raises(InputError, match="leaves no vector to classify"):
        model.reset_classifier(3, global_pool="")  # and changes nothing
    assert (model.num_classes, model.get_classifier().out_features) == (11, 11)
    assert model(images[:, :1]).shape == (2, 11)
    model.reset_classifier(0)
    assert model(images[:, :1]).shape == (2, model.num_features)
    with pytest.raises(InputError, match="leaves no vector to classify"):
        model_of("poolformer_s12", global_pool="")
    model.reset_classifier(0, global_pool="")
    with pytest.raises(InputError, match="leaves no vector to classify"):
        model.reset_classifier(3)
    model.stem = nn.Sequential(nn.Conv2d(1, 64, 4, 4), nn.ReLU())
    model.double().reset_classifier(3, global_pool="avg")
    assert model(images[:, :1].double()).shape == (2, 3)


def test_models_are_made_on_a_device_and_of_a_dtype_as_timms():
    placed = {"device": "meta", "dtype": torch.bfloat16}
    for model in (timm_metaformer.poolformer_s12(**placed), model_of("poolformer_s12", **placed, **SMALL)):
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_layer_scale_may_start_at_a_whole_number():
    assert (model_of("poolformer_s12", layer_scale_init=1).stages[0].blocks[0].layer_scale1 == 1).all()


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2), (-1,)])
def test_features_only_and_forward_intermediates_equal_timm(out_indices, images):
    model = randomised("poolformer_s12").eval()
    theirs = timm_metaformer.poolformer_s12(features_only=True, out_indices=out_indices).eval()
    twin = timm_twin("poolformer_s12", model)
    flat = {key.replace("stages.", "stages_"): value for key, value in twin.state_dict().items()}
    theirs.load_state_dict({key: flat[key] for key in theirs.state_dict()})
    ours = model_of("poolformer_s12", features_only=True, out_indices=out_indices).eval()
    own = model.state_dict()
    ours.load_state_dict({key: own[key.removeprefix("model.")] for key in ours.state_dict()})
    with torch.inference_mode():
        expected = theirs(images)
        assert ours.feature_info.channels() == theirs.feature_info.channels()
        assert ours.feature_info.reduction() == theirs.feature_info.reduction()
        _, intermediates = model.forward_intermediates(images, indices=list(out_indices))
        for features in (ours(images), intermediates):
            assert len(features) == len(expected)
            assert all(relative_error(*pair) < 1e-5 for pair in zip(features, expected, strict=True))


def test_forward_intermediates_options(images):
    model = randomised("poolformer_s12").eval()
    with torch.inference_mode():
        final, intermediates = model.forward_intermediates(images)
        assert torch.equal(final, model.forward_features(images))
        normed = model.forward_intermediates(images, norm=True, intermediates_only=True)
        assert all(torch.equal(*pair) for pair in zip(normed[:3], intermediates[:3], strict=True))
        assert torch.equal(normed[3], model.norm(final))
        early, _ = model.forward_intermediates(images, indices=[1], stop_early=True)
        assert torch.equal(early, intermediates[1])
    with pytest.raises(InputError, match="NCHW"):
        model.forward_intermediates(images, output_fmt="NLC")


def test_layer_decay_orders_the_parameters_by_depth():
    model = model_of("poolformer_s12", num_classes=10)
    for coarse, layers in [(False, 1 + 12 + 1), (True, 1 + 4 + 1)]:
        matcher = model.group_matcher(coarse)
        model.group_matcher = lambda coarse=False, matcher=matcher: matcher
        names = {parameter: name for name, parameter in model.named_parameters()}
        scales = {
            names[parameter]: group["lr_scale"]
            for group in param_groups_layer_decay(model, layer_decay=0.5)
            for parameter in group["params"]
        }
        assert scales.keys() == set(names.values())
        assert len({scales[name] for name in scales}) == layers
        assert scales["head.weight"] == scales["norm.weight"] == 1
        assert scales["stages.3.blocks.1.mlp.fc2.weight"] == 0.5
        order = [
            "stem.bias",
            "stages.0.blocks.0.norm1.weight",
            "stages.1.downsample.weight",
            "stages.2.downsample.bias",
        ]
        assert sorted(order, key=scales.get) == order
        assert scales["stages.1.downsample.weight"] == scales["stages.1.blocks.0.mlp.fc1.weight"]
        del model.group_matcher


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 65), (100, 75), (223, 225)])
def test_any_input_size(size, images):
    model = randomised("poolformer_s12", num_classes=10).eval()
    images = nn.functional.interpolate(images, size, mode="bilinear")
    with torch.inference_mode():
        assert relative_error(model(images), hf_twin(model)(images).logits) < 1e-5


def test_channels_last(images):
    model = randomised("poolformer_s12", num_classes=10).eval()
    with torch.inference_mode():
        expected = model(images)
        features = model.to(memory_format=torch.channels_last).forward_features(
            images.to(memory_format=torch.channels_last)
        )
        assert features.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(model.forward_head(features), expected) < 1e-5


def test_torch_compile_has_no_graph_breaks(images):
    model = randomise(MetaFormer(**SMALL, drop_path_rate=0.1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # needs no C++ compiler, unlike inductor
    for train in (False, True):
        model.train(train)
        torch.manual_seed(0)
        expected = model(images)
        torch.manual_seed(0)
        assert relative_error(compiled(images), expected) < 1e-5


def test_torch_export_with_dynamic_batch_and_size(images):
    model = randomise(MetaFormer(**SMALL)).eval()
    shapes = {0: torch.export.Dim("batch"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    exported = torch.export.export(model, (torch.randn(2, 3, 96, 96),), dynamic_shapes=(shapes,)).module()
    with torch.inference_mode():
        for x in (images, images[:1, :, :64, :50].repeat(3, 1, 1, 1)):
            assert relative_error(exported(x), model(x)) < 1e-5


@pytest.mark.parametrize("norm_layers", [metaformer.MLN, nn.BatchNorm2d])
def test_gradient_checkpointing_recomputes_and_changes_nothing(images, norm_layers):
    """Neither gradients nor the running statistics of batch norms."""
    model = randomise(MetaFormer(**SMALL, norm_layers=norm_layers, drop_path_rate=0.5, fused=False)).train()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = []
    for enable in (False, True):
        model.load_state_dict(start)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        runs = []
        hook = model.stages[2].blocks[1].norm1.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(0)
        found = {**gradients(model, model(images)), **dict(model.named_buffers(prefix="buffer"))}
        results.append({name: tensor.clone() for name, tensor in found.items()})
        hook.remove()
        assert len(runs) == 1 + enable
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_stage_arguments():
    mixers = [nn.Identity, metaformer.Pooling, nn.Identity, metaformer.Pooling]
    model = MetaFormer(token_mixers=mixers, norm_layers=[nn.BatchNorm2d] * 3 + [metaformer.MLN], num_classes=3)
    for stage, mixer, norm in zip(model.stages, mixers, [nn.BatchNorm2d] * 3 + [metaformer.MLN], strict=True):
        assert {type(block.token_mixer) for block in stage.blocks} == {mixer}
        assert {type(block.norm2) for block in stage.blocks} == {norm}
    assert type(model.norm) is metaformer.MLN
    with pytest.raises(InputError, match="token_mixers has 3 entries"):
        MetaFormer(token_mixers=mixers[:3])
    wrong = [{"token_mixers": [nn.Identity()] * 4}, {"norm_layers": nn.Identity()}, {"act_layer": "Identity"}]
    for arguments in (*wrong, {"token_mixers": "Pooling"}, {"norm_layers": ["BatchNorm2d"]}):
        with pytest.raises(InputError, match="does not make a layer: give a class"):
            MetaFormer(**arguments)


@pytest.mark.parametrize(
    ("name", "values", "remedy"),
    [
        ("img_size", [(3, 64, 64), 0, (64, -1)], "give the side of the images in pixels"),
        ("drop_path_rate", [-0.1, 1.5], "give a probability from 0 to 1"),
        ("mlp_ratio", [0, 0.01], "use a larger one, or None"),
    ],
)
def test_arguments_out_of_range_are_refused(name, values, remedy):
    for value in values:
        with pytest.raises(InputError, match=rf"{name}.*{re.escape(str(value))}.*{remedy}"):
            MetaFormer(**SMALL, **{name: value})


class Mapped(nn.Module):
    """A token mixer of one's own, which applies a function."""

    def __init__(self, dim, function):
        super().__init__()
        self.forward = function


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x.mean((2, 3), keepdim=True), r"\(2, 8, 1, 1\)"),  # would be broadcast in silence
        (lambda x: x[:, :1], r"\(2, 1, 19, 16\)"),
        (lambda x: torch.cat([x, x], dim=1), r"\(2, 16, 19, 16\)"),
        (lambda x: x.flatten(2).transpose(1, 2), r"\(2, 304, 8\)"),
    ],
)
@pytest.mark.parametrize("residual", [True, False])
def test_a_mixer_that_does_not_keep_the_shape_is_refused(function, shape, residual, images):
    model = MetaFormer(**SMALL, token_mixers=partial(Mapped, function=function), residual=residual)
    with pytest.raises(InputError, match=rf"returned {shape} for maps of \(2, 8, 19, 16\)"):
        model(images)


def test_residual_and_channel_mlp_can_be_left_out(images):
    x = images[:, :, :8, :8].repeat(1, 2, 1, 1)[:, :4]
    block = randomise(MetaFormerBlock(4, mlp_ratio=None, residual=False, layer_scale_init=None))
    assert torch.equal(block(x), block.token_mixer(block.norm1(x)))
    assert [name for name, _ in block.named_parameters()] == ["norm1.weight", "norm1.bias"]
    with torch.device("meta"):
        # Table 5: 2.5 M parameters without channel MLP
        model = MetaFormer(mlp_ratio=None)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 2.5


def test_readme_snippets_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert any("token_mixers=" in block for block in blocks)
    for block in blocks:
        assert "import metaformer" in block
        exec(block, {})


def test_wrong_images_are_named():
    model = model_of("poolformer_s12")
    with pytest.raises(InputError, match=r"\(2, 4, 32, 32\).*expected \(batch, 3, height, width\)"):
        model(torch.zeros(2, 4, 32, 32))
    with pytest.raises(InputError, match="global_pool"):
        model_of("poolformer_s12", global_pool="max")


class Sized(nn.Module):
    """A mixer with parameters of its own called ``size``, and one that requires the size of its maps."""

    def __init__(self, dim, map_size, size=7):
        super().__init__()
        self.map_size, self.size = map_size, size

    def forward(self, x):
        return x


def test_only_a_required_map_size_is_filled_in():
    def sizes(mixer):
        model = MetaFormer(**{**SMALL, "token_mixers": mixer}, img_size=(64, 96))
        return [(stage.blocks[0].token_mixer.map_size, stage.blocks[0].token_mixer.size) for stage in model.stages]

    maps = [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert sizes(Sized) == [(size, 7) for size in maps]
    assert sizes(partial(Sized, size=5)) == [(size, 5) for size in maps]
    assert sizes(partial(Sized, map_size=(1, 1))) == [((1, 1), 7)] * 4

    class Unrelated(Sized):
        def __init__(self, dim, size=3, map_size=None):
            super().__init__(dim, map_size, size)

    assert sizes(Unrelated) == [(None, 3)] * 4
    assert not fixes_size(token_mixers=[Unrelated, nn.Identity])
    assert all(fixes_size(**arguments) for arguments in ({"token_mixers": [Sized]}, {"pos_embeds": True}))


@pytest.mark.parametrize("pool_size", [2, 0, -1])
def test_pool_sizes_without_a_centre_are_refused(pool_size):
    with pytest.raises(InputError, match=f"pool_size is {pool_size}: use an odd number"):
        MetaFormer(token_mixers=partial(metaformer.Pooling, pool_size=pool_size))


# The checks of timm's own tests/test_models.py, which timm's package does not contain

KINDS = ["poolformer_s12", *(f"metaformer_s12_{row}" for row in ("random", "nomlp", "ppaa", "ppff", "timmhead"))]
"""A model of each kind of layer."""
FIXED = {f"metaformer_s12_{row}" for row in ("random", "pppa", "ppaa", "pppf", "ppff")}


def small(name: str) -> MetaFormer:
    """A registered model with fewer and narrower blocks, for images of 64 pixels."""
    return randomised(name, num_classes=4, img_size=64, depths=(1, 1, 1, 1), dims=(32, 32, 64, 64))


@pytest.mark.parametrize("name", VARIANTS)
def test_default_cfg_is_that_of_the_model(name):
    with torch.device("meta"):
        model = model_of(name)
        cfg, state = model.default_cfg, model.state_dict()
        assert bool(cfg["fixed_input_size"]) == (name in FIXED)
        assert state[f"{cfg['classifier']}.weight"].shape[0] == cfg["num_classes"]
        assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0]
        images = torch.empty(2, *cfg["input_size"])
        assert model.forward_features(images).shape[2:] == cfg["pool_size"]
        assert model(images).shape == (2, 1000)


@pytest.mark.parametrize("name", KINDS)
def test_every_trainable_parameter_gets_a_gradient(name):
    model = small(name).train()
    logits = model(torch.randn(2, 3, 64, 64))
    logits.mean().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", KINDS)
def test_torchscript(name):
    model, images = small(name).eval(), torch.randn(1, 3, 64, 64)
    scripted = torch.jit.script(model)
    with torch.inference_mode():
        assert relative_error(scripted(images), model(images)) < 1e-5
        if name in FIXED:
            with pytest.raises(torch.jit.Error, match="build the model with img_size="):
                scripted(images[:, :, :32])


@pytest.mark.parametrize("name", KINDS)
def test_torch_fx(name):
    model, images = small(name), torch.randn(1, 3, 64, 64)
    features = model.eval().forward_intermediates(images, intermediates_only=True)
    nodes = {f"stages.{i}": str(i) for i in range(4)}
    for extractor in (torchvision_features(model, nodes), timm_features(model, nodes)):
        found = extractor.eval()(images)
        assert all(relative_error(found[str(i)], level) < 1e-5 for i, level in enumerate(features))
    network = GraphExtractNet(model, ["head"]).train()
    network(images).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert relative_error(network.eval()(images), model.eval()(images)) < 1e-5


@pytest.mark.parametrize("kind", ["getter", "list", "dict", "hook", "fx"])
def test_features_only_through_all_of_timms_classes(kind, images):
    arguments = {name: value for name, value in SMALL.items() if name != "num_classes"}
    torch.manual_seed(0)
    expected = model_of("poolformer_s12", **arguments).eval().forward_intermediates(images, intermediates_only=True)
    torch.manual_seed(0)
    model = model_of("poolformer_s12", features_only=True, feature_cls=kind, out_indices=(1, 3), **arguments)
    levels = model.eval()(images)
    for found, level in zip(levels.values() if kind == "dict" else levels, expected[1::2], strict=True):
        assert relative_error(found, level) < 1e-5


def test_timm_knows_that_a_mixer_fixes_the_size():
    model = model_of("poolformer_s12", token_mixers=metaformer.SpatialFC, img_size=(64, 96), **SMALL)
    assert resolve_input_data_config(model)["input_size"] == (3, 64, 96)
    with pytest.raises(ValueError, match="the model requires"):
        resolve_input_data_config(model, {"img_size": 224})


def test_torch_hub():
    names = runpy.run_path(str(ROOT / "hubconf.py"))
    assert {name for name in names if callable(names[name]) and name[0] != "_"} == {*POOLFORMERS, "metaformer"}
    model = torch.hub.load(str(ROOT), "poolformer_s12", source="local", num_classes=3, pool_before_norm=True)
    assert (type(model), model.num_classes) == (MetaFormer, 3)
    assert timm.models._hub.get_model_args(model)["pool_before_norm"]  # as timm saves the model
    model = torch.hub.load(str(ROOT), "metaformer", "metaformer_s12_ppff", source="local", img_size=64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    with pytest.raises(InputError, match=r"there is no variant 'poolformer_s13'.*poolformer_s12"):
        torch.hub.load(str(ROOT), "metaformer", "poolformer_s13", source="local")


@pytest.fixture
def official_release(tmp_path, monkeypatch):
    """A file as the official release has them, at an address: weights, and the model they came from."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    model = randomised("poolformer_s12").eval()
    path = tmp_path / "poolformer_s12.pth.tar"
    torch.save(renamed(model.state_dict(), OFFICIAL_NAMES), path)
    return model, path


def test_pretrained_reads_the_official_release(official_release, images):
    model, path = official_release
    overlay = {"url": path.as_uri()}
    loaded = model_of("poolformer_s12", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    fine_tuned = model_of(
        "poolformer_s12", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1
    ).eval()
    assert fine_tuned.stem.weight.shape == (64, 1, 7, 7)
    assert torch.equal(fine_tuned.stages[3].blocks[1].mlp.fc2.weight, model.stages[3].blocks[1].mlp.fc2.weight)
    features = model_of("poolformer_s12", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True).eval()
    with torch.inference_mode():
        assert torch.equal(features(images)[-1], model.forward_features(images))


def test_load_weights_is_all_or_nothing(official_release, tmp_path, images):
    model, path = official_release
    loaded = model_of("poolformer_s12").eval()
    metaformer.load_weights(loaded, path)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    with pytest.raises(InputError, match=r"another architecture.*missing.*stages"):
        metaformer.load_weights(model_of("poolformer_s24"), path)
    with pytest.raises(InputError, match=r"1000 classes and the model one of 5: use replace_head=true"):
        metaformer.load_weights(model_of("poolformer_s12", num_classes=5), path)
    small = model_of("poolformer_s12", num_classes=5)
    head = small.head.weight.clone()
    metaformer.load_weights(small, path, replace_head=True)
    assert torch.equal(small.head.weight, head)
    assert torch.equal(small.stem.weight, model.stem.weight)
    averaged = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": averaged}, tmp_path / "ours.pt")
    metaformer.load_weights(loaded, tmp_path / "ours.pt", ema=False)
    assert torch.equal(loaded.stem.weight, model.stem.weight)
    metaformer.load_weights(loaded, tmp_path / "ours.pt")
    assert torch.equal(loaded.stem.weight, model.stem.weight + 1)


def test_other_architectures_keep_their_names(tmp_path):
    """DeiT has a patch_embed.proj as well, which is no stem."""
    model = timm.create_model("deit_tiny_patch16_224", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "deit.pt")
    loaded = timm.create_model("deit_tiny_patch16_224", num_classes=3)
    metaformer.load_weights(loaded, tmp_path / "deit.pt")
    assert torch.equal(loaded.patch_embed.proj.weight, model.patch_embed.proj.weight)


class Executes:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no checkpoint"),
        (b"", "damaged"),
        (b"not a checkpoint", "damaged"),
        (b"epoch,train_loss,eval_loss\n", "damaged"),  # the unpickler takes these letters for operations
        ("truncated", "damaged"),
        (Executes(), "could run code"),
        ([1, 2], "holds a list"),
        ({"weight": torch.zeros(3)}, "another architecture"),
    ],
)
def test_unusable_checkpoints_end_in_one_sentence(content, sentence, official_release, capsys):
    _, path = official_release
    if content is None:
        path.unlink()
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=sentence) as error:
        metaformer.load_weights(model_of("poolformer_s12"), path)
    assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out
