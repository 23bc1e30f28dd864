"""The fused form against the plain one, which test_model.py compares with timm's and transformers'."""

import copy
import re

import onnxruntime
import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

import metaformer
from metaformer.fused import mlp_half, pooling_half
from metaformer.model import MetaFormerBlock
from oracles import randomise, relative_error, timm_twin

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 5}


def pair(dtype: torch.dtype = torch.float64, seed: int = 0, **arguments) -> tuple[nn.Module, nn.Module]:
    """The fused and the plain form of a small model with equal weights."""
    fused = randomise(metaformer.MetaFormer(**{**SMALL, **arguments}), seed).to(dtype)
    plain = metaformer.MetaFormer(**{**SMALL, **arguments}, fused=False).to(dtype)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients; the same drop path in every call."""
    torch.manual_seed(0)
    model.zero_grad()
    logits = model.train()(images)
    logits.pow(2).mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(relative_error(found[n], expected[n]) for n in expected if not n.endswith("norm1.bias"))


@pytest.mark.parametrize("pool_size", [3, 5])
@pytest.mark.parametrize("layer_scale", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
def test_gradcheck_of_the_pooling_half(pool_size, layer_scale, dropped):
    vectors = [drawn(3).requires_grad_() for _ in range(3 if layer_scale else 2)]
    keep = torch.tensor([0.0, 2.0]).double().view(2, 1, 1, 1) if dropped else None

    def half(x, gamma, beta, scale=None):
        return pooling_half(x, gamma, beta, scale, keep, pool_size, 1e-5)

    assert gradcheck(half, (drawn(2, 3, 5, 4).requires_grad_(), *vectors))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("layer_scale", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
def test_gradcheck_of_the_mlp_half(recompute, layer_scale, dropped):
    shapes = [(3,), (3,), (6, 3, 1, 1), (6,), (3, 6, 1, 1), (3,)] + [(3,)] * layer_scale
    weights = [drawn(*shape).requires_grad_() for shape in shapes]
    keep = torch.tensor([0.0, 2.0]).double().view(2, 1, 1, 1) if dropped else None

    def half(x, gamma, beta, w1, b1, w2, b2, scale=None):
        return mlp_half(x, gamma, beta, w1, b1, w2, b2, scale, keep, 1e-5, recompute)

    assert gradcheck(half, (drawn(2, 3, 2, 3).requires_grad_(), *weights))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"drop_path_rate": 0.5},
        {"layer_scale_init": None},
        {"token_mixers": lambda dim: metaformer.Pooling(dim, 5)},
        {"act_layer": nn.ReLU},
        {"mlp_ratio": None},
        {"residual": False},
        {"token_mixers": metaformer.DepthwiseConv},
        {"token_mixers": [metaformer.Pooling, metaformer.Pooling, metaformer.Attention, metaformer.Attention],
         "dims": (8, 16, 32, 32), "norm_layers": metaformer.ChannelLayerNorm},
    ],
    ids=lambda arguments: "+".join(arguments) or "poolformer",
)  # fmt: skip
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_same_function_and_gradients(arguments, layout):
    fused, plain = pair(**arguments)
    images = drawn(3, 3, 70, 45).contiguous(memory_format=layout)
    fused, plain = fused.to(memory_format=layout), plain.to(memory_format=layout)
    (logits, gradients), (expected, expected_gradients) = trained(fused, images), trained(plain, images)
    assert relative_error(logits, expected) < 1e-12
    assert worst(gradients, expected_gradients) < 1e-9
    with torch.inference_mode():
        assert relative_error(fused.eval()(images), plain.eval()(images)) < 1e-12


@pytest.mark.parametrize("samples", [1, 2])
def test_the_mlp_in_parts_of_the_batch_is_the_same_function(samples, monkeypatch):
    fused, plain = pair(drop_path_rate=0.5)
    images = drawn(3, 3, 64, 64)
    expected, expected_gradients = trained(plain, images)
    taken = []
    monkeypatch.setattr(metaformer.fused, "CACHED", samples * 8 * 32 * 16 * 16)  # of stage 1's hidden maps
    statistics = metaformer.fused.statistics
    monkeypatch.setattr(metaformer.fused, "statistics", lambda x, eps: taken.append(len(x)) or statistics(x, eps))
    logits, gradients = trained(fused, images)
    assert samples in taken
    assert relative_error(logits, expected) < 1e-12
    assert worst(gradients, expected_gradients) < 1e-9


def test_the_bias_of_the_first_norm_has_no_effect():
    fused, plain = pair()
    images = drawn(2, 3, 64, 64)
    (_, gradients), (_, expected) = trained(fused, images), trained(plain, images)
    biases = [name for name in gradients if name.endswith("norm1.bias")]
    assert len(biases) == 5
    for name in biases:
        # Zero and not None: DistributedDataParallel waits for a gradient of every parameter.
        assert not gradients[name].any()
        assert expected[name].norm() < 1e-12 * expected[name.replace("bias", "weight")].norm()


def test_rounding_in_float32_is_that_of_the_plain_form():
    model = randomise(timm.create_model("poolformer_s12", num_classes=10)).train()
    plain = timm.create_model("poolformer_s12", num_classes=10, fused=False)
    plain.load_state_dict(model.state_dict())
    images = drawn(2, 3, 64, 64, dtype=torch.float32)
    logits, truth = trained(copy.deepcopy(plain).double(), images.double())
    errors = []
    for form in (model, plain):
        found, gradients = trained(form, images)
        assert relative_error(found, logits) < 2e-6
        errors.append(worst(gradients, truth))
    assert errors[0] < max(2 * errors[1], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_no_more_than_the_plain_form(dtype):
    fused, plain = pair(torch.float32, drop_path_rate=0.3)
    images = drawn(4, 3, 64, 64, dtype=torch.float32)
    truth, gradients = trained(copy.deepcopy(plain).double(), images.double())
    errors = []
    for model in (fused, plain):
        with torch.autocast("cpu", dtype):
            logits, found = trained(model, images)
            features = model.forward_features(images)
        assert features.dtype == torch.float32
        assert {g.dtype for g in found.values()} == {torch.float32}
        errors.append((relative_error(logits, truth), worst(found, gradients)))
    assert errors[0][0] < max(1.5 * errors[1][0], 4 * torch.finfo(dtype).eps)
    assert errors[0][1] < 1.5 * errors[1][1]


def test_a_model_in_half_precision():
    fused, plain = (model.bfloat16().eval() for model in pair(torch.float32))
    images = drawn(2, 3, 64, 64).bfloat16()
    with torch.inference_mode():
        truth = copy.deepcopy(plain).double()(images.double())
        assert fused(images).dtype == torch.bfloat16
        assert relative_error(fused(images), truth) < 1.5 * relative_error(plain(images), truth)


def test_gradient_checkpointing_keeps_less_and_changes_rounding_only():
    model, _ = pair(drop_path_rate=0.5)
    images = drawn(2, 3, 64, 64)
    sizes, results = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            results.append(trained(model, images)[1])
        sizes.append(sum(kept))
    assert sizes[1] < 0.8 * sizes[0]
    assert worst(*results) < 1e-10


def watching(block: MetaFormerBlock, calls: list) -> None:
    block.token_mixer.register_forward_hook(lambda *_: calls.append("hook"))


def computing(block: MetaFormerBlock, calls: list) -> None:
    forward = block.token_mixer.forward
    block.token_mixer.forward = lambda x: calls.append("forward") or forward(x)


def replacing(block: MetaFormerBlock, calls: list) -> None:
    class Mine(metaformer.Pooling):
        def forward(self, x):
            calls.append("class")
            return super().forward(x)

    block.token_mixer = Mine(8)


@pytest.mark.parametrize("change", [("pool.count_include_pad", True), ("subtract", False)])
def test_another_pooling_is_computed_as_it_is(change):
    fused, plain = pair()
    images = drawn(1, 3, 64, 64)
    before = trained(fused, images)[0]
    name, value = change
    for model in (fused, plain):
        owner, _, attribute = f"token_mixer.{name}".rpartition(".")
        setattr(model.stages[0].blocks[0].get_submodule(owner), attribute, value)
    logits = trained(fused, images)[0]
    assert relative_error(logits, trained(plain, images)[0]) < 1e-12
    assert relative_error(logits, before) > 1e-6


@pytest.mark.parametrize("change", [watching, computing, replacing])
def test_a_changed_mixer_is_the_one_that_runs(change):
    fused, _ = pair()
    images, calls = drawn(1, 3, 64, 64), []
    expected = trained(fused, images)
    block = fused.stages[0].blocks[0]
    assert block.fusable == (True, True)
    change(block, calls)
    assert block.fusable == (False, False)
    logits, gradients = trained(fused, images)
    assert len(calls) == 1
    assert relative_error(logits, expected[0]) < 1e-12
    assert worst(gradients, expected[1]) < 1e-9


def test_parts_without_gradient():
    fused, plain = pair()
    images = drawn(2, 3, 64, 64)
    for model in (fused, plain):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = bool(re.search(r"stages\.[23].*(norm2|layer_scale1)|^head", name))
        model(images).pow(2).mean().backward()
    for (name, ours), (_, theirs) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or relative_error(ours.grad, theirs.grad) < 1e-9, name


def test_second_derivatives_are_refused_not_wrong():
    fused, _ = pair()
    images = drawn(1, 3, 64, 64).requires_grad_()
    (gradient,) = torch.autograd.grad(fused(images).sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_saved_activations_of_s12():
    """At most 45 % of timm's, and at most 20 % where a product is computed twice."""
    model = timm.create_model("poolformer_s12").train()
    images = drawn(1, 3, 224, 224, dtype=torch.float32)

    def saved(model):
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images)
        return sum(size for size, _ in kept.values())

    theirs = saved(timm_twin("poolformer_s12", model))
    assert round(theirs / 1e6, 1) == 59.7
    assert saved(model) <= 0.45 * theirs
    model.set_grad_checkpointing()
    assert saved(model) <= 0.20 * theirs


