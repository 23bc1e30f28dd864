"""Copies the records of runs to analysis/results/, from which the tables are made."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from metaformer.errors import InputError
from metaformer.provenance import write_json
from metaformer.records.schema import Record, Training, load, parse

RESULTS = Path(__file__).resolve().parents[2] / "analysis" / "results"
NAMES = ("run.json", "validation.json", "result.json", "training.json")


def sources(path: Path) -> list[Path]:
    """The record files at ``path``: the file itself, or those in a run folder, study folder or work dir."""
    if path.is_file():
        return [path]
    found = [file for name in NAMES for file in sorted(path.glob(name)) + sorted(path.glob(f"*/{name}"))]
    if (path / "recipe.yaml").is_file():  # a study's, where other runs may still be under way
        found = [file for file in found if load(file).get("status") in ("finished", "diverged")]
    if not found:
        raise InputError(f"there are no records in {path}: give a record file, a run folder or a work dir with a test")
    return found


def import_records(
    paths: list[Path], results: Path = RESULTS, check: Callable[[Record, Path], None] = lambda record, path: None
) -> list[Path]:
    """Check all records at ``paths``, then copy all of them to ``results``; returns the copies.

    Args:
        check: further check of a record and its path, which raises an ``InputError``.
    """
    checked = {}
    for path in (file for given in paths for file in sources(given)):
        record = load(path)
        parsed = parse(record, path)
        check(parsed, path)
        if isinstance(parsed, Training) and parsed.settings.study:
            # Named after row and seed, so that a run cannot be counted twice.
            target = results / parsed.settings.study / f"{parsed.settings.row}-{parsed.seed}.json"
            earlier = checked.get(target) or (load(target) if target.is_file() else record)
            if parse(earlier, target).starts[0].date != parsed.starts[0].date:
                raise InputError(f"{path} and {target} are different runs of this row and seed: remove one of them")
            checked[target] = record
            continue
        # The digest distinguishes records of the same second.
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:6]
        time = re.sub("[^0-9T]", "", parsed.date[:19])
        parts = [parsed.kind, getattr(parsed, "model", ""), time, digest]  # benchmarks have one for each cell
        name = re.sub(r"[^\w.-]", "-", "-".join(filter(None, parts)) + ".json")
        checked[results / name] = record
    for target, record in checked.items():
        write_json(target, record)
    return list(checked)
