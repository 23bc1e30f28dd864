"""The installed mmcv.ops against slow references, written from the definitions on fractions and float64 numbers."""

import importlib.machinery
import math
from fractions import Fraction
from itertools import product
from pathlib import Path

import mmcv._ext
import mmcv.ops
import numpy as np
import pytest
import torch

from conftest import ROOT

HALVES = [torch.float16, torch.bfloat16]


def test_the_installed_file_is_the_repositorys():
    source = ROOT / "mmcv-torchvision-ops/mmcv/_ext.py"
    assert Path(mmcv._ext.__file__).read_bytes() == source.read_bytes(), (
        f"{mmcv._ext.__file__} is not {source}, and the tests here would not test it: run `make install`"
    )


def test_a_compiled_mmcv_wins(tmp_path):
    (tmp_path / "_ext.py").write_bytes(Path(mmcv._ext.__file__).read_bytes())
    assert importlib.machinery.PathFinder.find_spec("_ext", [str(tmp_path)]).origin == str(tmp_path / "_ext.py")
    compiled = tmp_path / f"_ext{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    compiled.touch()
    found = importlib.machinery.PathFinder.find_spec("_ext", [str(tmp_path)])
    assert isinstance(found.loader, importlib.machinery.ExtensionFileLoader)
    assert found.origin == str(compiled)


@pytest.mark.parametrize(
    ("operator", "call"),
    [
        ("roi_pool_forward", lambda: mmcv.ops.RoIPool(2)(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5))),
        (
            "deform_conv_forward",
            lambda: mmcv.ops.deform_conv2d(torch.zeros(1, 1, 4, 4), torch.zeros(1, 18, 2, 2), torch.zeros(1, 1, 3, 3)),
        ),
        ("softnms", lambda: mmcv.ops.soft_nms(torch.zeros(2, 4), torch.zeros(2))),
        ("nms_match", lambda: mmcv.ops.nms_match(torch.zeros(2, 5), 0.5)),
        (
            "roi_align_forward with pool_mode='max'",
            lambda: mmcv.ops.RoIAlign(2, pool_mode="max")(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5)),
        ),
    ],
)
def test_other_operators_say_that_they_are_missing(operator, call):
    with pytest.raises(NotImplementedError, match=f"has no operator {operator}: install the compiled mmcv"):
        call()


def test_the_module_has_no_other_attributes():
    assert not hasattr(mmcv._ext, "__path__")
    assert "torchvision" in mmcv.ops.get_compiler_version()
    assert "torchvision" in mmcv.ops.get_compiling_cuda_version()


def box_sets() -> dict[str, torch.Tensor]:
    """Float32 boxes, many with an IoU of exactly 1/10, 1/2 or 7/10; the three large sets have the edge cases too."""
    rng = np.random.default_rng(0)
    start = rng.integers(-3, 5, (24, 2))
    small = np.concatenate([start, start + rng.integers(1, 11, (24, 2))], axis=1)
    anywhere = rng.uniform(-50, 50, (24, 4))
    anywhere[:, 2:] = anywhere[:, :2] + rng.uniform(0, 60, (24, 2))
    edge_cases = np.array(
        [
            *[(0, 0, 10, 10), (0, 0, 10, 10), (0, 0, 10, 1), (0, 0, 10, 7), (0, 0, 5, 10)],  # the exact thresholds
            *[(10, 0, 20, 10), (0, 10, 10, 20), (10, 10, 11, 11), (11, 0, 20, 10)],  # touching, or with offset 1 only
            *[(3, 3, 3, 3), (3, 3, 3, 3), (3, 2, 3, 8), (3, 2, 3, 8), (2, 5, 8, 5)],  # without area
            *[(8, 2, 4, 6), (8, 2, 4, 6), (8, 6, 4, 2), (2, 8, 6, 4), (5, 5, 4, 4)],  # ending before they start
        ]
    )
    sets = {
        "none": np.empty((0, 4)),
        "small": np.concatenate([small, edge_cases]),
        "anywhere": np.concatenate([anywhere, edge_cases - 40]),
        "huge": np.concatenate([small, edge_cases]) * 2**18,
        "a tenth": np.array([(0, 0, 10, 10), (0, 0, 10, 1)]),
        "thin and far": np.array([(2**25, 0, 2**25, 9), (2**25, 0, 2**25, 9), (2**25, 2, 2**25, 9)]),
    }
    return {name: torch.from_numpy(boxes).float() for name, boxes in sets.items()}


BOXES = box_sets()


def distinct_scores(boxes) -> torch.Tensor:
    return (torch.randperm(len(boxes), generator=torch.Generator().manual_seed(1)) + 1) / (len(boxes) + 1)


def reference_iou(a, b, offset=0):
    """Exact, for boxes whose area may be negative where they end before they start."""
    a, b = ([Fraction(float(number)) for number in box] for box in (a, b))
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    overlap = max(width, 0) * max(height, 0)
    union = sum((box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)) - overlap
    return overlap / union if union else 0


