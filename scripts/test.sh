#!/usr/bin/env bash
# Makes the environment, installs the test extra, runs the whole test suite.
# Arguments go to pytest: scripts/test.sh -m 'not slow' -k select
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
source "$ROOT/scripts/env.sh"
use_env "${SAE_JAX_EXTRA:-test}"
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
