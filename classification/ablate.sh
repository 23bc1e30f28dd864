#!/usr/bin/env bash
# Train the rows of Table 5 on a small task; see ablate.py. PYTHON is the interpreter (default: the active
# environment's, else that of .venv in this checkout).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/interpreter.sh"
exec "$PYTHON" "$here/ablate.py" "$@"
