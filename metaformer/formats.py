"""Rename the tensors of state dicts between this package and other libraries.

=============  =====================================================================================
``official``   github.com/sail-sg/poolformer: ``patch_embed``, ``network.*``
``timm``       ``timm.models.metaformer``: ``stem.conv``, ``head.norm``, ``head.fc``
``hf``         transformers' ``PoolFormerForImageClassification``: ``poolformer.encoder.*``
``mmpretrain`` the official names under ``backbone``, ``head.fc``
``toolbox``    detectors and segmentors of :mod:`metaformer.mm`; the backbone can be read but not written
``ours``       this package's
=============  =====================================================================================
"""

import re
from collections.abc import Callable
from functools import partial

from torch import Tensor

from metaformer.errors import InputError, check_known

StateDict = dict[str, Tensor]
Rows = list[tuple[str, str]]
"""Our name and the other library's: whole, or up to a dot. The letters in braces stand for numbers."""

TIMM: Rows = [
    ("stem.", "stem.conv."),
    ("stages.{i}.downsample.", "stages.{i}.downsample.conv."),
    ("stages.{i}.blocks.{j}.layer_scale{k}", "stages.{i}.blocks.{j}.layer_scale{k}.scale"),
    ("norm.", "head.norm."),
    ("head.", "head.fc."),
]
HF: Rows = [
    ("stem.", "poolformer.encoder.patch_embeddings.0.projection."),
    ("stages.{i}.downsample.", "poolformer.encoder.patch_embeddings.{i}.projection."),
    ("stages.{i}.blocks.{j}.norm1.", "poolformer.encoder.block.{i}.{j}.before_norm."),
    ("stages.{i}.blocks.{j}.norm2.", "poolformer.encoder.block.{i}.{j}.after_norm."),
    ("stages.{i}.blocks.{j}.mlp.fc{k}.", "poolformer.encoder.block.{i}.{j}.output.conv{k}."),
    ("stages.{i}.blocks.{j}.layer_scale{k}", "poolformer.encoder.block.{i}.{j}.layer_scale_{k}"),
    ("head.", "classifier."),
]
MMPRETRAIN: Rows = [  # the first name is the official one
    ("patch_embed.", "backbone.patch_embed."),
    ("network.", "backbone.network."),
    ("norm.", "backbone.norm6."),  # follows network.6, the blocks of the last stage
    ("head.", "head.fc."),
]


def renamed(rows: Rows, state_dict: StateDict, back: bool = False) -> StateDict:
    """Rename by the first matching row, from our names to the other library's, or ``back``.

    Raises:
        InputError: two tensors would have the same name.
    """
    rules = []
    for ours, theirs in rows:
        given, wanted = (theirs, ours) if back else (ours, theirs)
        pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(given)) + ("" if given.endswith(".") else r"\Z")
        rules.append((re.compile(pattern), re.sub(r"{(\w)}", r"\\g<\1>", wanted)))
    result: StateDict = {}
    for key, tensor in state_dict.items():
        name = str(key)
        new = next((pattern.sub(to, name, 1) for pattern, to in rules if pattern.match(name)), name)
        if new in result:
            raise InputError(f"the weights have two tensors that are {new!r} under other names: {key!r} is one")
        result[new] = tensor
    return result


