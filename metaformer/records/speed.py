"""Records of benchmarks and of the loader's speed."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from metaformer.records.parts import Amount, Data, Part, Positive, Provenance, Settings


class BenchmarkSettings(Part):
    rounds: Positive
    seed: int


class Rates(Part):
    """Rates of large matrix products and copies on the machine."""

    macs_per_s: Amount
    bytes_per_s: Amount


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
    """On a GPU, what a call allocates; on a CPU, what model and calls take of a fresh process's resident memory."""


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
    rates: Rates
    floor: Floor
    contestants: Annotated[list[Contestant], AfterValidator(took_turns)]
    absent: list[Absent] = Field(default_factory=list)


class Benchmark(Provenance):
    kind: Literal["benchmark"]
    settings: BenchmarkSettings
    cells: Annotated[list[Cell], Field(min_length=1)]

    @property
    def model(self) -> str:
        """Stands in the name of the record's file."""
        return self.cells[0].model if len({cell.model for cell in self.cells}) == 1 else "models"

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
    workers_needed: Positive | None


class Pictures(Data):
    mean_width: Amount
    mean_height: Amount
    mean_bytes: Amount  # of the encoded file


class Loading(Provenance):
    kind: Literal["loader"]
    model: Literal["jpeg"] = "jpeg"
    """Stands in the name of the record's file where other records have a model."""
    data: Pictures
    workers: Positive
    rounds: Positive
    consume_images_per_s: Amount | None
    decoders: Annotated[dict[str, Decoder], Field(min_length=1)]
    split_ms: dict[str, Spread] | None = None
    """Milliseconds of a picture in each stage of the loader, in one process."""
    settings: Settings
