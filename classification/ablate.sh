#!/usr/bin/env bash
# Train the rows of Table 5 on a small task; see ablate.py. PYTHON is the interpreter (default: the active
# environment's, else that of .venv in this checkout).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$here/../.venv/bin/python" ]; then
    PYTHON=$here/../.venv/bin/python
  fi
fi
exec "$PYTHON" "$here/ablate.py" "$@"
