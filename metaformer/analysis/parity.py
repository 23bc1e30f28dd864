"""Compares models and training with the official code; see :mod:`metaformer.analysis.official`."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import sklearn.datasets
import timm.loss
import timm.optim
import timm.scheduler
import torch
import yaml
from matplotlib.cbook import get_sample_data
from timm.data.mixup import rand_bbox
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from metaformer.analysis.official import (
    MODELS,
    load_official,
    official_batch,
    official_loader,
    official_model,
    official_setup,
    pinned_box,
    readme_arguments,
    run_main,
)
from metaformer.analysis.paper import ROOT
from metaformer.formats import convert
from metaformer.provenance import git
from metaformer.training.batches import Images, seed_everything, transform
from metaformer.training.config import CONFIGS, Config, load_config
from metaformer.training.data import open_split
from metaformer.training.distributed import Processes
from metaformer.training.engine import Trainer
from metaformer.training.model import build_model, normaliser, with_input_of
from metaformer.training.recipe import build_erasing, build_mixing, build_optimizer, build_scheduler
from metaformer.variants import ABLATIONS, VARIANTS
from metaformer.weights import load_state

CPU = torch.device("cpu")
EXACT, FLOAT64 = 0.0, 1e-10
"""Largest differences that count as equal."""

Compared = dict[str, Any]


def compared(part: str, what: str, difference: float, tolerance: float = EXACT) -> Compared:
    return {"part": part, "what": what, "difference": largest([difference]), "tolerance": tolerance}


def largest(differences: Iterable[float]) -> float:
    """The largest difference; infinite if one of them is not a number, which ``max`` could pass over."""
    return float(np.nan_to_num(np.max([float(each) for each in differences]), nan=np.inf))


def relative(ours: dict[str, Tensor], official: dict[str, Tensor]) -> float:
    """The largest difference of two tensors of a name, in units of the official one's norm.

    The unit is at least a thousandth of the largest norm: the gradient of a bias before pooling is 0 but for rounding.
    """
    assert ours.keys() == official.keys()
    norms = {key: of.norm().item() for key, of in official.items()}
    least = max(norms.values()) / 1000
    return largest((ours[key] - of).norm().item() / max(norms[key], least) for key, of in official.items())


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Draw all parameters large enough to matter; initially, LayerScale hides most of a network."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(float(not name.endswith("bias")), 0.3)


def config_of(name: str) -> Config:
    """Our recipe at the batch of the official README, with the model's own input."""
    folder = CONFIGS.parent / "ablations" if name in ABLATIONS else CONFIGS
    config = load_config([str(folder / f"{name}.yaml"), "global_batch=1024"])
    return with_input_of(config, timm.create_model(name))


def compare_model(train: ModuleType, name: str) -> Iterator[Compared]:
    """Outputs and gradients in float64 at 224 pixels with the same random weights."""
    official, ours = official_model(train, MODELS[name]).double(), timm.create_model(name).double()
    randomise(official)
    load_state(ours, official.state_dict(), "the official model")
    images, direction = torch.randn(2, 3, 224, 224, dtype=torch.float64), torch.randn(2, 1000, dtype=torch.float64)
    outputs = []
    for model in (ours, official):
        outputs.append({"logits": model(images)})
        (outputs[-1]["logits"] * direction).sum().backward()
    gradients = [{key: of.grad for key, of in model.named_parameters()} for model in (ours, official)]
    yield compared(name, "logits", relative(*outputs), FLOAT64)
    yield compared(name, "gradients of all parameters", relative(gradients[0], convert(gradients[1])), FLOAT64)
    if name not in ABLATIONS:  # the official ablations are classifiers only
        from metaformer.mm.backbone import MetaFormerBackbone

        official, ours = official_model(train, name, fork_feat=True).double(), MetaFormerBackbone(name).double()
        randomise(official)
        ours.load_state_dict(official.state_dict())
        with torch.no_grad():
            levels = [dict(enumerate(model(images))) for model in (ours, official)]
        yield compared(name, "dense features", relative(*levels), FLOAT64)


def compare_setup(train: ModuleType, name: str, root: Path) -> Iterator[Compared]:
    """Initial weights, weight decay and drop path, and the pictures in ``root`` as prepared for evaluation."""
    config, official = config_of(name), official_setup(train, name)
    torch.manual_seed(42)  # as main does
    model = build_model(config, 1000)
    ours, theirs = model.state_dict(), convert(official.model.state_dict())
    if VARIANTS[name].release.endswith("224"):  # our mixers draw their weights in another order
        errors = [spread_error(ours[key], of) for key, of in theirs.items()]
        yield compared("recipe", "spread of the hybrids' initial weights, in standard errors", largest(errors), 5)
    else:
        yield compared("recipe", "initial weights with the same seed", relative(ours, theirs))
    optimizer = build_optimizer(config, model, 1e-3)
    decays = [decay_by_name(optimizer, model), convert(decay_by_name(official.optimizer, official.model))]
    different = sum(decays[0][key] != of for key, of in decays[1].items())
    yield compared("recipe", "parameters with another weight decay", different)
    rates = [
        [getattr(of.drop_path, "drop_prob", 0.0) for of in each.modules() if hasattr(of, "token_mixer")]
        for each in (model, official.model)
    ]
    yield compared("recipe", "drop path of the blocks", np.abs(np.subtract(*rates)).max())
    pictures = timm.data.create_dataset("", root=root, split="val")
    loaded = torch.cat([images for images, _ in official_loader(pictures, official.eval)])
    images = Images(pictures, transform(config, is_training=False))
    prepared = normaliser(config, CPU)(torch.stack([images[0, i][0] for i in range(len(pictures))]))
    yield compared("recipe", "pixels of evaluated pictures, normalised", (prepared - loaded).abs().max())


