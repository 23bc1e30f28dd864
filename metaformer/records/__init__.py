"""Result records: what runs, benchmarks, studies, campaigns of faults and the toolboxes measured, checked on reading.

``schema`` has the fields, ``importing`` takes records into analysis/results/, ``statistics`` compares runs of studies.
"""

from metaformer.records.importing import import_records, without_machine_paths
from metaformer.records.schema import *  # noqa: F403

__all__ = [*schema.__all__, "import_records", "without_machine_paths"]  # noqa: F405
