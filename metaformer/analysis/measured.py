"""Read the records of analysis/results/ and check them against the table rows in which they appear."""

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import sem
from timm import get_pretrained_cfg

from metaformer.analysis.cells import Mean, Measurement
from metaformer.analysis.count import ROOT
from metaformer.analysis.paper import BUILT, key_of, paper, rows_of
from metaformer.errors import InputError, nearest
from metaformer.records import Record, Training, read_record
from metaformer.records.schema import Evaluation
from metaformer.records.statistics import Results, student
from metaformer.training.config import CONFIGS, load_config, read_yaml
from metaformer.variants import ABLATIONS
from metaformer.weights.opener import INPUTS

EXECUTION = {"epochs", "seed", "data_dir", "device_batch", "precision", "expected_top1"}
"""Settings in the configs that the row of a run states, or that do not change what is computed."""


class Measured:
    """All records in ``folder``: single ones by kind, oldest first, and studies by name.

    Raises:
        InputError: a record is damaged, or the tables cannot show it.
    """

    def __init__(self, folder: Path):
        self.records: dict[str, list[Record]] = defaultdict(list)
        runs: dict[str, dict[tuple[str, int], Training]] = defaultdict(dict)
        for path in sorted(folder.rglob("*.json")):
            record = read_record(path)
            check_record(record, path)
            if isinstance(record, Training) and (study := record.settings.study):
                runs[study][record.settings.row, record.seed] = record
            else:
                self.records[record.kind].append(record)
        for kind, records in self.records.items():
            self.records[kind] = latest(sorted(records, key=lambda record: record.date))
        self.studies = {name: Results(name, list(of.values())) for name, of in sorted(runs.items())}

    def of_model(self, kind: str, build: str) -> list[Record]:
        """Records of a kind about a model of paper.yaml, oldest first."""
        return [record for record in self.records[kind] if key_of(record.model) == key_of(build)]

    def accuracy(self, build: str, metric: str, epochs: int = 300) -> Measurement:
        """The evaluations of a model that was trained for ``epochs``, in percent, by the weights' file.

        Args:
            metric: name of the accuracy in the records. Those of COCO are fractions, and -1 where there are no objects.
        """
        by_file: dict[str, list[float]] = defaultdict(list)
        for kind in ("classification", "detection", "segmentation"):
            for record in self.of_model(kind, build):
                value = record.metrics.get(metric, -1)
                if epochs_of(record) == epochs and value >= 0:
                    by_file[source_of(record)].append(100 * value if metric.startswith("coco/") else value)
        texts = []
        for file, values in by_file.items():
            number, differ = len(values), len(set(values)) > 1
            margin = student(0, sem(values), number - 1).high if differ else None
            runs = f"{' (95 %)' if differ else ''} of {number} runs" if number > 1 else ""
            texts.append(f"{Mean(mean(values), margin)}{runs} ({file})")
        return Measurement("; ".join(texts) or None)


def latest(records: list[Record]) -> list[Record]:
    """The last record of each evaluated checkpoint and of each training run, and all records of other kinds."""

    def identity(record: Record) -> tuple:
        if isinstance(record, Training):  # a run may be imported again after it continued
            return record.model, record.starts[0].date, record.seed
        if isinstance(record, Evaluation):  # a second evaluation is not a second run
            return record.model, record.checkpoint and (record.checkpoint.file, record.checkpoint.sha256)
        return (id(record),)

    return list({identity(record): record for record in records}.values())


def epochs_of(record: Evaluation) -> int:
    """Epochs that the weights were trained for; the paper's 300 if the record does not state them."""
    return record.training.epochs if record.training else 300


def source_of(record: Evaluation) -> str:
    """The weights' file, and the settings in which the run that trained them departs from the config of its model.

    Baselines have no config of their own and are compared with the recipe of all models.
    """
    file = record.checkpoint.file if record.checkpoint else "no checkpoint"
    if not record.training:
        return file
    model = key_of(record.model)
    config = CONFIGS.parent / ("ablations" if model in ABLATIONS else "classification") / f"{model}.yaml"
    config = config if config.is_file() else CONFIGS / "imagenet.yaml"
    given = record.training.model_dump()
    defaults = {"train_split", "pretrained", "checkpoint", "drop_path", "lr", "opt_eps", "opt_betas", "layer_decay"}
    recipe = {**load_config([str(config)]).model_dump(mode="json", include=defaults), **read_yaml(config)}
    compared = sorted(recipe.keys() & given.keys() - EXECUTION)
    return ", ".join([file, *(f"{key}={given[key]}" for key in compared if given[key] != recipe[key])])


def check_record(record: Record, path: Path) -> None:
    """Raise an ``InputError`` if the tables cannot show a record."""
    if isinstance(record, Training) and record.settings.study:
        Results(record.settings.study, [record])
    elif isinstance(record, Evaluation | Training):
        check_row(record, path)


def check_row(record: Evaluation | Training, path: Path) -> None:
    """Raise an ``InputError`` if a record's model, data set or input differs from that of its row in the paper."""
    model = key_of(record.model)
    # Table 5 repeats the baseline of Table 2, and the first table counts.
    places = {key_of(row["build"]): (table, row) for table in reversed(BUILT) for row in rows_of(table)}
    if model not in places:
        raise InputError(f"{path}: model {record.model!r} is in no table{nearest(model, places)}")
    table, row = places[model]
    data = paper()[table]["data"]
    fields: dict[str, tuple[Any, Any]] = {}  # found and expected
    if isinstance(record, Evaluation):
        fields["kind"] = record.kind, data["kind"]
        fields["data.classes"] = record.data.classes, data["classes"]
        # Of a classifier, without unreadable pictures.
        fields["images"] = record.metrics.get("images", record.data.images), data["images"]
    if data["kind"] == "classification" and record.kind in ("classification", "training"):
        fields["settings.img_size"] = record.settings.img_size, row.get("image", 224)
        fields["settings.model_args"] = record.settings.model_args, {}
    if record.kind == data["kind"] == "classification":
        own = json.loads(json.dumps(get_pretrained_cfg(record.model).to_dict()))
        given = record.settings.model_dump(exclude_none=True)
        fields |= {f"settings.{name}": (given[name], own[name]) for name in INPUTS if name in given}
    for field, (found, expected) in fields.items():
        if found != expected:
            raise InputError(f"{path}: {field} is {found}, but {table} has {expected}")
    for part, own in test_settings(row["build"]).items() if record.kind in ("detection", "segmentation") else []:
        if getattr(record.settings, part, None) != own:
            raise InputError(f"{path}: settings.{part} is not that of {row['build']}: test without --tta or changes")
    known = sorted({300, *(of["epochs"] for of in rows_of("table7") if of["build"] == model)})
    if isinstance(record, Evaluation) and epochs_of(record) not in known:
        raise InputError(f"{path}: training.epochs is {epochs_of(record)}, but the paper has {known} for this model")


@cache
def test_settings(path: str) -> dict[str, Any]:
    """The settings of the test of a config of mmdet or mmseg, as JSON has them."""
    from mmengine.config import Config  # here: counting and classifiers do not need it

    from metaformer.mm.config import settings_of_test

    return json.loads(json.dumps(settings_of_test(Config.fromfile(ROOT / path, import_custom_modules=False))))
