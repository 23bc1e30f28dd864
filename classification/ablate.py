"""Train the rows of Table 5 on a small task, several seeds each, as many at once as the hardware holds."""

from metaformer.errors import run_command
from metaformer.training.study import main

if __name__ == "__main__":
    run_command(main)
