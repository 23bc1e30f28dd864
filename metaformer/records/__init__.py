"""Result records of runs, benchmarks, studies, fault campaigns and the toolboxes.

``schema`` defines and checks the fields; ``importing`` copies records to analysis/results/; ``statistics`` compares the
runs of studies.
"""

from metaformer.records.importing import import_records
from metaformer.records.schema import Benchmark, Loading, Parity, Record, Training, parse, read_record
