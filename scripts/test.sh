#!/usr/bin/env bash
# Makes the environment, installs the test extra, runs the whole test suite.
# Arguments go to pytest: scripts/test.sh -m 'not slow' -k select
# TEST_WORKERS=N (default 2) processes take the files of tests in turn: much of
# the suite waits for processes that it started. 0: all in one.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
source "$ROOT/scripts/env.sh"
use_env "${SAE_JAX_EXTRA:-test}"
cd "$ROOT"
workers=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
  workers=(-n "${TEST_WORKERS:-2}" --dist loadfile)
fi
exec "$PYTHON" -m pytest "${workers[@]}" "$@"
