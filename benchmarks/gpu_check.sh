#!/usr/bin/env bash
# Prove and measure the GPU backends on this machine within a time, the most valuable first.
#     bash benchmarks/gpu_check.sh --minutes 4
# --minutes N   for everything; 9
# --steps ...   which steps, where not all
# --rehearse    on an emulator of the GPU, with small networks
# OUT           folder of results.jsonl, the report, pictures and logs; ./out
# PYTHON        Python 3.11 or later with torch; else the first of python3, .venv/bin/python, python
# It ends with 0 if no step failed. benchmarks/README.md says what each step does.
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
echo "FAILED: there is no Python 3.11 or later with torch (tried ${PYTHON:-python3, .venv/bin/python, python})." >&2
echo "Name one: PYTHON=/path/to/python bash benchmarks/gpu_check.sh" >&2
exit 1
