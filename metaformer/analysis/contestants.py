"""The contestants of a benchmark: forms of the same model with the same weights and images.

This package has three forms: the equations as printed (``plain``), computed in fewer passes over memory (``fused``),
and with the norms folded into the weights for inference (``folded``). timm and transformers have classes for the
PoolFormers.
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
    model: nn.Module  # not compiled, in the mode of the task
    forward: Callable[[], Tensor]  # returns the logits of the batch, (B, 1000)
    call: Callable[[], Tensor]  # the call that is timed: returns the logits in inference, the loss in training

    def __str__(self) -> str:
        return f"{self.form} ({'compiled' if self.compiled else 'eager'})"


def chosen_forms(model: str, given: list[str] | None, tasks: list[str]) -> list[str]:
    """The forms to compare: those given, or by default all for a PoolFormer, and plain and fused for other models.

    Raises:
        InputError: the model does not exist, does not have a form, or no form can do a task.
    """
    variant_arguments(model)
    others = model in metaformer.POOLFORMERS
    forms = [form for form in OURS + OTHERS if form in (given or (OURS + OTHERS if others else OURS[:2]))]
    if not others and (without := [form for form in forms if form in OTHERS]):
        raise InputError(f"{' and '.join(without)} has no {model}: use the forms {', '.join(OURS)}")
    if forms == ["folded"] and "training" in tasks:
        raise InputError("the form folded is for inference only: use --tasks inference, or another form")
    return forms


def contestants(forms: list[str], modes: list[bool], task: str, settings: Settings) -> list[Contestant]:
    """Every form that can do the task, in each mode (``True``: compiled), on the same weights and images."""
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
    """A form of the model with ``weights``; raises ``InputError`` if ``folded`` has nothing to fold."""
    if form == "timm":
        model = getattr(timm.models.metaformer, settings.model)()
        model.load_state_dict(metaformer.convert(weights, "timm"))
    elif form == "transformers":
        from transformers import PoolFormerConfig, PoolFormerForImageClassification  # the import takes seconds

        arguments = variant_arguments(settings.model)
        config = PoolFormerConfig(depths=arguments["depths"], hidden_sizes=arguments["dims"], num_labels=1000)
        model = PoolFormerForImageClassification(config)
        model.load_state_dict(metaformer.convert(weights, "hf"))
    else:
        model = ours(settings, fused=form != "plain")
        model.load_state_dict(weights)
    model.to(settings.device, memory_format=LAYOUTS[settings.memory_format])
    return metaformer.fuse(model) if form == "folded" else model


def ours(settings: Settings, fused: bool) -> MetaFormer:
    return timm.create_model(settings.model, img_size=settings.size, fused=fused)


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
