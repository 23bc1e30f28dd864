"""The settings of a run: one flat list of names, from a YAML file and from the command line."""

import os
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metaformer.errors import InputError, nearest
from metaformer.provenance import write_file

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "classification"
DEMO = CONFIGS / "mnist.yaml"

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Rgb = tuple[float, float, float]


class Config(BaseModel):
    """Every setting with its type and default; configs/classification/imagenet.yaml comments on those of the paper."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    # Model
    model: str = "poolformer_s12"  # any name that timm knows
    model_args: dict[str, Any] = {}  # further arguments of its constructor
    drop_path: Share = 0.0
    pretrained: bool = False  # start from the weights its authors released
    checkpoint: str | None = None  # start from the weights in this file
    replace_head: bool = False  # the file's classifier may have another number of classes; train a new one

    # Data
    dataset: str = ""  # "": folders or tars of class folders; "mnist5k"; or timm's wds/, hfds/, hfids/, tfds/, torch/
    data_dir: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    dataset_args: dict[str, Any] = {}  # further arguments of timm.data.create_dataset
    num_classes: Positive | None = None  # for data that do not tell
    workers: Annotated[int, Field(ge=0)] | None = None  # loader processes per device; null: one per core
    bad_pictures: Literal["stop", "skip"] = "stop"  # what cannot be read stops the run, or is left out and named

    # Input
    img_size: Annotated[int, Field(ge=32)] = 224
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None  # of the evaluation; null: the model's own
    interpolation: str | None = None  # of the evaluation; null: the model's own
    mean: Rgb | None = None  # null: the model's own
    std: Rgb | None = None

    # Augmentation
    scale: tuple[Share, Share] = (0.08, 1.0)  # share of the picture's area that a random crop takes
    ratio: tuple[float, float] = (0.75, 1.3333)
    hflip: Share = 0.5
    vflip: Share = 0.0
    train_interpolation: str = "random"
    auto_augment: str | None = None
    color_jitter: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: Share = 1.0
    mixup_switch_prob: Share = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    mixup_off_epoch: int = 0  # 0: never
    smoothing: Share = 0.0
    erase_prob: Share = 0.0
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    erase_count: Positive = 1

    # Optimisation
    epochs: Positive = 300
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    cooldown_epochs: Annotated[int, Field(ge=0)] = 0
    global_batch: Positive = 4096  # images per optimizer step, over all devices and accumulated passes
    device_batch: Positive = 128  # most images that one device takes at once
    base_lr: float = 1.0e-3  # learning rate for each 1024 images of the global batch
    lr: float | None = None  # the learning rate itself, whatever the batch
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    sched: Literal["cosine", "constant"] = "cosine"
    sched_on_updates: bool = False  # move the learning rate at every optimizer step, not at every epoch
    opt: str = "adamw"
    opt_eps: float = 1.0e-8
    opt_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    layer_decay: float | None = None
    clip_grad: float | None = None  # largest norm of the gradient; null: no clipping
    drop: Share = 0.0  # dropout before the classifier
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0  # moving average of the weights; 0: none

    # Execution
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on CUDA, float32 on a CPU
    channels_last: bool = True
    compile: bool = False
    grad_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0)] = 42
    deterministic: bool = False  # the same numbers in every run on a GPU too, at a cost; a CPU gives them anyway

    # Run
    output: str | None = None  # null: runs/NAME-DATE
    resume: bool = False  # continue the run in output, if there is one
    log_interval: Positive = 10  # optimizer steps between two entries in the log
    study: str | None = None  # of ablate.py: the study and the row of it that the run belongs to
    row: str | None = None
    expected_top1: float | None = None  # the paper's figure on ImageNet-1K, shown beside the one reached there


def load_config(arguments: list[str], default: Path | None = DEMO) -> Config:
    """``[CONFIG] [key=value | --key value | --key=value | --flag | --no-flag]...`` to a checked :class:`Config`.

    CONFIG is a YAML file, which may name one other as ``base``, or the folder of an earlier run, which then continues.

    Raises:
        InputError: no such file, a key that does not exist (with the nearest that does), a value of the wrong kind.
    """
    arguments = list(arguments)
    values: dict[str, Any] = {}
    path = default
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        path = Path(arguments.pop(0))
        if os.path.isdir(path):
            values = {"output": str(path), "resume": True}
            path = path / "config.yaml"
    if path is not None:
        values = {**read_yaml(path), **values}
    return check({**values, **parse_overrides(arguments)}, source="the command line and " + str(path))


def read_yaml(path: Path, may_have_base: bool = True) -> dict[str, Any]:
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
    try:
        values = yaml.safe_load(path.read_bytes()) or {}
    except OSError as error:
        raise InputError(f"cannot read the config {path}: {error.strerror}") from error
    except Exception as error:  # PyYAML's own, and Python's for a date or number that is none
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}: a config is a list of lines `key: value`")
    return values


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        option = argument.startswith("--")
        key, equals, value = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not option and not equals:
            raise InputError(f"cannot read the argument {argument!r}: settings are given as key=value or --key value")
        if not equals and key.startswith("no_") and is_flag(key.removeprefix("no_")):
            key, value = key.removeprefix("no_"), "false"
        elif not equals:
            check_key(key, "the command line")
            if is_flag(key):
                value = "true"
            elif waiting:
                value = waiting.pop(0)
            else:
                raise InputError(f"--{key} needs a value")
        check_key(key, "the command line")
        try:
            values[key] = yaml.safe_load(value) if value else ""
        except Exception:  # as in read_yaml
            values[key] = value
    return values


def is_flag(key: str) -> bool:
    return key in Config.model_fields and Config.model_fields[key].annotation is bool


def check_key(key: str, source: str) -> None:
    if key not in Config.model_fields:
        raise InputError(f"{source} has an unknown setting {key!r}{nearest(key, Config.model_fields)}")


def check(values: dict[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        key = key if key.isprintable() else repr(key)
        raise InputError(
            f"{key} is {short(first['input'])} in {source}: {first['msg'][0].lower()}{first['msg'][1:]}"
        ) from error


def short(value: Any) -> str:
    """A value as YAML gave it: a few lines can stand for more than the memory holds."""
    form = reprlib.Repr()
    form.maxlevel, form.maxstring, form.maxother = 1, 100, 100
    return form.repr(value)


def save_config(config: Config, path: Path, comment: str) -> None:
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_file(path, lambda file: file.write(f"{comment}\n{text}".encode()))
