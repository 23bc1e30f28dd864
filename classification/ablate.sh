#!/usr/bin/env bash
# Train the rows of Table 5 on a small task; --help explains the arguments.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/interpreter.sh"
exec "$PYTHON" "$here/ablate.py" "$@"
