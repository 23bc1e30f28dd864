"""Result records of runs, benchmarks, studies, fault campaigns and the toolboxes.

``schema`` defines and checks the fields, ``importing`` copies records to analysis/results/, and ``statistics`` compares
the runs of studies.
"""

from metaformer.records.importing import import_records, without_machine_paths
from metaformer.records.schema import (
    Benchmark,
    Cell,
    Classification,
    Contestant,
    Entry,
    Evaluation,
    Parity,
    Record,
    Spread,
    Training,
    parse,
    read_record,
)