def spread_error(ours: Tensor, official: Tensor) -> float:
    """The difference of the standard deviations of two draws, in standard errors.

    Very few of the weights that timm's ``trunc_normal_`` draws lie at its bounds of 2 and -2, where 0.02 is asked for;
    such weights are taken for 0.1.
    """
    if official.std(correction=0) == 0:
        return 0.0 if torch.equal(ours, official) else float("inf")
    ratio = ours.clamp(-0.1, 0.1).std() / official.clamp(-0.1, 0.1).std()
    return ((ratio - 1).abs() * official.numel() ** 0.5).item()


def decay_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    names = {of: key for key, of in model.named_parameters()}
    return {names[of]: group["weight_decay"] for group in optimizer.param_groups for of in group["params"]}


def compare_recipe(train: ModuleType, root: Path) -> Iterator[Compared]:
    """PoolFormer-S12's schedule, optimizer, augmentation, Mixup and CutMix, erasing and loss, from the same draws."""
    config, official = config_of("poolformer_s12"), official_setup(train, "poolformer_s12")
    optimizer = build_optimizer(config, build_model(config, 1000), config.base_lr * config.global_batch / 1024)
    keys = ("betas", "eps", "amsgrad", "maximize")
    settings = [[group[key] for group in of.param_groups for key in keys] for of in (optimizer, official.optimizer)]
    same = type(optimizer) is type(official.optimizer) and settings[0] == settings[1]
    yield compared("recipe", "kind of optimizer, betas and epsilon (0: same)", not same)
    scheduler, epochs = build_scheduler(config, optimizer, steps=1251)
    rates = []
    for number in range(epochs):
        scheduler.step(number)
        rates.append([group["lr"] for group in optimizer.param_groups])
    same = len(official.rates) == epochs
    difference = np.max(np.abs(np.divide(rates, official.rates) - 1)) if same else np.inf
    yield compared("recipe", f"learning rate of each of the {epochs} epochs, relative", difference)

    pictures, batches, size = timm.data.create_dataset("", root=root, split="val"), 40, 8
    loader, drawn = official_loader(pictures, official.train), []
    ours = Images(pictures, transform(config, is_training=True), config.seed)
    for number in range(batches * size):
        index = number % len(pictures)
        seed_everything(config.seed, number, index)  # as ours does itself
        drawn.append(torch.stack([pictures[index][0], ours[number, index][0]]))
    drawn = torch.stack(drawn).int()
    yield compared("recipe", f"pixels of {len(drawn)} augmented pictures", (drawn[:, 0] - drawn[:, 1]).abs().max())

    mix, normalise, erase = build_mixing(config, 1000), normaliser(config, CPU), build_erasing(config, CPU)
    differences, losses = [], []
    for number, images in enumerate(drawn[:, 0].to(torch.uint8).split(size)):
        labels = torch.arange(number, number + size)
        seed_everything(number)
        theirs, their_targets = official_batch(loader, images, labels)
        seed_everything(number)
        images, targets = mix(images, labels)
        images = erase(normalise(images))
        differences.append([(images - theirs).abs().max(), (targets - their_targets).abs().max()])
        logits = torch.randn(size, 1000, dtype=torch.float64)
        loss, of = F.cross_entropy(logits, targets.double()), official.loss(logits, their_targets)
        losses.append((loss / of - 1).abs())
    pixels, targets = map(largest, zip(*differences, strict=True))
    yield compared("recipe", f"pixels of {batches} batches after Mixup or CutMix, normalisation and erasing", pixels)
    yield compared("recipe", "their targets", targets)
    yield compared("recipe", "their losses from random logits, relative", largest(losses), FLOAT64)


