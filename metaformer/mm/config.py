"""Read configs of mmdet and mmseg. A config is code, so it can raise any error."""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from metaformer.errors import InputError, explained, nearest


def read_config(path: str, scopes: Collection[str]) -> Config:
    """Read the config of a model.

    Args:
        scopes: toolboxes that the config may be of, ``mmdet`` or ``mmseg``.

    Raises:
        InputError: the file does not exist, is not a config, has no model, or is of another toolbox.
    """
    if not Path(path).is_file():
        near = nearest(Path(path).stem, [file.stem for file in Path(path).parent.glob("*.py")])
        raise InputError(f"there is no config {path}{near}")
    with explained(f"cannot read the config {path}"):
        config = Config.fromfile(path)
    if config.get("default_scope") not in scopes or not config.get("model"):
        raise InputError(f"{path} is not the config of a model of {' or '.join(scopes)}")
    return config


def build_model(config: Config) -> nn.Module:
    """Build the model of a config, without the weights of ``init_cfg``.

    Raises:
        InputError: the config has a wrong value.
    """
    init_default_scope(config.default_scope)
    with explained(f"cannot build the model of {config.filename}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the toolboxes warn of their own deprecations
        return MODELS.build(config.model)


def evaluators(config: Config, split: str) -> list[dict[str, Any]]:
    given = config[f"{split}_evaluator"]
    return given if isinstance(given, list) else [given]


def settings_of_test(config: Config) -> dict[str, Any]:
    """What the figures of a test depend on, beside weights and data, as in the config."""
    model, loader = config.model.to_dict(), config.test_dataloader
    model.get("backbone", {})["init_cfg"] = None
    files = {"ann_file", "classwise", "keep_results", "outfile_prefix", "output_dir"}  # these change no figure
    return {
        "model": model,
        "pipeline": loader.dataset.get("pipeline", []),
        "batch_size": loader.get("batch_size"),  # the pictures of a batch are padded to one size
        "loop": config.test_cfg,
        "evaluators": [{key: each[key] for key in each if key not in files} for each in evaluators(config, "test")],
    }
