"""MetaFormer as the backbone of a detector or segmentor, registered in mmengine's root registry."""

import re
from collections.abc import Sequence
from copy import copy
from inspect import signature
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metaformer.errors import InputError, check_known
from metaformer.formats import StateDict, recognised, to_ours
from metaformer.mm.checkpoint import load_from_path_or_url
from metaformer.model import MLN, MetaFormer, per_stage
from metaformer.variants import variant_arguments
from metaformer.weights.described import check_trained_as
from metaformer.weights.loading import Differences, check_fit, weights_of


@MODELS.register_module(name="MetaFormer")
class MetaFormerBackbone(MetaFormer, BaseModule):
    """A variant without its classifier, and with a norm on each output level as in the official code.

    Maps images (B, 3, H, W) to a tuple of levels (B, C_i, H / s_i, W / s_i) with strides s = 4, 8, 16, 32. Stages after
    the last output level are not built.

    Args:
        variant: name of the model, as for ``timm.create_model``.
        out_indices: output levels in ascending order, counted from 0.
        drop_path_rate: drop path of the last block. The official detectors use 0.
        frozen_stages: -1 trains everything, 0 freezes the stem, n freezes the stem and the first n stages: they stay in
            evaluation mode and get no gradient.
        norm_eval: keep the running statistics of batch norms fixed during training.
        with_cp: recompute each block in the backward pass instead of storing its activations.
        init_cfg: ``None`` to train from scratch, or ``dict(type='Pretrained', checkpoint=PATH_OR_URL)`` with a
            classifier in any known format. ``prefix='backbone.'`` takes the backbone of a detector or segmentor.
        arguments: arguments of :class:`metaformer.MetaFormer` that replace those of the variant.

    Raises:
        InputError: the variant, an argument or ``init_cfg`` is unknown, or the variant does not have these levels or
            stages.
    """

    def __init__(
        self,
        variant: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | None = None,
        **arguments: Any,
    ):
        for name in arguments:
            check_known("argument of the backbone", name, ARGUMENTS)
        settings = {**variant_arguments(variant), **arguments}
        super().__init__(**settings, drop_path_rate=drop_path_rate, num_classes=0)
        levels = len(self.stages)
        indices = list(out_indices) if isinstance(out_indices, Sequence) else []
        if not indices or indices != sorted(set(range(levels)).intersection(indices)):
            raise InputError(
                f"out_indices={out_indices}: give levels of {variant} from 0 to {levels - 1} in ascending order"
            )
        if frozen_stages not in range(-1, levels + 1):
            raise InputError(
                f"frozen_stages={frozen_stages}: use -1 (none), 0 (the stem) to {levels} (all of {variant})"
            )
        pretrained = isinstance(init_cfg, dict) and init_cfg.get("type") == "Pretrained" and init_cfg.get("checkpoint")
        if init_cfg is not None and not pretrained:
            raise InputError(
                f"init_cfg of the backbone is {init_cfg}: use dict(type='Pretrained', checkpoint=...) or None"
            )
        self.variant, self.arguments = variant, arguments
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.init_cfg = init_cfg

        norm_layers = per_stage("norm_layers", settings.get("norm_layers", MLN), levels)
        self.prune_intermediate_layers([out_indices[-1]], prune_norm=True)
        self.out_norms = nn.ModuleDict({str(i): norm_layers[i](self.feature_info[i]["num_chs"]) for i in out_indices})
        self.set_grad_checkpointing(with_cp)
        for module in self._frozen():
            module.requires_grad_(False)
        self.register_load_state_dict_pre_hook(rename_official)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        levels = self.forward_intermediates(x, list(self.out_indices), intermediates_only=True)
        return tuple(self.out_norms[str(i)](level) for i, level in zip(self.out_indices, levels, strict=True))

    def train(self, mode: bool = True) -> "MetaFormerBackbone":
        super().train(mode)
        norms = [module for module in self.modules() if self.norm_eval and isinstance(module, _BatchNorm)]
        for module in (*self._frozen(), *norms):
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        return [] if self.frozen_stages < 0 else [self.stem, *self.stages[: self.frozen_stages]]

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg`` except its classifier, and log what was loaded.

        Raises:
            InputError: the checkpoint does not exist, is of another model, or differs from the backbone in more than
                the classifier, the norms of the levels and stages that are not built.
        """
        if self.init_cfg is None:
            print_log(f"{self.variant}: init_cfg has no pretrained weights", logger="current")
            return
        source, prefix = self.init_cfg["checkpoint"], self.init_cfg.get("prefix", "")
        prefix += "." if prefix and not prefix.endswith(".") else ""  # as mmengine takes it
        checkpoint = load_from_path_or_url(source)
        check_trained_as(self.variant, self.arguments, checkpoint, source)
        weights = weights_of(checkpoint, ema=True)
        if recognised(weights) == "mmpretrain" and "head.fc.weight" in weights:
            prefix = ""  # a classifier, whose backbone.norm6 is the norm before its head and not one of a level
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        weights = to_ours(weights)
        found = check_fit(self, weights, source, self._may_differ)
        self.load_state_dict(weights, strict=False)
        new, tensors = found["missing"], len(self.state_dict())
        print_log(
            f"{self.variant}: loaded {tensors - len(new)} of {tensors} tensors from {source}; "
            f"new: {parts(new)}; left out: {parts(found['unexpected'])}",
            logger="current",
        )

    def _may_differ(self, name: str) -> bool:
        stage = re.match(r"stages\.(\d+)\.", name)
        return name.startswith(("head.", "norm.", "out_norms.")) or bool(stage and int(stage[1]) >= len(self.stages))


ARGUMENTS = sorted(
    {*signature(MetaFormerBackbone).parameters, *signature(MetaFormer).parameters} - {"arguments", "num_classes"}
)


def rename_official(module: nn.Module, state_dict: StateDict, prefix: str, *_: Any) -> None:
    """Rename the tensors of a backbone under ``prefix`` in ``state_dict``, in place."""
    theirs = {name.removeprefix(prefix): state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    state_dict.update({prefix + name: tensor for name, tensor in to_ours(theirs).items()})


def parts(names: set[str]) -> str:
    return ", ".join(sorted({re.match(r"(stages|out_norms)\.\d+|\w+", name)[0] for name in names})) or "none"


def checked_weights(model: nn.Module, checkpoint: dict, source: str, part: str = "") -> tuple[StateDict, Differences]:
    """The weights in a checkpoint of a detector or segmentor, also an official one, under the names of ``model``.

    Tensors whose name starts with ``part`` must be those of the model; the differences of the others are returned too.
    mmengine loads what fits and ignores the rest.

    Raises:
        InputError: such a tensor is missing, unexpected or has another shape, or the backbone that was trained is
            another variant; the message names ``source``.
    """
    weights = copy(weights_of(checkpoint, ema=False))  # with the versions of the modules, which dict() would drop
    for name, module in model.named_modules():
        if isinstance(module, MetaFormerBackbone):
            check_trained_as(module.variant, module.arguments, checkpoint, source)
            rename_official(module, weights, f"{name}.")
    return weights, check_fit(model, weights, source, lambda name: not name.startswith(part))
