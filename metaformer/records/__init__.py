"""Result records: what runs, benchmarks, studies, campaigns of faults and the toolboxes measured, checked on reading.

``schema`` has their fields, ``importing`` takes them into analysis/results/, ``statistics`` compares the runs of studies.
"""

from metaformer.records.importing import import_records, without_machine_paths
from metaformer.records.schema import (
    Benchmark,
    Classification,
    Contestant,
    Detection,
    Faults,
    Loading,
    Record,
    Segmentation,
    Spread,
    Timed,
    Training,
    parse,
    read_record,
)

__all__ = [
    "Benchmark",
    "Classification",
    "Contestant",
    "Detection",
    "Faults",
    "Loading",
    "Record",
    "Segmentation",
    "Spread",
    "Timed",
    "Training",
    "import_records",
    "parse",
    "read_record",
    "without_machine_paths",
]
