"""MetaFormer as a feature pyramid for mmdet and mmseg, registered once, in mmengine's root registry."""

import re
from collections.abc import Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metaformer.errors import InputError
from metaformer.formats import FROM, StateDict, recognised
from metaformer.model import MetaFormer
from metaformer.variants import variant_arguments
from metaformer.weights import differences, listed, weights_of


@MODELS.register_module(name="MetaFormer")
class MetaFormerBackbone(MetaFormer, BaseModule):
    """A variant without its classifier; a norm of its own on each level that goes out, as in the official code.

    Images (B, 3, H, W) to a tuple of (B, C_i, H / s_i, W / s_i) with the strides s = 4, 8, 16, 32. Stages after the
    last level asked for are not built.

    Args:
        variant: name of the model, as for ``timm.create_model``.
        out_indices: levels that go out, in ascending order, from 0.
        drop_path_rate: drop path of the last block; the official detectors use 0.
        frozen_stages: -1 trains everything, 0 freezes the stem, n the stem and the first n stages (in evaluation mode
            and without gradient).
        norm_eval: keep batch norms, where the variant has any, at their running statistics while training.
        with_cp: recompute each block in the backward pass instead of keeping its activations.
        init_cfg: ``None`` to start from scratch, or ``dict(type='Pretrained', checkpoint=PATH_OR_URL)``: a classifier,
            from the official release or trained here. With ``prefix='backbone.'`` the backbone of a detector or
            segmentor.
        arguments: further arguments of :class:`metaformer.MetaFormer`, in place of the variant's.

    Raises:
        InputError: unknown variant, or levels or frozen stages that it does not have.
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
        super().__init__(**{**variant_arguments(variant), **arguments}, drop_path_rate=drop_path_rate, num_classes=0)
        levels = len(self.stages)
        if not out_indices or list(out_indices) != sorted(set(out_indices) & set(range(levels))):
            raise InputError(
                f"out_indices={tuple(out_indices)}: {variant} has the levels 0 to {levels - 1}, in this order"
            )
        if not -1 <= frozen_stages <= levels:
            raise InputError(
                f"frozen_stages={frozen_stages}: use -1 (none), 0 (the stem) to {levels} (all of {variant})"
            )
        if init_cfg is not None and (init_cfg.get("type") != "Pretrained" or not init_cfg.get("checkpoint")):
            raise InputError(
                f"init_cfg of the backbone is {init_cfg}: use dict(type='Pretrained', checkpoint=...) or None"
            )
        self.variant = variant
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.init_cfg = init_cfg

        norm = type(self.norm)
        self.prune_intermediate_layers([out_indices[-1]], prune_norm=True)
        self.out_norms = nn.ModuleDict({str(i): norm(self.feature_info[i]["num_chs"]) for i in out_indices})
        self.set_grad_checkpointing(with_cp)
        for module in self._frozen():
            module.requires_grad_(False)
        self.register_load_state_dict_pre_hook(rename_official)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        levels = self.forward_intermediates(x, list(self.out_indices), intermediates_only=True)
        return tuple(self.out_norms[str(i)](level) for i, level in zip(self.out_indices, levels, strict=True))

    def train(self, mode: bool = True) -> "MetaFormerBackbone":
        super().train(mode)
        for module in self._frozen():
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        return [] if self.frozen_stages < 0 else [self.stem, *self.stages[: self.frozen_stages]]

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names, all of it but the classifier, and log what was loaded.

        Raises:
            InputError: no such checkpoint, or it differs from the backbone in more than the classifier, the norms of
                the levels and stages that are not built.
        """
        if self.init_cfg is None:
            print_log(f"{self.variant}: no pretrained weights, training starts from scratch", logger="current")
            return
        source, prefix = self.init_cfg["checkpoint"], self.init_cfg.get("prefix", "")
        weights = weights_of(CheckpointLoader.load_checkpoint(source, map_location="cpu"))
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        weights = from_official_pyramid(weights)
        own = self.state_dict()
        left_out = {name for name in weights if name not in own and self._does_without(name)}
        given = {name: tensor for name, tensor in weights.items() if name not in left_out}
        problems = differences(own, given)
        new = {name for name in problems["missing"] if name.startswith("out_norms.")}
        problems["missing"] -= new
        if any(problems.values()):
            raise InputError(f"{source} does not fit the backbone {self.variant}: {listed(problems)}")
        self.load_state_dict(given, strict=False)
        print_log(
            f"{self.variant}: loaded {len(given)} of {len(own)} tensors from {source}; "
            f"new: {parts(new)}; left out: {parts(left_out)}",
            logger="current",
        )

    def _does_without(self, name: str) -> bool:
        stage = re.match(r"stages\.(\d+)\.", name)
        return name.startswith(("head.", "norm.", "out_norms.")) or bool(stage and int(stage[1]) >= len(self.stages))


def parts(names: set[str]) -> str:
    return ", ".join(sorted({re.match(r"(stages|out_norms)\.\d+|\w+", name)[0] for name in names})) or "none"


def from_official_pyramid(weights: StateDict) -> StateDict:
    """Names of a classifier in any known format to ours; ``norm{0,2,4,6}``: the levels of the official detectors."""
    return {
        re.sub(r"^norm([0246])\.", lambda match: f"out_norms.{int(match[1]) // 2}.", name): tensor
        for name, tensor in FROM[recognised(weights) or "ours"](weights).items()
    }


def rename_official(module: nn.Module, state_dict: StateDict, prefix: str, *_: Any) -> None:
    """Rename in place what the official detectors and segmentors call otherwise, under ``prefix`` in ``state_dict``."""
    theirs = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    ours = from_official_pyramid({name.removeprefix(prefix): tensor for name, tensor in theirs.items()})
    state_dict.update({prefix + name: tensor for name, tensor in ours.items()})