def reference_nms(boxes, scores, threshold, offset=0) -> list[int]:
    """The kept boxes, best first."""
    left = sorted(range(len(boxes)), key=lambda i: -float(scores[i]))
    kept = []
    while left:
        best, *left = left
        kept.append(best)
        left = [i for i in left if reference_iou(boxes[best], boxes[i], offset) <= threshold]
    return kept


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7])
def test_nms(name, offset, threshold):
    boxes = BOXES[name]
    scores = distinct_scores(boxes)
    expected = reference_nms(boxes, scores, Fraction(str(threshold)), offset)
    for dtype in (torch.float32, torch.float64):
        dets, kept = mmcv.ops.nms(boxes.to(dtype), scores.to(dtype), threshold, offset=offset)
        assert kept.dtype == torch.int64
        assert kept.tolist() == expected
        assert torch.equal(dets, torch.cat([boxes, scores[:, None]], dim=1)[expected].to(dtype))
    kept = mmcv.ops.nms(boxes.numpy(), scores.numpy(), threshold, offset=offset, score_threshold=0.3, max_num=3)[1]
    assert kept.tolist() == [i for i in expected if scores[i] > 0.3][:3]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offset", [0, 1])
def test_nms_in_half_precision(dtype, offset):
    boxes, scores = BOXES["small"].to(dtype), distinct_scores(BOXES["small"]).to(dtype)
    expected = reference_nms(boxes, scores, 0.5, offset)
    assert mmcv.ops.nms(boxes, scores, 0.5, offset=offset)[1].tolist() == expected


@pytest.mark.parametrize("split", [1, 10_000])
def test_batched_nms(split):
    boxes = BOXES["small"] + 3  # mmcv's shift by the largest coordinate parts the classes where none is negative
    scores, classes = distinct_scores(boxes), torch.arange(len(boxes)) % 3
    expected = [
        int(members[best])
        for members in (torch.nonzero(classes == c)[:, 0] for c in range(3))
        for best in reference_nms(boxes[members], scores[members], 0.5)
    ]
    config = {"type": "nms", "iou_threshold": 0.5, "split_thr": split}
    dets, kept = mmcv.ops.batched_nms(boxes, scores, classes, config)
    assert kept.tolist() == sorted(expected, key=lambda i: -float(scores[i]))
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], dim=1)[kept])


SHAPE, SIZE = (2, 2, 7, 6), (2, 3)
ROIS = torch.tensor(
    [
        *[(0, 1, 1, 4.5, 5), (1, 0.5, 0.25, 5.75, 6.5), (1, 0, 0, 6, 7)],  # inside
        *[(0, -3, -2.5, 3, 4), (1, 4, 3, 12, 10.5), (0, -30, 1, 30, 5)],  # partly outside
        *[(0, -9, -9, -4, -5), (1, 20, 20, 25, 26)],  # wholly outside
        *[(0, 3, 2, 3, 5), (1, 3, 2, 3, 2), (0, 2, 4, 5, 4)],  # without area
        *[(1, 5, 2, 2, 7), (0, 2, 6, 5, 3), (1, 5, 5, 1, 1), (0, 5, 5, -100, -100)],  # ending before they start
        (0, -1.125, -1.125, -0.125, -0.125),  # has a sample at (-1, -1), the last place with a value
    ]
)
ROI_ALIGNS = list(product([True, False], [0, 2]))


def feature_map() -> torch.Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def reference_roi_align(images, rois, aligned, sampling, scale):
    """Bilinear samples at the centres of a grid in each bin, as sums over all pixels."""

    def hats(points, size):
        hat = np.maximum(0, 1 - abs(np.clip(points, 0, size - 1)[:, None] - np.arange(size)))
        return hat * ((points >= -1) & (points <= size))[:, None]

    output = np.zeros((len(rois), images.shape[1], *SIZE))
    for k, (image, *roi) in enumerate(rois.tolist()):
        start = [roi[axis] * scale - 0.5 * aligned for axis in (1, 0)]
        sides = [max((roi[axis + 2] - roi[axis]) * scale, 0 if aligned else 1) for axis in (1, 0)]
        for where in product(*map(range, SIZE)):
            weights = []
            for s, side, at, bins, pixels in zip(start, sides, where, SIZE, images.shape[2:], strict=True):
                samples = sampling or math.ceil(side / bins)
                points = [s + side / bins * (at + (i + 0.5) / samples) for i in range(samples)]
                weights.append(hats(np.array(points), pixels))
            for channel, pixels in enumerate(images[int(image)].numpy()):
                values = weights[0] @ pixels @ weights[1].T
                if values.size:
                    output[(k, channel, *where)] = values.mean()
    return torch.from_numpy(output)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize(("aligned", "sampling"), ROI_ALIGNS)
