"""Fields and consistency rules of result records."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from metaformer.errors import InputError
from metaformer.provenance import read_json
from metaformer.training.config import Count, Positive

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Part(BaseModel):
    """Base class of all parts of a record. Fields that a class does not name are kept."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Hardware(Part):
    cpu: str
    cpu_capability: str | None = None
    """The vector instructions that PyTorch uses, such as ``AVX2``; missing in early records."""
    cores: Positive
    gpus: list[str]

    @property
    def processor(self) -> str:
        instructions = f" ({self.cpu_capability})" if self.cpu_capability else ""
        return f"{self.cpu}{instructions}, {self.cores} cores"

    @property
    def device(self) -> str:
        """The GPU, or else the processor."""
        return self.gpus[0] if self.gpus else self.processor


class Provenance(Part):
    command: str
    commit: str | None
    versions: dict[str, str | None]
    hardware: Hardware
    date: str


class Data(Part):
    classes: Positive
    images: Positive | None = None
    val_images: Positive | None = None
    train_sha256: str | None = None
    val_sha256: str | None = None


class Settings(Part):
    img_size: Positive | None = None
    crop_pct: float | None = None
    model_args: dict[str, Any] = {}
    seed: int | None = None
    study: str | None = None
    row: str | None = None


class Weights(Part):
    file: str
    sha256: str | None


# Evaluations


def check_percent(name: str, percent: float, images: int) -> None:
    """Refuse an accuracy that is not a whole number of images, such as a fraction in place of a percentage."""
    right = percent / 100 * images
    if abs(right - round(right)) > 0.001:
        raise ValueError(f"{name} is {percent}, which is not a percentage of {images} images")


class Top(Part):
    top1: Percent
    top5: Percent
    images: Positive

    @model_validator(mode="after")
    def _is_consistent(self) -> "Top":
        if self.top1 > self.top5:
            raise ValueError(f"top1 is {self.top1} and top5 is {self.top5}: top1 cannot be larger")
        check_percent("top1", self.top1, self.images)
        check_percent("top5", self.top5, self.images)
        return self


class TrainedFor(Part):
    epochs: Positive
    seed: int


class Evaluation(Provenance):
    model: str
    checkpoint: Weights | None
    data: Data


class Classification(Evaluation):
    kind: Literal["classification"]
    checkpoint: Weights
    training: TrainedFor | None
    settings: Settings
    metrics: Top


def in_percent(metrics: dict[str, float]) -> dict[str, float]:
    if 0 < metrics.get("aAcc", 0) <= 1:
        raise ValueError(f"aAcc is {metrics['aAcc']}: the metrics are percentages, and these seem to be fractions")
    return metrics


class Detection(Evaluation):
    kind: Literal["detection"]
    settings: dict[str, Any]
    """Those of the config on which the figures depend, see :func:`metaformer.mm.config.settings_of_test`."""
    metrics: dict[str, Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]]
    """Fractions; mmdet writes -1 where there are no objects of a size."""


class Segmentation(Evaluation):
    kind: Literal["segmentation"]
    settings: dict[str, Any]
    metrics: Annotated[dict[str, Percent], AfterValidator(in_percent)]


# Training


class Epoch(Part):
    epoch: Positive | None = None
    top1: Percent


class Epochs(Part):
    done: Count
    planned: Positive


