# Sourced by the scripts here: PYTHON is the interpreter (default: the active environment's, else that of .venv in this
# checkout).
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$here/../.venv/bin/python" ]; then
    PYTHON=$here/../.venv/bin/python
  fi
fi
