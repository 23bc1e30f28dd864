"""What a benchmark compares: forms of the same model, on the same weights and images.

Ours are the block's equations as they are printed (``plain``), in fewer passes over memory (``fused``), and for
inference alone (``folded``). timm and transformers have classes of the five PoolFormers.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import timm
import timm.models.metaformer
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metaformer
from metaformer.errors import InputError
from metaformer.formats import StateDict
from metaformer.mixers import Size
from metaformer.model import MetaFormer
from metaformer.variants import variant_arguments

OURS, OTHERS = ("plain", "fused", "folded"), ("timm", "transformers")
TASKS = ("inference", "training")
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
SEED = 0


class Settings(NamedTuple):
    model: str
    batch: int
    size: Size
    precision: str
    memory_format: str
    device: torch.device
    rounds: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


class Contestant(NamedTuple):
    """A form of the model, eager or compiled, ready for its task on a batch."""

    form: str
    compiled: bool
    model: nn.Module
    """In the mode of the task; not compiled."""
    forward: Callable[[], Tensor]
    """The logits of the batch, (B, 1000)."""
    call: Callable[[], Tensor]
    """What is timed: gives the logits (inference) or the loss (training)."""

    def __str__(self) -> str:
        return f"{self.form} ({'compiled' if self.compiled else 'eager'})"


def chosen_forms(model: str, given: list[str] | None, tasks: list[str]) -> list[str]:
    """The forms to compare, each once: those given, or all for a PoolFormer, plain and fused for another model.

    Raises:
        InputError: no such model, a form that the model does not have, or only one that cannot do a task.
    """
    variant_arguments(model)
    others = model in metaformer.POOLFORMERS
    forms = [form for form in OURS + OTHERS if form in (given or (OURS + OTHERS if others else OURS[:2]))]
    if not others and (without := [form for form in forms if form in OTHERS]):
        raise InputError(f"{' and '.join(without)} has no {model}: use the forms {', '.join(OURS)}")
    if forms == ["folded"] and "training" in tasks:
        raise InputError("the form folded is for inference alone: use --tasks inference, or another form")
    return forms


def contestants(forms: list[str], modes: list[bool], task: str, settings: Settings) -> list[Contestant]:
    """Every form that does the task, eager and (``True`` in ``modes``) compiled, on the same weights and images."""
    torch.manual_seed(SEED)
    weights = ours(settings, fused=False).state_dict()
    images = torch.randn(settings.batch, 3, *settings.size)
    images = images.to(settings.device, memory_format=LAYOUTS[settings.memory_format])
    labels = torch.randint(1000, (settings.batch,)).to(settings.device)
    models = {form: build(form, settings, weights) for form in forms if form != "folded" or task == "inference"}
    return [
        contestant(form, compiled, model.train(task == "training"), images, labels, settings)
        for form, model in models.items()
        for compiled in modes
    ]


def build(form: str, settings: Settings, weights: StateDict) -> nn.Module:
    """A form of the model with ``weights``, on the device and in the memory format.

    Raises:
        InputError: ``folded`` of a model that has nothing to fold.
    """
    if form == "timm":
        model = getattr(timm.models.metaformer, settings.model)()
        model.load_state_dict(metaformer.convert(weights, "timm"))
    elif form == "transformers":
        model = of_transformers(settings.model)
        model.load_state_dict(metaformer.convert(weights, "hf"))
    else:
        model = ours(settings, fused=form != "plain")
        model.load_state_dict(weights)
    model.to(settings.device, memory_format=LAYOUTS[settings.memory_format])
    return metaformer.fuse(model) if form == "folded" else model


def ours(settings: Settings, fused: bool) -> MetaFormer:
    return timm.create_model(settings.model, img_size=settings.size, fused=fused)


def of_transformers(name: str) -> nn.Module:
    from transformers import PoolFormerConfig, PoolFormerForImageClassification  # takes seconds

    arguments = variant_arguments(name)
    config = PoolFormerConfig(depths=arguments["depths"], hidden_sizes=arguments["dims"], num_labels=1000)
    return PoolFormerForImageClassification(config)


def contestant(
    form: str, compiled: bool, model: nn.Module, images: Tensor, labels: Tensor, settings: Settings
) -> Contestant:
    network = torch.compile(model) if compiled else model

    def forward() -> Tensor:
        with settings.autocast():
            output = network(images)
        return output if isinstance(output, Tensor) else output.logits  # transformers returns named outputs

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(forward().float(), labels)
        loss.backward()
        return loss.detach()

    return Contestant(form, compiled, model, forward, step if model.training else torch.no_grad()(forward))
