"""The records of analysis/results/, checked against the rows that they are shown in."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from metaformer.analysis.cells import Accuracy, Measurement
from metaformer.analysis.paper import built_rows, key_of, paper, rows_of
from metaformer.errors import InputError, nearest
from metaformer.records import Benchmark, Classification, Detection, Record, Segmentation, Training, read_record
from metaformer.records.statistics import Results
from metaformer.variants import VARIANTS

Evaluation = Classification | Detection | Segmentation
Metric = Callable[[Evaluation], float | None]


class Measured:
    """What was measured: single records by their kind, oldest first, and studies by name.

    ``problems`` holds a sentence for each record that cannot be shown.
    """

    def __init__(self, folder: Path):
        self.records: dict[str, list[Record]] = defaultdict(list)
        self.studies: dict[str, Results] = {}
        self.problems: list[str] = []
        runs: dict[str, list[Training]] = defaultdict(list)
        for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*/*.json")):
            try:
                record = read_record(path)
                if isinstance(record, Training) and record.settings.study:
                    runs[record.settings.study].append(record)
                    continue
                if isinstance(record, Evaluation | Training | Benchmark):
                    check_row(record, path)
                if record in self.records[record.kind]:
                    raise InputError(f"{path} holds a record that is there under another name: take one out")
                self.records[record.kind].append(record)
            except InputError as error:
                self.problems.append(str(error))
        for kind, records in self.records.items():
            self.records[kind] = latest(sorted(records, key=lambda record: record.date))
        for name, records in sorted(runs.items()):
            try:
                self.studies[name] = Results(name, records)
            except InputError as error:
                self.problems.append(str(error))

    def of_model(self, kind: str, build: str) -> list[Record]:
        """Records of a kind about a model of paper.yaml, oldest first."""
        return [record for record in self.records[kind] if record.model == key_of(build)]

    def accuracy(self, build: str | None, metric: Metric, epochs: int = 300) -> Measurement:
        """What ``metric`` finds in the evaluations of a model that was trained for so long, by the weights' file."""
        by_file: dict[str, list[float]] = defaultdict(list)
        for kind in ("classification", "detection", "segmentation"):
            for record in self.of_model(kind, build) if build else []:
                if epochs_of(record) == epochs and (value := metric(record)) is not None:
                    by_file[record.checkpoint.file if record.checkpoint else "no checkpoint"].append(value)
        return Measurement(Accuracy(dict(by_file)) if by_file else None)


def latest(records: list[Record]) -> list[Record]:
    """The last record of each evaluated checkpoint and of each training run; all benchmarks and other records."""

    def identity(record: Record) -> tuple:
        if isinstance(record, Training):  # imported again after it had gone on
            return record.model, record.starts[0].date, record.seed
        if isinstance(record, Evaluation):  # evaluated again, which makes no further run of it
            return record.model, record.checkpoint and (record.checkpoint.file, record.checkpoint.sha256)
        return (id(record),)

    return list({identity(record): record for record in records}.values())


def epochs_of(record: Evaluation) -> int:
    """Epochs that the weights were trained for; 300, the paper's, if the record does not tell."""
    return record.training.epochs if isinstance(record, Classification) and record.training else 300


def check_row(record: Evaluation | Training | Benchmark, path: Path) -> None:
    """Refuse a record that is about another model, data set or input size than the rows of the paper.

    Raises:
        InputError: names the file, the field, and what the table has there.
    """
    # The first table that has the model: all figures of Table 5's baseline are Table 2's.
    places = {key_of(row["build"]): (table, row) for table, row in reversed(list(built_rows()))}
    if record.model not in places:
        raise InputError(f"{path}: model {record.model!r} is in no table{nearest(record.model, places)}")
    if isinstance(record, Benchmark):
        return
    table, row = places[record.model]
    expected = paper()[table]["data"]
    if expected["kind"] == "classification" and record.kind in ("classification", "training"):
        size, own = getattr(record.settings, "img_size", None), row.get("image", 224)
        if size != own:
            raise InputError(f"{path}: settings.img_size is {size}, but {table} has {own}")
        crop = getattr(record.settings, "crop_pct", None)
        own_crop = VARIANTS[record.model].crop_pct if record.model in VARIANTS else crop
        if record.kind == "classification" and crop not in (None, own_crop):
            raise InputError(f"{path}: settings.crop_pct is {crop}, but {record.model} is evaluated with {own_crop}")
        if changed := getattr(record.settings, "model_args", {}):
            raise InputError(f"{path}: settings.model_args is {changed}, but {table} has {record.model} as it is")
    if isinstance(record, Training):
        return
    if record.data.classes != expected["classes"]:
        raise InputError(f"{path}: data of {record.data.classes} classes, but {table} has {expected['classes']}")
    if record.kind != expected["kind"]:
        raise InputError(f"{path}: a record of {record.kind}, but {table} is about {expected['kind']}")
    if record.images != expected["images"]:
        raise InputError(f"{path}: {record.images} images, but {table} is measured on {expected['images']}")
    known = [row["epochs"] for row in rows_of("table7")]
    if epochs_of(record) not in known:
        raise InputError(
            f"{path}: training.epochs is {epochs_of(record)}, but the paper has {', '.join(map(str, known))}"
        )


def top1(record: Classification) -> float:
    return record.metrics.top1


def metric(name: str, scale: float = 1) -> Metric:
    """What an evaluation has under ``name``, times ``scale``; ``None`` if it has none (mmdet's -1: no such objects)."""
    return lambda record: scale * record.metrics[name] if record.metrics.get(name, -1) >= 0 else None
