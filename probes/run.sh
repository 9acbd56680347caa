#!/bin/bash
# Everything on one H100, in order of worth, at most 440 s. From the tree's root or anywhere.
cd "$(dirname "$0")/.." || exit 1
PY=${PY:-python3}
export PYTHONUNBUFFERED=1 JAX_ENABLE_COMPILATION_CACHE=0 TF_CPP_MIN_LOG_LEVEL=2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} XLA_PYTHON_CLIENT_PREALLOCATE=false
END=$((SECONDS + 440))
part() { # part SECONDS COMMAND...: not longer than what is left
  left=$((END - SECONDS)); limit=$1; shift
  [ "$limit" -gt "$left" ] && limit=$left
  [ "$limit" -lt 15 ] && { echo "--- no time left for: $*"; return; }
  echo "--- $* (limit $limit s)"
  timeout -k 5 "$limit" "$PY" "$@" 2>&1 | grep -v -E 'PyTorch was not found|^$' | cut -c1-400 | tail -60
  echo "--- rc ${PIPESTATUS[0]} at $SECONDS s"
}
nvidia-smi --query-gpu=name,clocks.sm,clocks.mem --format=csv,noheader
part 45 probes/rows_check.py
part 130 probes/early.py --batch 1 --variants all --budget 115
part 70 probes/mosaic_stream.py --budget 45
ROWS="today all-late-early rows rows-early rows-near-late-early rows-all-early"
part 60 probes/early.py --batch 4 --variants $ROWS --budget 50 --rounds 4
part 60 probes/early.py --batch 8 --variants $ROWS --budget 50 --rounds 4
part 60 probes/early.py --batch 2 --variants $ROWS --budget 50 --rounds 4
part 60 probes/early.py --batch 16 --variants today early all-late-early all-early merge-early --budget 50 --rounds 4
echo "=== done at $SECONDS s"
