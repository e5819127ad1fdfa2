#!/usr/bin/env bash
# From nothing to a sparse dictionary of a real language model's activations.
#
# Makes an environment, fetches a small model and public-domain text, harvests
# activations, trains, evaluates, prints a table and the path of a report.
# Options: --minutes=10 (what it fits into, after installation and downloads; 0:
# any), --budget=small (a rehearsal of two minutes), --recipe=jumprelu|topk.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
source "$ROOT/scripts/env.sh"
use_env demo
cd "$ROOT"
# Huge pages make the training step 10-30% faster on Linux; ignored elsewhere.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec "$PYTHON" scripts/quickstart.py "$@"
