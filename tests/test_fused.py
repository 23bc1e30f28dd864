"""The fused form against the plain one, which test_model.py compares with timm's and transformers'."""

import copy
import io
import itertools
import pickle
import re
import threading
from collections.abc import Callable
from functools import partial

import onnxruntime
import pytest
import timm
import torch
import torch.distributed as dist
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import metaformer
from metaformer import MetaFormerBlock, kernels
from metaformer.folding import FoldedBlock
from metaformer.fused import FusedBlock, PoolingHalf, applies, mlp_half
from oracles import randomise, relative_error, timm_twin

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 5}


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


MAPS, DIRECTION = drawn(3, 8, 6, 5), drawn(3, 8, 6, 5, seed=2)


def pair(dtype: torch.dtype = torch.float64, seed: int = 0, **arguments) -> tuple[nn.Module, nn.Module]:
    """The fused and the plain form of a small model with equal weights."""
    fused = randomise(metaformer.MetaFormer(**{**SMALL, **arguments}), seed).to(dtype)
    plain = metaformer.MetaFormer(**{**SMALL, **arguments}, fused=False).to(dtype)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def blocks(**arguments) -> tuple[FusedBlock, MetaFormerBlock]:
    fused, plain = randomise(FusedBlock(8, **arguments)).double(), MetaFormerBlock(8, **arguments).double()
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def trained(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients; the same drop path in every call."""
    torch.manual_seed(0)
    model.zero_grad()
    output = model.train()(images)
    output.pow(2).mean().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    # norm1.bias cancels in pool(x) - x, so that its gradient is zero here and rounding there.
    assert found.keys() == expected.keys()
    return max(relative_error(found[n], expected[n]) for n in expected if not n.endswith("norm1.bias"))


# The function and its derivatives


@pytest.fixture(params=["cpu", "gpu"])
def operators(request, monkeypatch):
    """The operators of a CPU, or those that a GPU computes float32 with, on this CPU."""
    if request.param == "gpu":
        monkeypatch.setattr(kernels, "may_use_tf32", lambda x: True)
        monkeypatch.setattr(kernels, "splits_samples", lambda x: True)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(("pool_size", "layer_scale", "dropped"), [(3, True, True), (5, False, False), (5, True, True)])
def test_derivatives_of_the_pooling_half(pool_size, layer_scale, dropped):
    vectors = [drawn(3).requires_grad_() for _ in range(3 if layer_scale else 2)]
    keep = torch.tensor([0.0, 2.0]).double().view(2, 1, 1, 1) if dropped else None

    def half(x, gamma, beta, scale=None):
        x = x.contiguous(memory_format=torch.channels_last)
        return PoolingHalf.apply(keep, pool_size, 1e-5, x, gamma, beta, scale)

    inputs = (drawn(2, 3, 4, 3).requires_grad_(), *vectors)
    assert gradcheck(half, inputs)
    assert gradgradcheck(half, inputs)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(
    ("recompute", "layer_scale", "dropped"), [(False, True, True), (True, False, False), (True, True, True)]
)
def test_derivatives_of_the_mlp_half(recompute, layer_scale, dropped):
    shapes = [(3,), (3,), (6, 3, 1, 1), (6,), (3, 6, 1, 1), (3,)] + [(3,)] * layer_scale
    weights = [drawn(*shape).requires_grad_() for shape in shapes]
    keep = torch.tensor([0.0, 2.0]).double().view(2, 1, 1, 1) if dropped else None

    def half(x, gamma, beta, w1, b1, w2, b2, scale=None):
        x = x.contiguous(memory_format=torch.channels_last)
        return mlp_half(x, (gamma, beta, w1, b1, w2, b2, scale), keep, 1e-5, recompute)

    inputs = (drawn(2, 3, 2, 2).requires_grad_(), *weights)
    assert gradcheck(half, inputs)
    assert gradgradcheck(half, inputs)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"drop_path_rate": 0.5},
        {"layer_scale_init": None},
        {"token_mixers": partial(metaformer.Pooling, pool_size=5)},
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
    assert {type(block) for stage in fused.stages for block in stage.blocks} == {FusedBlock}
    assert {type(block) for stage in plain.stages for block in stage.blocks} == {MetaFormerBlock}
    images = drawn(3, 3, 70, 45).contiguous(memory_format=layout)
    fused, plain = fused.to(memory_format=layout), plain.to(memory_format=layout)
    (logits, gradients), (expected, expected_gradients) = trained(fused, images), trained(plain, images)
    assert relative_error(logits, expected) < 1e-12
    assert worst(gradients, expected_gradients) < 1e-9
    with torch.inference_mode():
        assert relative_error(fused.eval()(images), plain.eval()(images)) < 1e-12


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_the_operators_of_a_gpu_compute_the_same_function(dtype, tolerance):
    """Also where the mean of the maps is large beside their deviation."""
    fused, plain = (model.to(dtype) for model in pair(drop_path_rate=0.5))
    images = drawn(3, 3, 64, 64, dtype=dtype) + 10
    (logits, gradients), (expected, expected_gradients) = trained(fused, images), trained(plain, images)
    assert relative_error(logits, expected) < tolerance
    assert worst(gradients, expected_gradients) < 100 * tolerance
    assert relative_error(metaformer.fuse(plain)(images), plain.eval()(images)) < tolerance


@pytest.mark.parametrize("samples", [1, 2])
def test_the_mlp_in_parts_of_the_batch_is_the_same_function(samples, monkeypatch):
    fused, plain = pair(drop_path_rate=0.5)
    images = drawn(3, 3, 64, 64)
    expected, expected_gradients = trained(plain, images)
    taken = []
    monkeypatch.setattr(metaformer.fused, "CACHED", samples * 8 * 32 * 16 * 16)  # of stage 1's hidden maps
    statistics = metaformer.kernels.statistics
    monkeypatch.setattr(metaformer.kernels, "statistics", lambda x, eps: taken.append(len(x)) or statistics(x, eps))
    logits, gradients = trained(fused, images)
    assert samples in taken
    assert relative_error(logits, expected) < 1e-12
    assert worst(gradients, expected_gradients) < 1e-9


class Operators(TorchDispatchMode):
    """Notes the namespaces of the operators that are called, such as aten and mkldnn."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("avx512", sorted({kernels.AVX512, False}))
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_products_equal_convolutions(dtype, enabled, avx512, monkeypatch):
    """With oneDNN and without it, for maps, weights and biases of any strides, and for no maps."""
    monkeypatch.setattr(kernels, "AVX512", avx512)
    wide, bias = drawn(2, 66, 7, 10).to(dtype), drawn(18).to(dtype)[::2]
    last = wide[:, :33].contiguous(memory_format=torch.channels_last)
    inputs = [last, last[..., ::2], wide[:, ::2], last[:1].expand(3, -1, -1, -1), last[:0]]
    weights = [drawn(9, 33).to(dtype), drawn(33, 9).to(dtype).t(), drawn(18, 66).to(dtype)[::2, 1::2]]
    cases = list(itertools.product(inputs, weights, [(bias, True), (None, False)]))
    with torch.backends.mkldnn.flags(enabled=enabled), Operators() as operators:
        results = [kernels.pointwise(x, weight, *others) for x, weight, others in cases]
    known = (torch.float32, torch.bfloat16) if avx512 else (torch.float32,)
    assert ("mkldnn" in operators.seen) == (enabled and dtype in known)
    for (x, weight, (added, activate)), found in zip(cases, results, strict=True):
        expected = F.conv2d(x.double(), weight.double()[:, :, None, None], None if added is None else added.double())
        expected = F.gelu(expected) if activate else expected
        assert (found.dtype, found.shape) == (dtype, expected.shape)
        assert found.numel() == 0 or relative_error(found, expected) < 4 * torch.finfo(dtype).eps


def test_the_bias_of_the_first_norm_has_no_effect():
    fused, plain = blocks()
    (_, gradients), (_, expected) = trained(fused, MAPS), trained(plain, MAPS)
    # Zero and not None: DistributedDataParallel waits for a gradient of every parameter.
    assert not gradients["norm1.bias"].any()
    assert expected["norm1.bias"].norm() < 1e-12 * expected["norm1.weight"].norm()


@pytest.mark.parametrize("avx512", [True, False])
def test_rounding_in_float32_is_that_of_the_plain_form(avx512, monkeypatch):
    monkeypatch.setattr(kernels, "AVX512", avx512)
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


@pytest.mark.parametrize("token_mixer", [metaformer.Pooling, metaformer.DepthwiseConv])
def test_gradient_checkpointing_keeps_less_and_changes_rounding_only(token_mixer):
    model, _ = pair(drop_path_rate=0.5, token_mixers=token_mixer)
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


class Stateful(nn.Module):
    """Its buffers change before it uses them, one in its place and one by assignment."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("added", torch.ones(()))
        self.register_buffer("assigned", torch.ones(()))

    def forward(self, x):
        self.added.add_(1)
        self.assigned = self.assigned + 1
        return x * self.added.clone() * self.assigned


def test_gradient_checkpointing_computes_again_from_the_same_state():
    """Also in each backward pass through a kept graph, and with parameters that only the forward pass has."""
    results = []
    for enable in (False, True):
        block = randomise(MetaFormerBlock(8, Stateful)).double()
        block.recompute = enable
        parameters = {name: (2 * p).detach().requires_grad_() for name, p in block.named_parameters()}
        maps = MAPS.clone().requires_grad_()
        output = functional_call(block, parameters, maps).pow(2).sum()
        (penalised,) = torch.autograd.grad(output, maps, create_graph=True)
        penalised.pow(2).sum().backward()
        results.append({**{name: p.grad for name, p in parameters.items()}, **dict(block.named_buffers())})
    assert results[1]["token_mixer.added"] == results[1]["token_mixer.assigned"] == 2
    assert worst(results[1], results[0]) < 1e-12


@pytest.mark.parametrize("token_mixer", [metaformer.Pooling, metaformer.DepthwiseConv])
def test_weights_changed_before_the_backward_pass_are_noticed_with_gradient_checkpointing(token_mixer):
    block = FusedBlock(8, token_mixer).double()
    block.recompute = True
    output = block(MAPS).sum()
    with torch.no_grad():
        block.mlp.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


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


def test_saved_activations_of_s12(monkeypatch):
    """At most 75 % of timm's for a small batch, 45 % for a large one, and 20 % where a product is computed twice.

    For one image the last two stages are computed in the plain form, since they have more channels than positions.
    """
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
    assert 0.75 * theirs < saved(model) <= 0.85 * theirs
    monkeypatch.setattr(metaformer.fused, "plain_is_faster", lambda _: False)
    assert saved(model) <= 0.75 * theirs
    monkeypatch.setattr(metaformer.fused, "CACHED", 0)  # as if the batch were large
    assert saved(model) <= 0.45 * theirs
    model.set_grad_checkpointing()
    assert saved(model) <= 0.20 * theirs


# Changed parts: the fused block gives what the plain one gives and raises what it raises


def setting(path: str, value: object) -> Callable[[nn.Module], None]:
    owner, _, name = path.rpartition(".")
    return lambda block: setattr(block.get_submodule(owner), name, value)


def fc1(**arguments) -> Callable[[nn.Module], None]:
    def change(block):
        torch.manual_seed(0)
        block.mlp.fc1 = nn.Conv2d(8, 32, **{"kernel_size": 1, **arguments}).double()

    return change


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(drawn(2, 8)), nn.Parameter(drawn(32, 2))

    def forward(self, weight):
        return weight + (self.up @ self.down)[:, :, None, None]


class Doubled(metaformer.Pooling):
    def forward(self, x):
        return 2 * super().forward(x)


class Ramp(nn.Module):
    """A drop path of one's own: keeps every sample, by its number."""

    def forward(self, x):
        return x * torch.arange(1.0, len(x) + 1, dtype=x.dtype).view(-1, 1, 1, 1) if self.training else x


def without_affine(block):
    block.norm1.weight = block.norm1.bias = block.norm2.weight = block.norm2.bias = None


def spectral(block):
    torch.manual_seed(0)
    parametrizations.spectral_norm(block.mlp.fc1)


CHANGES = {
    "nothing": lambda block: None,
    "divisor": setting("token_mixer.pool.divisor_override", 9),
    "border": setting("token_mixer.pool.count_include_pad", True),
    "unsubtracted": setting("token_mixer.subtract", False),
    "pool stride": setting("token_mixer.pool.stride", 2),
    "pool padding": setting("token_mixer.pool.padding", 0),
    "tuple kernel size": setting("token_mixer.pool.kernel_size", (3, 3)),
    "pool size": lambda block: setattr(block.token_mixer, "pool", nn.AvgPool2d(5, 1, 2, count_include_pad=False)),
    "norm1 groups": setting("norm1.num_groups", 2),
    "norm2 groups": setting("norm2.num_groups", 4),
    "eps": setting("norm1.eps", 0.1),
    "no affine": without_affine,
    "scalar layer scale": setting("layer_scale1", nn.Parameter(torch.tensor([2.0]).double())),
    "no layer scale": setting("layer_scale2", None),
    "no residual": setting("residual", False),
    "drop path": setting("drop_path", Ramp()),
    "fc1 stride": setting("mlp.fc1.stride", (2, 2)),
    "fc1 padding": setting("mlp.fc1.padding", (1, 1)),
    "fc1 without bias": fc1(bias=False),
    "fc1 with groups": fc1(groups=2),
    "fc1 of 3x3": fc1(kernel_size=3, padding=1),
    "fc1 with another width": setting("mlp.fc1", nn.Conv2d(8, 16, 1).double()),
    "tanh": setting("mlp.act.approximate", "tanh"),
    "relu": setting("mlp.act", nn.ReLU()),
    "float32 norm": lambda block: block.norm1.float(),
    "subclass": setting("token_mixer", Doubled(8)),
    "equation of an instance": setting("add", lambda x, branch, layer_scale: x + 2 * branch),
    "forward of an instance": lambda block: setattr(block.token_mixer, "forward", lambda x: 3 * x),
    "low rank": lambda block: register_parametrization(block.mlp.fc1, "weight", LowRank()),
    "weight norm": lambda block: parametrizations.weight_norm(block.mlp.fc2),
    "older weight norm": lambda block: hooked_weight_norm(block.mlp.fc2),
    "spectral norm": spectral,
    "pruning": lambda block: prune.l1_unstructured(block.mlp.fc1, "weight", 0.5),
    "forward hook": lambda block: block.norm2.register_forward_hook(lambda module, x, y: 2 * y) and None,
    "pre-hook": lambda block: block.mlp.act.register_forward_pre_hook(lambda module, x: (2 * x[0],)) and None,
    "backward hook": lambda block: block.mlp.register_full_backward_hook(lambda module, x, y: (2 * x[0],)) and None,
    "backward pre-hook": lambda block: block.mlp.fc2.register_full_backward_pre_hook(lambda module, y: (2 * y[0],)),
}
FUSED = {"nothing", "pool size", "eps", "no layer scale"}
"""Changes that the fused form takes into account."""


def outcome(compute: Callable) -> list[Tensor] | type[Exception]:
    torch.manual_seed(0)
    try:
        return flat(compute())
    except Exception as error:
        return type(error)


def flat(results: object) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results.detach()]
    return [tensor for one in (results.values() if isinstance(results, dict) else results) for tensor in flat(one)]


