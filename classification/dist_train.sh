#!/usr/bin/env bash
# Train on all GPUs of this machine, or on its CPU where it has none; --help explains arguments and settings.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/interpreter.sh"
exec "$PYTHON" "$here/launch.py" "$@"
