#!/usr/bin/env bash
# A run on a slice of TPU VMs, from the folder of this checkout:
#
#   export NAME=sae-a ZONE=us-east5-a TYPE=v5p-32 RUNTIME=v2-alpha-tpuv5
#   launch/tpu/slice.sh create           asks for the slice, waits for it
#   launch/tpu/slice.sh install          this commit and its Python, on all hosts
#   launch/tpu/slice.sh run ARGS...      launch/train.py ARGS on all hosts
#   launch/tpu/slice.sh keep ARGS...     all of these, again after preemptions,
#                                        until the run is done
#   launch/tpu/slice.sh delete           gives the slice back
#
# Variables: NAME of the slice and its queued resource; ZONE; TYPE and RUNTIME
# as `gcloud compute tpus accelerator-types list` and `versions list` name them.
# SPOT=1 for a spot slice. SETUP: a command for every host, which mounts the file
# system of stores and runs: --workdir must be on one that all hosts share.
# LIBTPU_INIT_ARGS: docs/clusters.md. RESTARTS: how often `keep` begins again
# (100), PAUSE: seconds before it does (30). gcloud must be set to your project.
#
# `run` and `keep` end with 0 (done), 2 (a mistake: the line above says which), 1
# (a bug), `run` also with 75 (the same command goes on).
set -euo pipefail

: "${NAME:?name the slice}" "${ZONE:?the zone of the slice}"
MARK='slice.sh: exit code'

queue() { gcloud compute tpus queued-resources "$@" --zone="$ZONE"; }
vm() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE" --worker=all; }
# The state of the queued resource, empty where there is none.
state() {
  queue describe "$NAME" --format='value(state.state)' 2>/dev/null || true
}

create() {
  : "${TYPE:?for example v5p-32}" "${RUNTIME:?for example v2-alpha-tpuv5}"
  local now
  case "$(state)" in
    FAILED | SUSPENDING | SUSPENDED) delete ;; # preempted: it will not return
  esac
  if [ -z "$(state)" ]; then
    queue create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
      --runtime-version="$RUNTIME" ${SPOT:+--spot} || return 1
  fi
  while now=$(state) && [ "$now" != ACTIVE ]; do
    case "$now" in
      '' | FAILED | SUSPENDED) echo "slice.sh: $NAME is ${now:-gone}" >&2 && return 1 ;;
    esac
    sleep "${PAUSE:-30}"
  done
}

install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  git archive --format=tar.gz --output="$archive" HEAD || return 1
  vm scp "$archive" "$NAME:sae_jax.tar.gz" || return 1
  rm "$archive"
  # The images' own Python is older than 3.11.
  vm ssh "$NAME" --command="${SETUP:-true} && mkdir -p sae_jax &&
    tar xzf sae_jax.tar.gz -C sae_jax && cd sae_jax &&
    python3 -m pip install --quiet --user uv &&
    python3 -m uv venv --quiet --allow-existing --python 3.12 .venv &&
    python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu]'"
}

run() {
  local log codes lost=75
  log=$(mktemp)
  # flock: what a lost connection left there has to end first.
  vm ssh "$NAME" --command="cd sae_jax &&
    export LIBTPU_INIT_ARGS=$(printf %q "${LIBTPU_INIT_ARGS:-}")
    flock /tmp/sae_jax.lock .venv/bin/python launch/train.py \
      --coordinator=auto$(printf ' %q' "$@")
    echo $MARK \$?" 2>&1 | tee "$log" && lost=''
  codes=$(sed -n "s/.*$MARK //p" "$log" | sort -n)
  rm "$log"
  # A mistake or a bug of one host outweighs what the others ended with.
  if grep -qx 2 <<<"$codes"; then return 2; fi
  if grep -qx 1 <<<"$codes"; then return 1; fi
  codes=${lost:-$(tail -1 <<<"$codes")}
  [ "$codes" = 0 ] || return 75
}

keep() {
  local rc i installed=
  for i in $(seq 0 "${RESTARTS:-100}"); do
    [ "$i" = 0 ] || { echo "slice.sh: restart $i" && sleep "${PAUSE:-30}"; }
    if [ "$(state)" != ACTIVE ] || [ -z "$installed" ]; then
      create || continue
      install || continue
      installed=yes
    fi
    rc=0
    run "$@" || rc=$?
    if [ $rc -le 2 ]; then return $rc; fi
  done
  echo "slice.sh: given up after ${RESTARTS:-100} restarts" >&2
  return 75
}

delete() { queue delete "$NAME" --force --quiet; }

case "${1:-}" in
  create | install | run | keep | delete) "$@" ;;
  *) sed -n '2,24s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
