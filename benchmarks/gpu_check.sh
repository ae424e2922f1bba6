#!/usr/bin/env bash
# Test and measure the GPU backends on this machine in limited time, the most valuable first.
#     bash benchmarks/gpu_check.sh --minutes 4
# --minutes N   time for everything; 9
# --steps ...   steps to run; all
# --rehearse    on an emulator of the GPU, with small networks
# OUT           folder of results.jsonl, the report, plots and logs; ./out
# PYTHON        Python 3.11 or later with torch; by default the first of python3, .venv/bin/python, python
# The exit status is 0 if no step failed. benchmarks/README.md describes each step.
set -u

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
case ${OUT:=out} in /*) ;; *) OUT=$here/$OUT ;; esac
export OUT PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"

usable() {
  "$1" -c 'import importlib.util as u, sys
sys.exit(sys.version_info < (3, 11) or u.find_spec("torch") is None)' 2>/dev/null
}

for python in "${PYTHON:-}" python3 .venv/bin/python python; do
  if [ -n "$python" ] && usable "$python"; then exec "$python" -u -m gpu.runner "$@"; fi
  if [ -n "${PYTHON:-}" ]; then break; fi
done
echo "FAILED: found no Python 3.11 or later with torch (tried ${PYTHON:-python3, .venv/bin/python, python})." >&2
echo "Set one: PYTHON=/path/to/python bash benchmarks/gpu_check.sh" >&2
exit 1
