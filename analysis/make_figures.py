"""The paper's figures from its tables, and training curves."""

from metaformer.analysis.figures import main
from metaformer.errors import run_command

if __name__ == "__main__":
    run_command(main)
