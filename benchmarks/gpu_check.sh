#!/usr/bin/env bash
# Prove and measure the GPU backends on this machine, in one call and without network.
#
#     bash benchmarks/gpu_check.sh
#
# OUT       where the log, the JSON and the pictures go; ./out
# BUDGET_S  seconds for everything; 560
# STEPS     which steps, with spaces between; all of `python benchmarks/gpu.py --list`
# PYTHON    Python 3.11 or later with torch; else the first of python3, .venv/bin/python, python
# DIGITS    a .biper file or a checkpoint of a network trained on digits, for the step `digits`
#
# It ends with 0 if no step failed. benchmarks/README.md says what each step does.
set -u

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
case ${OUT:=out} in /*) ;; *) OUT=$here/$OUT ;; esac
export OUT

usable() {
  "$1" -c 'import importlib.util as u, sys
sys.exit(sys.version_info < (3, 11) or u.find_spec("torch") is None)' 2>/dev/null
}

for python in "${PYTHON:-}" python3 .venv/bin/python python; do
  if [ -n "$python" ] && usable "$python"; then exec "$python" benchmarks/gpu.py; fi
  if [ -n "${PYTHON:-}" ]; then break; fi
done
echo "FAILED: there is no Python 3.11 or later with torch (tried ${PYTHON:-python3, .venv/bin/python, python})." >&2
echo "Name one: PYTHON=/path/to/python bash benchmarks/gpu_check.sh" >&2
exit 1