@pytest.mark.parametrize("name", ["poolformer_s12", "metaformer_s12_pool7"])
def test_folded_models_are_the_same_function(name):
    model = randomise(timm.create_model(name, num_classes=7)).eval()
    before = copy.deepcopy(model.state_dict())
    folded = metaformer.fuse(model.train())
    assert model.training
    assert not folded.training
    model.eval()
    assert not any(isinstance(m, MetaFormerBlock) for m in folded.modules())
    assert not any(re.search(r"norm[12]|layer_scale", key) for key in folded.state_dict())
    with torch.inference_mode():
        for images in (drawn(2, 3, 224, 224), drawn(1, 3, 67, 40)):
            images = images.float()
            assert relative_error(folded(images), model(images)) < 2e-6
            levels = folded.forward_intermediates(images, intermediates_only=True)
            for ours, theirs in zip(levels, model.forward_intermediates(images, intermediates_only=True), strict=True):
                assert relative_error(ours, theirs) < 2e-6
        images = drawn(2, 3, 64, 64)
        assert relative_error(metaformer.fuse(model.double())(images), model(images)) < 1e-12
    model.float()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_folded_models_are_exported(tmp_path):
    folded = metaformer.fuse(randomise(metaformer.MetaFormer(**SMALL)).eval())
    images = drawn(2, 3, 64, 64).float()
    torch.onnx.export(folded, (images,), tmp_path / "folded.onnx", dynamo=True, verbose=False)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "folded.onnx").run(None, {"x": images.numpy()})
    with torch.inference_mode():
        assert relative_error(torch.from_numpy(logits), folded(images)) < 1e-5
        assert relative_error(torch.export.export(folded, (images,)).module()(images), folded(images)) < 1e-5
        compiled = torch.compile(folded, backend="aot_eager")
        assert relative_error(compiled(images), folded(images)) < 1e-5


def test_folding_needs_a_block_to_fold():
    with pytest.raises(metaformer.InputError, match="nothing to fold"):
        metaformer.fuse(timm.create_model("metaformer_s12_identity"))
    partly = metaformer.MetaFormer(**{**SMALL, "token_mixers": [nn.Identity, metaformer.Pooling] * 2})
    assert sum(isinstance(m, MetaFormerBlock) for m in metaformer.fuse(partly).modules()) == 3


def test_operations_are_counted_as_in_the_plain_form():
    fused, plain = (model.eval() for model in pair(torch.float32))
    images = drawn(1, 3, 64, 64).float()
    counts = []
    for model in (fused, plain):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(images)
        macs = FlopCountAnalysis(model, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()
        counts.append((counter.get_total_flops(), macs))
    assert counts[0] == counts[1]
