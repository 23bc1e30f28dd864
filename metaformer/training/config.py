"""The settings of a run: one flat list of names, from a YAML file and from the command line."""

import json
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from metaformer.errors import InputError, nearest
from metaformer.provenance import write_file
from metaformer.training import yaml12

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "classification"
DEMO = CONFIGS / "mnist.yaml"
Checked = TypeVar("Checked", bound=BaseModel)

# strict: true and false are no numbers.
NotNegative = Annotated[float, Field(ge=0, strict=True)]
Above0 = Annotated[float, Field(gt=0, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
PositiveShare = Annotated[float, Field(gt=0, le=1, strict=True)]
BelowOne = Annotated[float, Field(ge=0, lt=1, strict=True)]
Percent = Annotated[float, Field(ge=0, le=100, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Side = Annotated[int, Field(ge=32, strict=True)]
Mean = tuple[Share, Share, Share]
Std = tuple[PositiveShare, PositiveShare, PositiveShare]
Filter = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
TrainFilter = Literal[Filter, "random"]
Erase = Literal["const", "rand", "pixel"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


class Config(BaseModel):
    """All settings of a run; ``configs/classification/imagenet.yaml`` comments on the values of the paper."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    model: str = Field("poolformer_s12", description="Name of a model that timm knows")
    model_args: dict[str, Any] = Field({}, description="Further arguments of the model's constructor")
    drop_path: BelowOne = Field(0.0, description="Drop path of the last block; grows linearly from 0 in the first")
    pretrained: bool = Field(False, description="Start from the released weights")
    checkpoint: str | None = Field(None, description="Start from the weights in this file or folder")
    replace_head: bool = Field(False, description="Train a new classifier where `checkpoint` has other classes")

    dataset: str = Field("", description="Empty for folders or tars, `mnist5k`, timm's `wds/`, `hfds/`, `torch/`...")
    data_dir: str | None = Field(None, description="Folder of the data set")
    train_split: str = Field("train", description="Name of the training split")
    val_split: str = Field("validation", description="Name of the validation split")
    dataset_args: dict[str, Any] = Field({}, description="Further arguments of `timm.data.create_dataset`")
    num_classes: Positive | None = Field(None, description="Number of classes, for data sets that do not state it")
    workers: Count | None = Field(None, description="Loader processes per device. null: one per core")
    bad_pictures: Literal["stop", "skip"] = Field("stop", description="What to do with unreadable pictures")

    data_in_memory: bool = Field(False, description="Decode pictures (of one size) once; crop and flip on the device")

    img_size: Side = Field(224, description="Height and width of the input in pixels")
    crop_pct: PositiveShare | None = Field(None, description="Evaluation crop / resized side. null: the model's own")
    interpolation: Filter | None = Field(None, description="Resize filter of the evaluation. null: the model's own")
    mean: Mean | None = Field(None, description="Mean of each channel for pixels in [0, 1]. null: the model's own")
    std: Std | None = Field(None, description="Standard deviation, as `mean`. null: the model's own")

    scale: tuple[Share, Share] = Field((0.08, 1.0), description="Share of a picture's area that a random crop takes")
    ratio: tuple[Above0, Above0] = Field((3 / 4, 4 / 3), description="Width / height of a random crop")
    hflip: Share = Field(0.5, description="Probability of a horizontal flip")
    vflip: Share = Field(0.0, description="Probability of a vertical flip")
    train_interpolation: TrainFilter = Field("random", description="Resize filter. random: bilinear or bicubic")
    auto_augment: str | None = Field(None, description="In timm's notation, such as rand-m9-mstd0.5-inc1. null: none")
    color_jitter: NotNegative = Field(0.0, description="Strength of color jitter; no effect beside `auto_augment`")
    mixup: NotNegative = Field(0.0, description="Alpha of Mixup. 0: no Mixup")
    cutmix: NotNegative = Field(0.0, description="Alpha of CutMix. 0: no CutMix")
    mixup_prob: Share = Field(1.0, description="Probability that Mixup or CutMix is applied")
    mixup_switch_prob: Share = Field(0.5, description="Probability of CutMix instead of Mixup if both are on")
    mixup_mode: Literal["batch", "pair", "elem"] = Field("batch", description="Draw Mixup per batch, pair or picture")
    mixup_off_epoch: Count = Field(0, description="Epochs after which Mixup and CutMix are off. 0: never")
    smoothing: BelowOne = Field(0.0, description="Label smoothing")
    erase_prob: Share = Field(0.0, description="Probability of random erasing")
    erase_mode: Erase = Field("pixel", description="Fill with zeros, one random color, or random pixels")
    erase_count: Positive = Field(1, description="Largest number of rectangles that are erased")

    epochs: Positive = Field(300, description="Epochs of the learning-rate schedule, warmup included")
    warmup_epochs: Count = Field(0, description="Epochs in which the learning rate rises linearly from `warmup_lr`")
    cooldown_epochs: Count = Field(0, description="Further epochs at `min_lr`, after a cosine")
    global_batch: Positive = Field(4096, description="Images per optimizer step, over all devices and passes")
    device_batch: Positive = Field(128, description="Most images that one device takes in a pass")
    base_lr: NotNegative = Field(1.0e-3, description="Learning rate for each 1024 images of `global_batch`")
    lr: NotNegative | None = Field(None, description="Learning rate at any batch size. null: from `base_lr`")
    warmup_lr: NotNegative = Field(0.0, description="Learning rate at the beginning of the warmup")
    min_lr: NotNegative = Field(0.0, description="Learning rate at the end of the cosine")
    sched: Literal["cosine", "constant"] = Field("cosine", description="Learning rate after the warmup")
    sched_on_updates: bool = Field(False, description="Change the learning rate at every step instead of every epoch")
    opt: str = Field("adamw", description="Name of an optimizer that timm knows")
    opt_eps: NotNegative | None = Field(1.0e-8, description="Epsilon. null, the default of all but AdamW: its own")
    opt_betas: tuple[BelowOne, ...] | None = Field((0.9, 0.999), description="Betas of the optimizer, as `opt_eps`")
    weight_decay: NotNegative = Field(0.05, description="Weight decay of all parameters except biases and vectors")
    layer_decay: PositiveShare | None = Field(None, description="Learning-rate factor of each earlier layer. null: 1")
    clip_grad: Above0 | None = Field(None, description="Largest norm of the gradient. null: no clipping")
    drop: BelowOne = Field(0.0, description="Probability of dropout before the classifier")
    ema_decay: BelowOne = Field(0.0, description="Decay of the moving average of the weights. 0: no average")

    precision: Precision = Field("auto", description="Autocast type. auto: bfloat16 on CUDA, float32 on a CPU")
    channels_last: bool = Field(True, description="Keep images and weights in channels-last layout")
    compile: bool = Field(False, description="Compile the model with torch.compile")
    grad_checkpointing: bool = Field(False, description="Recompute activations in the backward pass to save memory")
    seed: Count = Field(42, description="Seed of all random numbers")
    deterministic: bool = Field(False, description="Give the same numbers in every run on a GPU too; slower")

    output: str | None = Field(None, description="Folder of the run. null: runs/MODEL-DATA-DATE")
    resume: bool = Field(False, description="Continue the run in `output`, if there is one")
    log_interval: Positive = Field(10, description="Optimizer steps between two entries in the log")
    study: str | None = Field(None, description="Set by ablate.sh: the study that the run belongs to")
    row: str | None = Field(None, description="Set by ablate.sh: the row of the study")
    expected_top1: Percent | None = Field(None, description="Top-1 of the paper, shown beside the one reached")

    @field_validator("scale", "ratio")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("the first number must be positive and not larger than the second")
        return value

    @field_validator("auto_augment")
    @classmethod
    def _augmentation(cls, name: str | None) -> str | None:
        # timm ignores sections that it cannot read, and the part of a magnitude above its maximum.
        sections = re.fullmatch(r"(rand|augmix)((-t\w*|-[a-z]+\d+(\.\d+)?)*)", name or "rand")
        if name and name.startswith(("rand", "augmix")) and not sections:
            raise ValueError("a section is a letter or word with a number, as in rand-m9-mstd0.5-inc1")
        magnitude = re.search(r"-m(\d+(\.\d+)?)", name or "")
        if magnitude and float(magnitude[1]) > 10 and "-mmax" not in name:
            raise ValueError("the magnitude is m0 to m10")
        return name

    @field_validator("opt")
    @classmethod
    def _optimizer(cls, name: str) -> str:
        from timm.optim import list_optimizers

        if name.removeprefix("lookahead_") not in list_optimizers():
            raise ValueError(f"timm has no such optimizer{nearest(name, list_optimizers())}")
        return name

    @model_validator(mode="after")
    def _together(self) -> "Config":
        for name in {"opt_eps", "opt_betas"} - self.model_fields_set if self.opt != "adamw" else ():
            setattr(self, name, None)  # the defaults are those of AdamW
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} is longer than epochs={self.epochs}")
        if self.pretrained and self.checkpoint:
            raise ValueError("pretrained=true and checkpoint= exclude each other: give one of them")
        if self.data_in_memory and (self.auto_augment or self.color_jitter):
            raise ValueError("data_in_memory=true crops and flips only: use auto_augment=null color_jitter=0")
        if self.data_in_memory and self.train_interpolation not in ("bilinear", "bicubic", "random"):
            raise ValueError("data_in_memory=true needs train_interpolation=bilinear, bicubic or random")
        if self.data_in_memory and self.bad_pictures == "skip":
            raise ValueError("data_in_memory=true needs bad_pictures=stop")
        if self.replace_head and not self.checkpoint:
            raise ValueError("replace_head=true needs checkpoint=; released weights get a new classifier anyway")
        return self


GROUPS = {
    **{"model": "Model", "dataset": "Data", "img_size": "Input", "scale": "Augmentation of the training pictures"},
    **{"epochs": "Optimization", "precision": "Execution", "output": "Run"},
}
"""The first setting of each group, and the group's heading."""
TEXTS = {name for name, field in Config.model_fields.items() if field.annotation in (str, str | None)}
"""Settings that are text. Their values are not parsed, so that output=20261123 is a name."""
FLAGS = {name for name, field in Config.model_fields.items() if field.annotation is bool}


# Reading


def load_config(arguments: list[str]) -> Config:
    """``[CONFIG] [key=value | --key value | --key=value | --flag | --no-flag]...`` to a checked :class:`Config`.

    CONFIG is a YAML file, which may name one other as ``base``, or the folder of an earlier run, which then continues.

    Raises:
        InputError: no such file, a key that does not exist (with the nearest that does), a value that is not allowed.
    """
    values: dict[str, Any] = {}
    path = DEMO
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        path, arguments = Path(arguments[0]), arguments[1:]
        if os.path.isdir(path):
            values = {"output": str(path), "resume": True}
            path = path / "config.yaml"
    of_file, overrides = read_yaml(path), parse_overrides(arguments)
    if overrides.keys() & {"model", "model_args"}:
        of_file.pop("expected_top1", None)  # that of another model
    values = {**of_file, **values, **overrides}
    return check(values, source=f"the command line and {path}")


def read_yaml(path: Path, may_have_base: bool = True) -> dict[str, Any]:
    """The settings in a config file and in its base."""
    if not os.path.isfile(path):
        shipped = ", ".join(file.name for file in sorted(CONFIGS.glob("*.yaml")))
        raise InputError(
            f"there is no config {path}: give a YAML file, one of {CONFIGS}/ ({shipped}), or a run's folder"
        )
    values = read_yaml_mapping(path)
    if "base" in values:
        if not may_have_base:
            raise InputError(f"{path} is the base of another config and has a base itself: one level is the limit")
        base = values.pop("base")
        if not isinstance(base, str):
            raise InputError(f"base is {short(base)} in {path}: give the name of a file")
        values = {**read_yaml(path.parent / base, may_have_base=False), **values}
    for key in values:
        check_key(str(key), str(path))
    return values


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The content of a YAML file that must be a mapping; scalars of the settings in TEXTS stay text."""
    try:
        values = yaml12.load(path.read_bytes(), TEXTS)
    except OSError as error:
        raise InputError(f"cannot read the config {path}: {error.strerror}") from error
    except Exception as error:  # PyYAML's own, and Python's for a number that is too long
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}: a config is a list of lines `key: value`")
    return values


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """The settings that a command line gives; see :func:`load_config` for the forms."""
    values: dict[str, Any] = {}
    waiting = iter(arguments)
    for argument in waiting:
        key, equals, value = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not equals and not argument.startswith("--"):
            raise InputError(f"cannot read the argument {argument!r}: settings are given as key=value or --key value")
        if not equals and key.removeprefix("no_") in FLAGS:
            values[key.removeprefix("no_")] = not key.startswith("no_")
            continue
        check_key(key, "the command line")
        value = value if equals else next(waiting, None)
        if value is None:
            raise InputError(f"--{key} needs a value")
        values[key] = parse_value(key, value)
    return values


def parse_value(key: str, text: str) -> Any:
    if key in TEXTS or not text:
        return None if text in yaml12.NULLS[1:] else text
    try:
        return yaml12.load(text)
    except Exception:  # as in read_yaml_mapping
        return text


def check_key(key: str, source: str) -> None:
    if key not in Config.model_fields:
        raise InputError(f"{source} has an unknown setting {key!r}{nearest(key, Config.model_fields)}")


def check(values: dict[str, Any], source: str, kind: type[Checked] = Config) -> Checked:
    """The values as a :class:`Config` or another model, or an InputError that names the first one not allowed."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        key = key if key.isprintable() else repr(key)
        given = f"{key} is {short(first['input'])} in {source}" if key else source
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{given}: {message[0].lower()}{message[1:]}") from error


def short(value: Any) -> str:
    """A value of a YAML file as short text; a few lines of YAML can expand to more than the memory holds."""
    form = reprlib.Repr()
    form.maxlevel, form.maxstring, form.maxother = 1, 100, 100
    return form.repr(value)


def save_config(config: Config, path: Path) -> None:
    write_file(path, yaml12.dump(config.model_dump(mode="json")).encode())


# Help


def described() -> Iterator[tuple[str, str, str, str]]:
    """Name, default, allowed values and description of every setting."""
    schema = Config.model_json_schema()["properties"]
    for name, field in Config.model_fields.items():
        default = field.default if isinstance(field.default, str) else json.dumps(field.default)
        yield name, default, allowed(schema[name]), field.description


def allowed(schema: dict[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(allowed(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(schema["enum"])
    if "items" in schema:
        return f"[{allowed(schema['items'])}, ...]"
    if "prefixItems" in schema:
        return f"[{', '.join(allowed(item) for item in schema['prefixItems'])}]"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in signs.items() if bound in schema]
    return " ".join([schema["type"], *bounds])


def settings_help() -> str:
    """Every setting with its default, allowed values and description, for ``--help``."""
    lines = []
    for name, default, values, description in described():
        lines += ["", f"{GROUPS[name]}:"] if name in GROUPS else []
        lines += [f"  {name}={default}", f"      {description} ({values})"]
    return "\n".join(lines).strip()


def settings_table() -> str:
    """Every setting with its default, allowed values and description, in Markdown."""
    lines = ["| setting | default | values | meaning |", "| --- | --- | --- | --- |"]
    for name, default, values, description in described():
        lines += [f"| **{GROUPS[name]}** | | | |"] if name in GROUPS else []
        lines.append(f"| `{name}` | `{default or '(empty)'}` | {values.replace('|', 'or')} | {description} |")
    return "\n".join(lines)
