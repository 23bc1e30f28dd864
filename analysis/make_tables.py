"""Writes the paper's tables, with the printed numbers beside counted and measured ones.

    python analysis/make_tables.py [TABLE...] [--format md,csv,tex] [--check]

The tables go to analysis/tables/ and to the marked sections of the README files; a line is printed for each. table5
also writes its recipes in configs/ablations/.
"""

import argparse
import sys

from tqdm import tqdm

from metaformer.analysis.cells import FORMATS
from metaformer.analysis.measured import Measured
from metaformer.analysis.outputs import TABLES, outputs
from metaformer.analysis.paper import ROOT
from metaformer.errors import check_known, run_command
from metaformer.provenance import write_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"any of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--format", default=",".join(FORMATS), help="formats, with commas (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything would change")
    options = parser.parse_args()
    formats = options.format.split(",")
    for kind, given, known in (("table", options.tables, TABLES), ("format", formats, FORMATS)):
        for name in given:
            check_known(kind, name, known)
    names = options.tables or list(TABLES)
    measured = Measured(ROOT / "analysis/results")
    tables = {name: TABLES[name](measured) for name in tqdm(names, unit="table", disable=None)}
    files = outputs(tables, formats, measured)
    changed = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in [] if options.check else changed:
        write_file(path, files[path].encode())
    for table in tables.values():
        print(table.summary())
    if options.check and changed:
        stale = ", ".join(str(path.relative_to(ROOT)) for path in changed)
        print(f"error: out of date: {stale}; run python analysis/make_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_command(main)
