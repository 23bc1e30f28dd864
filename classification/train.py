"""Train an image classifier on all GPUs of this machine, or on its CPU where it has none:

  bash classification/dist_train.sh [CONFIG] [key=value ...]

CONFIG is a YAML file (default: configs/classification/mnist.yaml, a few minutes on a CPU) or the folder of an earlier
run, which then continues. Settings can also be written --key value, and flags --key and --no-key.

Variables of the environment:
  GPUS         processes on this machine (default: its GPUs, or 1); on a CPU, GPUS=2 makes two processes
  NNODES       machines (default 1); on each of them, run the same command with
  NODE_RANK    its number from 0, and
  MASTER_ADDR  the address of machine 0 (default 127.0.0.1)
  PORT         a port that is free there (default 29500; on a single machine any free one)
  RESTARTS     times that the processes start again from the last checkpoint when one of them fails (default 0)
  PYTHON       interpreter (default: the active environment's, else that of .venv in this checkout)

Settings with their defaults:
"""

import sys

from metaformer.errors import run_command
from metaformer.training.config import load_config, settings_help
from metaformer.training.engine import train


def main() -> int:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings_help()}")
        return 0
    return train(load_config(arguments))


if __name__ == "__main__":
    run_command(main)
