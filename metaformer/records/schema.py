"""Fields of result records that the tables read or that tell where a result comes from, with their types and ranges."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator

from metaformer.errors import InputError
from metaformer.provenance import read_json
from metaformer.training.config import Count, Positive

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
    train_sha256: str | None = None
    val_sha256: str | None = None


class Settings(Part):
    img_size: Positive | None = None
    model_args: dict[str, Any] = {}
    study: str | None = None
    row: str | None = None


class Weights(Part):
    file: str
    sha256: str | None


# Evaluations


class TrainedFor(Part):
    epochs: Positive


class Evaluation(Provenance):
    kind: Literal["classification", "detection", "segmentation"]
    model: str
    checkpoint: Weights | None
    training: TrainedFor | None = None
    """Settings of the run that trained the weights, if they are known."""
    data: Data
    settings: Settings
    """Of a toolbox, those of the config on which the figures depend, see
    :func:`metaformer.mm.config.settings_of_test`."""
    metrics: dict[str, FiniteFloat]
    """Accuracies in percent; those of mmdet are fractions, and -1 where there are no objects of a size."""


# Training


class Epoch(Part):
    top1: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


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
    curve: list[Epoch] = Field(default_factory=list)
    skipped: dict[str, Count] = Field(default_factory=dict)
    """Number of unreadable pictures left out of each split."""

    @model_validator(mode="after")
    def _has_a_result(self) -> "Training":
        study = self.settings.study is not None
        if self.status == "failed" or (self.status == "diverged" and not study):
            raise ValueError(f"the run {self.status}: {self.error}")
        if study and self.status not in ("finished", "diverged"):
            raise ValueError(f"a run of a study must be done, and this one is {self.status}")
        if self.status != "diverged" and (self.images_per_s is None or (study and not self.curve)):
            raise ValueError("the run has not finished an epoch")
        return self

    @property
    def date(self) -> str:
        return self.starts[-1].date

    @property
    def hardware(self) -> Hardware:
        return self.starts[-1].hardware


# Speed of models and of the loader


class Floor(Part):
    seconds: Amount
    """Least time that a batch takes."""


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


class Cell(Part):
    """Contestants that took turns at one task on one batch."""

    task: Literal["inference", "training"]
    model: str
    batch: Positive
    size: tuple[Positive, Positive]
    precision: str
    device: Literal["cpu", "cuda"]
    floor: Floor
    contestants: list[Contestant]
    absent: list[Absent] = Field(default_factory=list)


class Benchmark(Provenance):
    kind: Literal["benchmark"]
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


class Faults(Provenance):
    kind: Literal["faults"]
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


Record = Evaluation | Training | Benchmark | Loading | Faults | Parity
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
    return without_machine_paths(read_json(path))


def parse(record: Any, path: Path) -> Record:
    try:
        return SCHEMA.validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        # The first part of a location is the kind, which the discriminated union adds.
        place = ".".join(str(part) for part in first["loc"][1:]) or "kind"
        raise InputError(f"{path} is not a result record: {place}: {first['msg']}") from error
