#!/usr/bin/env bash
# The first process of a pod: runs a command, hands SIGTERM on to it, and ends
# with its code.
#
#   bash launch/gke/pod.sh COMMAND...
#
# Kubernetes decides by the first pod that it sees fail. When one ends with 1 or
# 2, the others end with 75 or 134 a moment later, and a Job that saw theirs
# first would start the mistake or the bug again: so all other codes wait.
set -uo pipefail
# Until the first pod's code has gone through its kubelet and the Job's
# controller: each looks about once a second; a mistake has 5 s to be said.
SECONDS_LATER=20

"$@" &
process=$!
trap 'kill -TERM $process 2>/dev/null' TERM
wait $process
rc=$?
while kill -0 $process 2>/dev/null; do # a signal has ended the wait
  wait $process
  rc=$?
done
# 143: all pods were told to end, and saved.
case $rc in 0 | 1 | 2 | 143) exit $rc ;; esac
sleep $SECONDS_LATER & # which SIGTERM ends
process=$!
wait $process
exit $rc