def assert_equal_outcome(found: list[Tensor] | type[Exception], expected: list[Tensor] | type[Exception]) -> None:
    if isinstance(expected, type):
        assert found is expected
        return
    assert not isinstance(found, type), found
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert all(torch.allclose(*each, rtol=1e-8, atol=1e-11) for each in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_block_computes_what_the_plain_one_does(name):
    fused, plain = blocks(drop_path=0.5)
    for block in (fused, plain):
        CHANGES[name](block)
    assert applies(fused, MAPS) == (name in FUSED)
    assert_equal_outcome(outcome(lambda: trained(fused, MAPS)), outcome(lambda: trained(plain, MAPS)))
    assert_equal_outcome(outcome(lambda: fused.eval()(MAPS)), outcome(lambda: plain.eval()(MAPS)))


@pytest.mark.parametrize("name", CHANGES)
def test_folding_leaves_changed_blocks_as_they_are(name):
    plain = nn.Sequential(*(blocks(drop_path=0.5)[1] for _ in range(2)))
    CHANGES[name](plain[1])
    plain.eval()
    if name in ("pruning", "older weight norm"):  # they leave weights that are not leaves, which cannot be copied
        with pytest.raises(metaformer.InputError, match="make pruning or weight norm permanent"):
            metaformer.fuse(plain)
        return
    folded = metaformer.fuse(plain)
    assert isinstance(folded[1], MetaFormerBlock) == (name not in FUSED)
    assert_equal_outcome(outcome(lambda: folded(MAPS)), outcome(lambda: plain(MAPS)))


def test_patched_classes_and_global_hooks_are_respected(monkeypatch):
    fused, _ = blocks()
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(metaformer.Pooling, "forward", lambda self, x: seen.append("patched") or x)
        fused(MAPS)
    hook = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    fused(MAPS)
    hook.remove()
    with monkeypatch.context() as patch:
        patch.setattr(MetaFormerBlock, "plain", lambda self, x: seen.append("patched") or x)
        fused(MAPS)
    assert seen.count("patched") == 2
    assert {"MLN", "Pooling", "ChannelMlp", "GELU"} <= set(seen)
    assert applies(fused, MAPS)


def test_folding_keeps_subclasses_and_hooks_of_blocks():
    class Mine(MetaFormerBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked, watched = blocks()[0], blocks()[1]
    hooked.register_forward_hook(lambda module, x, y: 3 * y)
    watched.register_full_backward_hook(lambda *_: None)
    model = nn.Sequential(blocks()[0], Mine(8).double(), hooked, watched).eval()
    folded = metaformer.fuse(model)
    assert [type(block).__name__ for block in folded] == ["FoldedBlock", "Mine", "FusedBlock", "MetaFormerBlock"]
    assert_equal_outcome(outcome(lambda: folded(MAPS)), outcome(lambda: model(MAPS)))


class Labelled(Tensor):
    pass


INPUTS = {
    "channels-last": MAPS.contiguous(memory_format=torch.channels_last),
    "expanded": MAPS[:1].expand(3, -1, -1, -1),
    "one position": MAPS[:, :, :1, :1],
    "no samples": MAPS[:0],
    "no positions": MAPS[:, :, :0],
    "no batch": MAPS[0],
    "one channel": MAPS[:, :1],
    "float32": MAPS.float(),
    "integers": MAPS.long(),
    "a parameter": nn.Parameter(MAPS),
    "a subclass": MAPS.as_subclass(Labelled),
}


@pytest.mark.parametrize("name", INPUTS)
def test_unusual_inputs(name):
    fused, plain = blocks()
    assert_equal_outcome(outcome(lambda: trained(fused, INPUTS[name])), outcome(lambda: trained(plain, INPUTS[name])))
    folded, expected = metaformer.fuse(nn.Sequential(plain)), outcome(lambda: plain(INPUTS[name]))
    found = outcome(lambda: folded(INPUTS[name]))
    if isinstance(expected, type):
        assert found in (expected, metaformer.InputError)
    else:
        assert_equal_outcome(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_beside_float32(dtype):
    """Weights in bfloat16 with norms in float32 work in the plain form; so does neither with float32 maps."""
    for part in ("norm1", "norm2"):
        fused, plain = (block.bfloat16() for block in blocks())
        for block in (fused, plain):
            block.get_submodule(part).float()
        maps = MAPS.to(dtype)
        assert_equal_outcome(outcome(lambda: fused(maps)), outcome(lambda: plain(maps)))  # noqa: B023


# Transforms


def loss(model: nn.Module, maps: Tensor) -> Tensor:
    return model(maps).pow(3).mean()


def second_derivatives_of_parameters(model: nn.Module) -> tuple[Tensor, ...]:
    """Of a block that is applied twice, so that its input depends on its weights."""
    parameters = tuple(model.parameters())
    first = torch.autograd.grad(loss(model, model(MAPS)), parameters, create_graph=True)
    return torch.autograd.grad(first, parameters, [torch.ones_like(parameter) for parameter in parameters])


def third_derivatives(model: nn.Module) -> tuple[Tensor, ...]:
    maps = MAPS.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(model, maps), maps, create_graph=True)
    (second,) = torch.autograd.grad((first * DIRECTION).sum(), maps, create_graph=True)
    return torch.autograd.grad((second * DIRECTION).sum(), maps)


def per_sample_gradients(model: nn.Module) -> dict[str, Tensor]:
    def of_sample(parameters, sample):
        return functional_call(model, parameters, (sample[None],)).pow(3).mean()

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return vmap(grad(of_sample), in_dims=(None, 0))(parameters, MAPS)


def forward_mode(model: nn.Module) -> list[Tensor]:
    with forward_ad.dual_level():
        of_maps = forward_ad.unpack_dual(model(forward_ad.make_dual(MAPS, DIRECTION))).tangent
        dual = {n: forward_ad.make_dual(p.detach(), torch.ones_like(p)) for n, p in model.named_parameters()}
        return [of_maps, forward_ad.unpack_dual(functional_call(model, dual, (MAPS,))).tangent]


def batched_gradients(model: nn.Module) -> list[Tensor]:
    maps = MAPS.clone().requires_grad_()
    several = torch.stack([DIRECTION, 2 * DIRECTION])
    (plain,) = torch.autograd.grad(model(maps), maps, several, is_grads_batched=True)
    (kept,) = torch.autograd.grad(model(maps), maps, several, is_grads_batched=True, create_graph=True)
    return [plain, kept, *torch.autograd.grad(kept.pow(2).sum(), maps)]


def traced_in_training(model: nn.Module) -> list[Tensor]:
    maps = MAPS.clone().requires_grad_()
    traced = torch.jit.trace(model, maps)
    return [traced(maps), *torch.autograd.grad(traced(maps).pow(2).sum(), maps)]


def compiled(model: nn.Module) -> list[Tensor]:
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    return [run(MAPS), run(MAPS[:2, :, 1:]), *torch.autograd.grad(run(MAPS).pow(2).sum(), tuple(model.parameters()))]


TRANSFORMS = {
    "second derivatives of parameters": second_derivatives_of_parameters,
    "third derivatives": third_derivatives,
    "hvp": lambda model: torch.autograd.functional.hvp(partial(loss, model), MAPS, DIRECTION)[1],
    "vectorised jacobian": lambda model: torch.autograd.functional.jacobian(model, MAPS[:1], vectorize=True),
    "vmap": lambda model: vmap(model)(torch.stack([MAPS, DIRECTION])),
    "per-sample gradients": per_sample_gradients,
    "grad": lambda model: grad(partial(loss, model))(MAPS),
    "vjp": lambda model: vjp(model, MAPS)[1](DIRECTION),
    "jvp": lambda model: jvp(model, (MAPS,), (DIRECTION,))[1],
    "jacrev": lambda model: jacrev(model)(MAPS[:1]),
    "jacfwd": lambda model: jacfwd(model)(MAPS[:1]),
    "hessian": lambda model: hessian(partial(loss, model))(MAPS[:1, :, :3, :3]),
    "forward mode": forward_mode,
    "batched gradients": batched_gradients,
    "jit.trace in training": traced_in_training,
    "jit.script": lambda model: torch.jit.script(model)(MAPS),
    "symbolic_trace": lambda model: torch.fx.symbolic_trace(model)(MAPS),
    "compile": compiled,
    "compiled grad": lambda model: torch.compile(grad(partial(loss, model)), backend="aot_eager")(MAPS),
    "inference mode": torch.inference_mode()(lambda model: model(MAPS).clone()),
}
PARAMETERS_NEEDED = {"second derivatives of parameters", "per-sample gradients", "forward mode", "compile"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, monkeypatch):
    monkeypatch.setattr(metaformer.fused, "plain_is_faster", lambda _: False)  # as on a GPU, also when compiled
    fused, plain = blocks()
    folded = metaformer.fuse(nn.Sequential(plain))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: function)  # the plain form serves as it is
        expected = outcome(lambda: TRANSFORMS[name](plain))
        expected_of_folded = outcome(lambda: TRANSFORMS[name](plain.eval()))
    assert not isinstance(expected, type)
    assert_equal_outcome(outcome(lambda: TRANSFORMS[name](fused)), expected)
    if name not in PARAMETERS_NEEDED | {"jit.script", "symbolic_trace"}:
        assert_equal_outcome(outcome(lambda: TRANSFORMS[name](folded)), expected_of_folded)


def test_a_block_compiled_for_a_cpu_is_the_plain_form():
    fused, _ = blocks()
    recorded = EagerAndRecordGraphs()
    torch.compile(fused, backend=recorded)(MAPS)
    called = [node.target for node in recorded.graphs[0].graph.nodes]
    assert called.count(nn.functional.group_norm) == 2  # the fused form calls it in no forward pass


def test_gradients_of_a_folded_model_in_float32():
    """Those for its input, and for its weights if they are made trainable."""
    model = randomise(metaformer.MetaFormer(**SMALL)).eval()
    folded, images = metaformer.fuse(model), drawn(2, 3, 64, 64, dtype=torch.float32).requires_grad_()
    (expected,) = torch.autograd.grad(model(images).pow(2).sum(), images)
    (found,) = torch.autograd.grad(folded(images).pow(2).sum(), images)
    assert relative_error(found, expected) < 1e-5
    block = folded.stages[3].blocks[0]
    block.b2.requires_grad_()
    (found,) = torch.autograd.grad(folded(images).pow(2).sum(), block.b2)
    bias = model.stages[3].blocks[0].mlp.fc2.bias
    assert relative_error(found, torch.autograd.grad(model(images).pow(2).sum(), bias)[0]) < 1e-5


# Wrappers


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """One process on the CPU."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (1,))
    for stage in model.stages:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {
    "FSDP2": sharded,
    "replicate": replicate,
    "DDP": nn.parallel.DistributedDataParallel,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved_in_memory(model), weights_only=False),
    "dynamic quantisation": lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Conv2d}),
}


def saved_in_memory(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(name, process_group):
    fused, plain = pair(drop_path_rate=0.2)
    images = drawn(2, 3, 64, 64)
    expected, expected_gradients = trained(plain, images)
    logits, gradients = trained(WRAPPERS[name](fused), images)
    gradients = {n.removeprefix("module."): getattr(g, "full_tensor", lambda g=g: g)() for n, g in gradients.items()}
    assert relative_error(logits, expected) < 1e-12
    assert worst(gradients, expected_gradients) < 1e-9


def test_dynamic_quantisation_of_the_classifier():
    fused, plain = (torch.ao.quantization.quantize_dynamic(model) for model in pair(torch.float32))
    images = drawn(2, 3, 64, 64).float()
    assert isinstance(fused.head, torch.ao.nn.quantized.dynamic.Linear)
    assert relative_error(fused.eval()(images), plain.eval()(images)) < 0.02


def test_meta_tensors():
    with torch.device("meta"):
        model = metaformer.MetaFormer(**SMALL)
        logits = model(torch.empty(2, 3, 64, 64))
        logits.sum().backward()
    assert logits.shape == (2, 5)
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


# Folded models


@pytest.mark.parametrize(("name", "avx512"), [("poolformer_s12", True), ("metaformer_s12_pool7", False)])
def test_folded_models_are_the_same_function(name, avx512, monkeypatch):
    monkeypatch.setattr(kernels, "AVX512", avx512)
    model = randomise(timm.create_model(name, num_classes=7, fused=False)).eval()
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
        with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 as it is
            assert relative_error(metaformer.fuse(model.double())(images), model(images)) < 1e-12
    model.float()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_folded_models_are_exported(tmp_path):
    folded = metaformer.fuse(randomise(metaformer.MetaFormer(**SMALL)).eval())
    images = drawn(2, 3, 64, 64).float()
    exported = torch.export.export(folded, (images,))
    torch.onnx.export(exported, (), tmp_path / "folded.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "folded.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        assert relative_error(torch.from_numpy(logits), folded(images)) < 1e-5
        assert relative_error(exported.module()(images), folded(images)) < 1e-5
        compiled = torch.compile(folded, backend="aot_eager", fullgraph=True)
        assert relative_error(compiled(images), folded(images)) < 1e-5


def test_a_block_alone_is_folded():
    block = randomise(MetaFormerBlock(8)).eval()
    maps = drawn(2, 8, 5, 6).float()
    folded = metaformer.fuse(block)
    assert isinstance(folded, FoldedBlock)
    with torch.inference_mode():
        assert relative_error(folded(maps), block(maps)) < 1e-6


@pytest.mark.parametrize("kept", [nn.Parameter(torch.ones(1)) + 1, threading.Lock()], ids=["activation", "lock"])
def test_what_cannot_be_copied_is_not_folded(kept):
    block = blocks()[0]
    block.kept = kept
    with pytest.raises(metaformer.InputError, match="FusedBlock cannot be copied: remove what it keeps"):
        metaformer.fuse(block)


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