def official(state_dict: StateDict, back: bool = False) -> StateDict:
    """To the names of the official code, which numbers the downsampling, position embedding and blocks of all stages in
    one sequence, or ``back``."""
    names = list(map(str, state_dict))
    positions = numbers(r"network\.(\d{1,3})\.pos_embed" if back else r"stages\.(\d{1,3})\.position\.", names)
    if back:  # from places in the sequence to stages
        positions = [(place - before) // 2 for before, place in enumerate(positions)]
    rows: Rows = [("stem.", "patch_embed.proj.")]
    for stage in range(max(numbers(r"(?:stages|network)\.(\d{1,3})\.", names), default=0) + 1):
        place = 2 * stage + sum(position < stage for position in positions)
        rows.append((f"stages.{stage}.downsample.", f"network.{place - 1}.proj."))
        if stage in positions:
            rows.append((f"stages.{stage}.position.", f"network.{place}."))
            place += 1
        rows.append((f"stages.{stage}.blocks.{{j}}.layer_scale{{k}}", f"network.{place}.{{j}}.layer_scale_{{k}}"))
        rows.append((f"stages.{stage}.blocks.", f"network.{place}."))
        rows.append((f"out_norms.{stage}.", f"norm{2 * stage}."))  # of the backbone of a detector or segmentor
    return renamed(rows, state_dict, back)


def numbers(pattern: str, names: list[str]) -> list[int]:
    """The numbers in names that begin with ``pattern``, in order, each once."""
    return sorted({int(match[1]) for match in map(re.compile(pattern).match, names) if match})


def mmpretrain(state_dict: StateDict, back: bool = False) -> StateDict:
    """To the names of mmpretrain, or ``back``."""
    if back:
        return official(renamed(MMPRETRAIN, state_dict, back), back)
    return renamed(MMPRETRAIN, official(state_dict))


def from_toolbox(state_dict: StateDict) -> StateDict:
    """Stem and stages only; the heads and the norms of the levels belong to another task."""
    trunk = re.compile(r"backbone\.(?=stem\.|stages\.)")
    return {trunk.sub("", str(name), 1): tensor for name, tensor in state_dict.items() if trunk.match(str(name))}


TO: dict[str, Callable[[StateDict], StateDict]] = {
    "official": official,
    "timm": partial(renamed, TIMM),
    "hf": partial(renamed, HF),
    "mmpretrain": mmpretrain,
    "ours": partial(renamed, []),
}
FROM: dict[str, Callable[[StateDict], StateDict]] = {
    **{name: partial(rename, back=True) for name, rename in TO.items()},
    "toolbox": from_toolbox,
}
MARKS = {
    "official": r"network\.0\.0\.",
    "timm": r"stem\.conv\.weight",
    "hf": r"poolformer\.encoder\.",
    "mmpretrain": r"backbone\.network\.0\.0\.",
    "toolbox": r"backbone\.stem\.",
    "ours": r"stages\.0\.blocks\.0\.norm1|stem\.weight",
}
"""How the name of some tensor starts in each format, and in no format listed before it."""


def recognised(state_dict: StateDict) -> str | None:
    """The format of a state dict according to its names; ``None`` if it is unknown."""
    return next((kind for kind, mark in MARKS.items() if any(re.match(mark, str(name)) for name in state_dict)), None)


def to_ours(state_dict: StateDict) -> StateDict:
    """From any format to our names; without a change if the format is unknown."""
    kind = recognised(state_dict)
    return FROM[kind](state_dict) if kind else state_dict


def convert(state_dict: StateDict, to: str = "ours") -> StateDict:
    """Rename the tensors of a state dict, whose format is recognised, to those of another library.

    timm's head averages before the norm, so its logits differ from the paper's for the same weights.

    Args:
        state_dict: names to tensors, in any of the formats.
        to: ``"official"``, ``"timm"``, ``"hf"``, ``"mmpretrain"`` or ``"ours"``.

    Raises:
        InputError: one of the formats is unknown, a backbone without classifier would become a whole model, or
            :func:`metaformer.fuse` made the weights.
    """
    check_known("format", to, TO)
    kind = recognised(state_dict)
    if kind is None:
        raise InputError(
            f"these are no weights of a MetaFormer in a known format ({', '.join(TO)}): the first name is "
            f"{next(iter(state_dict), 'none')!r}"
        )
    if any(re.match(r"(backbone\.)?stages\.\d+\.blocks\.\d+\.w1\Z", str(name)) for name in state_dict):
        raise InputError("metaformer.fuse made these weights, for this package alone: convert the model's own weights")
    if kind == "toolbox" and to != "ours":
        raise InputError(f"a detector's or segmentor's backbone has no classifier and cannot become a whole {to} model")
    return TO[to](FROM[kind](state_dict))