def test_roi_align(aligned, sampling, scale):
    images = feature_map()
    layer = mmcv.ops.RoIAlign(SIZE, scale, sampling, "avg", aligned)
    rois = ROIS if scale == 1 else torch.cat([ROIS[:, :1], ROIS[:, 1:] / scale - 0.3], dim=1)
    expected = reference_roi_align(images, rois.double(), aligned, sampling, scale)
    torch.testing.assert_close(layer(images, rois.double()), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer(images.float(), rois), expected.float(), rtol=1e-4, atol=1e-4)
    assert layer(images, rois[:0].double()).shape == (0, SHAPE[1], *SIZE)


@pytest.mark.parametrize(("aligned", "sampling"), ROI_ALIGNS)
def test_gradient_of_roi_align(aligned, sampling):
    rois = (ROIS * torch.tensor([1, 2, 2, 2, 2])).double()
    layer = mmcv.ops.RoIAlign(SIZE, 0.5, sampling, "avg", aligned)
    assert torch.autograd.gradcheck(lambda images: layer(images, rois), feature_map().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_roi_align_in_half_precision(dtype):
    images = feature_map().to(dtype).requires_grad_()
    precise = images.detach().double().requires_grad_()
    layer = mmcv.ops.RoIAlign(SIZE, 1.0, 2)
    rois = ROIS.to(dtype)
    outputs = layer(images, rois), layer(precise, rois.double())
    gradients = (torch.autograd.grad(out.sum(), x)[0] for out, x in zip(outputs, (images, precise), strict=True))
    for half, exact in (outputs, gradients):
        assert half.dtype == dtype
        torch.testing.assert_close(half, exact.to(dtype), rtol=2e-2, atol=2e-2)


def reference_focal_loss(logits, target, gamma, alpha, weight):
    def log_sigmoid(x):
        return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))

    loss = torch.empty(logits.shape, dtype=torch.float64)
    for n, c in product(*map(range, logits.shape)):
        present = target[n] == c
        x = float(logits[n, c] if present else -logits[n, c])  # the logit of what is the case
        loss[n, c] = -(alpha if present else 1 - alpha) * math.exp(gamma * log_sigmoid(-x)) * log_sigmoid(x)
        if weight is not None and target[n] < logits.shape[1]:
            loss[n, c] *= float(weight[target[n]])
    return loss


TARGET = torch.tensor([0, 1, 2, 3, 4, 4, 1])  # 4 is the background
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64)
FOCAL_LOSSES = [(2.0, 0.25, None), (2.0, 0.25, WEIGHT), (0.0, 0.25, None), (1.5, 0.9, WEIGHT), (0.5, 1.0, None)]


@pytest.mark.parametrize(("gamma", "alpha", "weight"), FOCAL_LOSSES)
def test_focal_loss(gamma, alpha, weight):
    logits = 5 * torch.randn(len(TARGET), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = reference_focal_loss(logits, TARGET, gamma, alpha, weight)
    for dtype, tolerance in [(torch.float64, 1e-8), (torch.float32, 1e-5), *((half, 2e-2) for half in HALVES)]:
        cast_weight = None if weight is None else weight.to(dtype)
        loss = mmcv.ops.sigmoid_focal_loss(logits.to(dtype), TARGET, gamma, alpha, cast_weight, "none")
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.double(), expected, rtol=2 * tolerance, atol=tolerance)
    layer = mmcv.ops.SigmoidFocalLoss(gamma, alpha, weight)  # the mean over the rows
    torch.testing.assert_close(layer(logits, TARGET), expected.sum() / len(TARGET))
    assert torch.autograd.gradcheck(lambda x: layer(x, TARGET), logits.requires_grad_())
    assert layer(logits[:0], TARGET[:0]).isnan()  # the mean of nothing
    assert mmcv.ops.sigmoid_focal_loss(logits[:0], TARGET[:0], gamma, alpha, weight, "none").shape == (0, 4)


@pytest.mark.parametrize(("gamma", "alpha", "weight"), FOCAL_LOSSES)
@pytest.mark.parametrize("extreme", [20.5, 40.0, 90.0, 1000.0])
def test_focal_loss_of_extreme_logits(gamma, alpha, weight, extreme):
    logits = torch.tensor([extreme, -extreme, 0.0, -extreme], dtype=torch.float64).repeat(len(TARGET), 1)
    expected = reference_focal_loss(logits, TARGET, gamma, alpha, weight)

    def loss(x):
        return mmcv.ops.sigmoid_focal_loss(x, TARGET, gamma, alpha, None if weight is None else weight.to(x), "none")

    gradients = []
    for dtype in (torch.float32, torch.float64):
        x = logits.to(dtype).requires_grad_()
        torch.testing.assert_close(loss(x), expected.to(dtype), rtol=1e-5, atol=1e-12)
        gradients += torch.autograd.grad(loss(x).sum(), x)
    torch.testing.assert_close(gradients[0], gradients[1].float(), rtol=1e-5, atol=1e-12)
    assert torch.autograd.gradcheck(loss, x)
