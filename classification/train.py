"""Train an image classifier. `bash classification/dist_train.sh` starts one such process for each GPU."""

from metaformer.errors import run_command
from metaformer.training.engine import main

if __name__ == "__main__":
    run_command(main)
