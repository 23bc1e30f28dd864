"""Parts that records of several kinds have in common."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
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
