#!/usr/bin/env bash
# Train on all GPUs of this machine, or on its CPU where it has none:
#
#   bash classification/dist_train.sh [CONFIG] [key=value | --key value | --flag]...
#
# CONFIG is a file (default: configs/classification/mnist.yaml, a few minutes on a CPU) or the folder of an earlier run,
# which then continues. From the environment:
#   GPUS         processes on this machine (default: its GPUs, or 1); on a CPU, GPUS=2 makes two processes
#   NNODES       machines (default 1); on each of them run the same command with
#   NODE_RANK    its number from 0, and
#   MASTER_ADDR  the address of machine 0 (default 127.0.0.1)
#   PORT         a port free there (default 29500; on a single machine any free one)
#   RESTARTS     times that the processes start again from the last checkpoint when one of them fails (default 0)
#   PYTHON       interpreter (default: the active environment's, else that of .venv in this checkout)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/interpreter.sh"
exec "$PYTHON" "$here/launch.py" "$@"
