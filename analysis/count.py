"""Parameters and multiply-accumulates (MACs) of a model, by operator and by part."""

from metaformer.analysis.count import main
from metaformer.errors import run_command

if __name__ == "__main__":
    run_command(main)
