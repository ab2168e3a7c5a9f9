#!/usr/bin/env bash
# The papers' LAMBADA tables, 20 runs: bash run_correct_experiments.sh [--dry_run] [flags of quamba sweep]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
if ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("quamba") is None)'; then
  if [ -z "${PYTHON:-}" ] && [ -x "$here/.venv/bin/python" ]; then
    python="$here/.venv/bin/python" # the environment that make has set up
  fi
  export PYTHONPATH="$here/src${PYTHONPATH:+:$PYTHONPATH}" # not installed: run from the source tree
fi
exec "$python" -m quamba sweep "$here/configs/experiments/reproduce.toml" "$@"