def compare_trajectory(
    train: ModuleType, root: Path, dtype: torch.dtype, drop_path: float, precision: str = "float32"
) -> dict[str, Any]:
    """Run the official training loop, and before each of its steps ours on the same pictures with the same draws.

    PoolFormer-S12 starts with the official initial weights and trains at 64 pixels for 20 epochs of 3 steps with 8
    pictures: 5 of warmup, 5 of the cosine, 10 of cooldown. The record has the relative differences after each step.
    """
    step_of_official, (losses, weights) = train.train_one_epoch, ([], [])
    small = {"img_size": 64, "global_batch": 8, "device_batch": 8, "epochs": 10, "lr": 1e-3, "drop_path": drop_path}
    place = {"data_dir": str(root), "output": str(root / f"run-{dtype}-{drop_path}-{precision}"), "workers": 0}
    config = config_of("poolformer_s12").model_copy(update={**small, **place, "precision": precision})
    trainer = Trainer(config, Processes(CPU))

    def epoch(number: int, model: nn.Module, options: dict, optimizer: Any, loss: nn.Module, *args: Any, **more: Any):
        if number == 0:
            load_state(trainer.model, model.state_dict(), "the official model")
            for each in (model, trainer.model):
                each.to(dtype).register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
        trainer.progress.epoch, trainer.progress.step = number, 0
        trainer.scheduler.step(number)
        trainer.parallel.train()
        loader = official_loader(open_split(config, "validation", workers=0), options)
        official: list[float] = []

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for step, batch in enumerate(trainer.epoch_batches()):
                trainer.progress.step = step
                trainer.loss_sum.zero_()
                trainer.optimizer_step(iter([batch]))
                seed_everything(config.seed, number, step, 0)  # as our step does
                yield official_batch(loader, *batch)  # the official step follows
                losses.append(largest([abs(trainer.loss_sum.item() / official[-1] - 1)]))
                weights.append(relative(trainer.model.state_dict(), convert(model.state_dict())))

        def noted(output: Tensor, target: Tensor) -> Tensor:
            value = loss(output, target)
            official.append(value.item())
            return value

        given = MagicMock(__len__=lambda _: trainer.steps, __iter__=lambda _: batches())
        step_of_official(number, model, given, optimizer, noted, *args, **more)

    arguments = ["-b", "8", "--epochs", "10", "--img-size", "64", "--num-classes", str(trainer.data.num_classes)]
    arguments = [*readme_arguments("poolformer_s12"), *arguments, "--drop-path", str(drop_path)]
    run_main(train, arguments, epoch, lambda *_, **__: {"top1": 0.0})
    kind = str(dtype).removeprefix("torch.")
    return {"dtype": kind, "precision": precision, "drop_path": drop_path, "losses": losses, "weights": weights}


def measure(clone: Path) -> dict[str, Any]:
    """The record of all comparisons (:class:`metaformer.records.Parity`), without its provenance.

    Args:
        clone: the official repository.

    Raises:
        InputError: as :func:`load_official`.
    """
    train, images = load_official(clone), Path(sklearn.datasets.__file__).parent / "images"
    pictures = [images / "china.jpg", images / "flower.jpg", get_sample_data("grace_hopper.jpg", asfileobj=False)]
    torch.manual_seed(0)
    models = [row for name in tqdm(MODELS, desc="models", disable=None) for row in compare_model(train, name)]
    with TemporaryDirectory() as folder:
        root = Path(folder)
        for split, number in (("train", 24), ("val", 4)):
            for i in range(number):
                path = Path(pictures[i % len(pictures)])
                link = root / split / str(i % 4) / f"{i:05d}{path.suffix}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
        setups = [row for name in tqdm(MODELS, desc="setups", disable=None) for row in compare_setup(train, name, root)]
        worst = {row["what"]: row for row in sorted(setups, key=lambda row: row["difference"])}
        recipe = [*worst.values(), *compare_recipe(train, root)]
        runs = [(torch.float64, 0.0), (torch.float64, 0.1), (torch.float32, 0.1), (torch.float32, 0.1, "bfloat16")]
        trajectories = [compare_trajectory(train, root, *run) for run in tqdm(runs, desc="trajectories", disable=None)]
    is_clone = (clone / ".git").exists()  # and not an unpacked archive, perhaps in a repository of the user's
    asked = (("rev-parse", "HEAD"), ("status", "--porcelain"))
    commit, changes = (git("-C", str(clone.resolve()), *words) if is_clone else None for words in asked)
    return {
        "kind": "parity",
        "official": {"commit": commit, "uncommitted_changes": bool(changes)},
        "pictures": len(pictures),
        "compared": [*models, *recipe],
        "trajectories": trajectories,
        "departures": departures(trajectories),
    }


def departures(trajectories: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The differences that remain, each with its reason and effect."""
    np.random.seed(0)
    areas = np.zeros(2)
    for lam in np.random.rand(100_000):
        for i, box in enumerate((rand_bbox, pinned_box)):
            top, bottom, left, right = box((224, 224), lam)
            areas[i] += (bottom - top) * (right - left) / 224**2 / 1000
    config = load_config([str(CONFIGS / "poolformer_s12.yaml")])
    *_, float32, bfloat16 = (max(of["losses"]) for of in trajectories)
    found = {"batch": config.global_batch, "lr": config.base_lr * config.global_batch / 1024, "areas": areas}
    found |= {"float32": float32, "bfloat16": bfloat16}
    told = yaml.safe_load((ROOT / "analysis/departures.yaml").read_text(encoding="utf-8"))
    return [{name: text.format(**found) for name, text in departure.items()} for departure in told]
