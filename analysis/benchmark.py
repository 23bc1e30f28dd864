"""Speed and memory of a model here, of timm's and transformers' classes of it, and what the machine allows at most."""

from metaformer.analysis.benchmark import main
from metaformer.errors import run_command

if __name__ == "__main__":
    run_command(main)
