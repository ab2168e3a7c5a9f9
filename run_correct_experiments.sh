#!/usr/bin/env bash
# The papers' LAMBADA tables, 20 runs: bash run_correct_experiments.sh [--dry_run] [flags of quamba sweep]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
if ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("quamba") is None)'; then
  export PYTHONPATH="$here/src${PYTHONPATH:+:$PYTHONPATH}" # not installed: run from the source tree
fi
exec "$python" -m quamba sweep "$here/configs/experiments/reproduce.toml" "$@"
