"""The paper's tables: what is printed, beside what is counted and what was measured here."""

from metaformer.analysis.tables import main
from metaformer.errors import run_command

if __name__ == "__main__":
    run_command(main)