class Training(Part):
    kind: Literal["training"]
    status: Literal["running", "stopped", "finished", "failed", "diverged"] = "finished"
    error: str | None = None
    model: str
    data: Data
    devices: Positive
    images_per_s: Amount | None
    wall_s: Amount | None = None
    seed: int | None
    starts: Annotated[list[Provenance], Field(min_length=1)]
    settings: Settings
    epochs: Epochs | None = None
    curve: list[Epoch] = Field(default_factory=list)
    skipped: dict[str, Count] = Field(default_factory=dict)
    """Number of unreadable pictures left out of each split."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "Training":
        study = self.settings.study is not None
        if self.status == "failed" or (self.status == "diverged" and not study):
            raise ValueError(f"the run {self.status}: {self.error}")
        if study and self.status not in ("finished", "diverged"):
            raise ValueError(f"a run of a study must be done, and this one is {self.status}")
        if study and self.seed is None:
            raise ValueError("a run of a study must have a seed")
        if self.status != "diverged" and (self.images_per_s is None or (study and not self.curve)):
            raise ValueError("the run has not finished an epoch")
        if self.settings.seed not in (None, self.seed):
            raise ValueError(f"seed is {self.seed}, but settings.seed is {self.settings.seed}")
        numbers = [epoch.epoch or i for i, epoch in enumerate(self.curve, start=1)]
        last = self.epochs.done if self.epochs else len(numbers)
        if numbers and numbers != list(range(1, last + 1)):
            raise ValueError(f"the curve does not have the epochs 1 to {last}")
        if self.status == "finished" and self.epochs and self.epochs.done != self.epochs.planned:
            raise ValueError(f"the run is finished, but only after {self.epochs.done} of {self.epochs.planned} epochs")
        for epoch in self.curve if self.data.val_images and not self.skipped.get("validation") else []:
            check_percent("top1 in the curve", epoch.top1, self.data.val_images)
        return self

    @property
    def date(self) -> str:
        return self.starts[-1].date

    @property
    def hardware(self) -> Hardware:
        return self.starts[-1].hardware


# Speed of models and of the loader


class BenchmarkSettings(Part):
    rounds: Positive
    seed: int


class Floor(Part):
    """Work of a batch and the least time that it takes."""

    macs: Positive
    bytes: Positive
    seconds: Amount


class Entry(Part):
    form: str
    runtime: str
    memory_format: str


class Absent(Entry):
    reason: str


class Contestant(Entry):
    seconds: Annotated[list[Amount], Field(min_length=1)]
    """Duration of a call on the batch in each round."""
    saved_bytes_per_image: Amount | None
    peak_bytes: Positive | None
    """On a GPU, the memory that a call allocates; on a CPU, the resident memory that model and calls add."""


def took_turns(contestants: list[Contestant]) -> list[Contestant]:
    if len({len(contestant.seconds) for contestant in contestants}) > 1:
        raise ValueError("the contestants do not have equally many rounds")
    entries = {(contestant.form, contestant.runtime, contestant.memory_format) for contestant in contestants}
    if len(entries) < len(contestants):
        raise ValueError("a contestant occurs twice")
    return contestants


class Cell(Part):
    """Contestants that took turns at one task on one batch."""

    task: Literal["inference", "training"]
    model: str
    batch: Positive
    size: tuple[Positive, Positive]
    precision: str
    device: Literal["cpu", "cuda"]
    rates: dict[Literal["macs_per_s", "bytes_per_s"], Amount]
    """Rates of large matrix products and copies on the machine."""
    floor: Floor
    contestants: Annotated[list[Contestant], AfterValidator(took_turns)]
    absent: list[Absent] = Field(default_factory=list)


class Benchmark(Provenance):
    kind: Literal["benchmark"]
    settings: BenchmarkSettings
    cells: Annotated[list[Cell], Field(min_length=1)]

    def device(self, cell: Cell) -> str:
        return self.hardware.device if cell.device == "cuda" else self.hardware.processor


class Spread(Part):
    median: Amount
    min: Amount
    max: Amount


class Decoder(Part):
    decode_images_per_s: Spread
    loader_images_per_s_per_worker: Spread
    loader_relative_to_pillow: Spread | None = None


class Pictures(Data):
    mean_width: Amount
    mean_height: Amount
    mean_bytes: Amount  # of the encoded file


class Loading(Provenance):
    kind: Literal["loader"]
    data: Pictures
    workers: Positive
    rounds: Positive
    decoders: Annotated[dict[str, Decoder], Field(min_length=1)]
    split_ms: dict[str, Spread] | None = None
    """Milliseconds of a picture in each stage of the loader, in one process."""
    settings: Settings


# Campaigns of faults


class Fault(Part):
    fault: str
    tried: Count
    survived: Count
    lost: Count
    seeds: list[int]
    """Seeds of the lost ones."""

    @model_validator(mode="after")
    def _adds_up(self) -> "Fault":
        if self.survived + self.lost != self.tried or len(self.seeds) != self.lost:
            raise ValueError("survived and lost do not add up to tried")
        return self


class Faults(Provenance):
    kind: Literal["faults"]
    model: str
    rounds: Positive
    seed: Count
    faults: Annotated[list[Fault], Field(min_length=1)]


# Parity with the official code


class Clone(Part):
    commit: str | None
    uncommitted_changes: bool

    def __str__(self) -> str:
        return f"commit {self.commit or 'unknown'}{' with local changes' if self.uncommitted_changes else ''}"


class Compared(Part):
    part: str
    what: str
    difference: Annotated[float, Field(ge=0)]
    tolerance: Annotated[float, Field(ge=0)]
    """Largest difference that counts as equal."""


class Trajectory(Part):
    dtype: str
    precision: str
    drop_path: float
    losses: Annotated[list[float], Field(min_length=1)]
    weights: list[float]
    """Largest relative difference of a tensor after each step; ``losses`` has the relative difference of the loss."""


class Departure(Part):
    what: str
    reason: str
    effect: str


class Parity(Provenance):
    kind: Literal["parity"]
    official: Clone
    compared: Annotated[list[Compared], Field(min_length=1)]
    trajectories: list[Trajectory]
    departures: list[Departure]


Record = Classification | Detection | Segmentation | Training | Benchmark | Loading | Faults | Parity
SCHEMA = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def read_record(path: Path) -> Record:
    """Read and check a record.

    Raises:
        InputError: the file is missing or not JSON, or a field is missing or wrong. The message names file and field.
    """
    return parse(load(path), path)


def without_machine_paths(value: Any) -> Any:
    """A copy of a record in which every absolute path is cut to its last part."""
    if isinstance(value, dict):
        return {key: without_machine_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_machine_paths(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(?<![\w.:/-])~?/[^\s'\",:;=]*[^\s'\",:;=/]/?", lambda m: Path(m[0]).name, value)
    return value


def load(path: Path) -> dict[str, Any]:
    """The content of a record, with all absolute paths cut to their last part."""
    try:
        return without_machine_paths(read_json(path))
    except RecursionError as error:
        raise InputError(f"cannot read {path}: it is nested too deeply") from error


def parse(record: Any, path: Path) -> Record:
    try:
        return SCHEMA.validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        # The first part of a location is the kind, which the discriminated union adds.
        place = ".".join(str(part) for part in first["loc"][1:]) or "kind"
        raise InputError(f"{path} is not a result record: {place}: {first['msg']}") from error
