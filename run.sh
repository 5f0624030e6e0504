#!/usr/bin/env bash
# Picks the Python of the run and hands over to chitu_core/launch.py, which reads system_config.yaml.
# Usage: bash run.sh [config.yaml] [--num-nodes N] [--gpus-per-node N] [--cfp 1|2|auto] [-h]
set -eu
project="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
candidates=("$project/.venv/bin/python" python python3)
if [ -n "${CHITU_PYTHON_BIN:-}" ]; then candidates=("$CHITU_PYTHON_BIN"); fi
for candidate in "${candidates[@]}"; do
    if chosen="$(command -v "$candidate")"; then
        export CHITU_PYTHON_BIN="$chosen" PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}"
        exec "$chosen" -m chitu_core.launch "$@"
    fi
done
echo "Error: no Python among: ${candidates[*]}; install one, or set CHITU_PYTHON_BIN" >&2
exit 1
