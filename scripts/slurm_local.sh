#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine, to try and test launch/slurm/:
#
#   scripts/slurm_local.sh install     Debian's slurm and munge, by apt
#   scripts/slurm_local.sh start DIR   starts it; DIR holds all its files
#   export SLURM_CONF=DIR/slurm.conf   then sbatch, squeue, scontrol as usual
#   scripts/slurm_local.sh stop DIR    cancels its jobs and ends it
#
# Each command may be repeated. Exit code 1 and one line where it cannot work:
# it needs root (node names go to /etc/hosts, tasks run as any user) and, to
# install, apt. Made for Slurm 22.05 of Debian 12; nothing but loopback is used.
# CPUS=N gives each node N processors (default 2), shared with the machine's.
set -euo pipefail

die() { echo "slurm_local: $*" >&2; exit 1; }
root() { [ "$(id -u)" = 0 ] || die "$1 needs root; you are $(id -un)"; }
PROGRAMS=(slurmctld slurmd munged sbatch scontrol)

present() {
  local p
  for p in "${PROGRAMS[@]}"; do command -v "$p" >/dev/null || return 1; done
}

install_packages() {
  if present; then echo 'slurm_local: slurm is installed'; return; fi
  root install
  command -v apt-get >/dev/null || die 'no apt-get here: install slurm yourself'
  export DEBIAN_FRONTEND=noninteractive
  # RUNLEVEL=1: the packages start no daemons of their own.
  local get=(env RUNLEVEL=1 apt-get -qq install -y --no-install-recommends
    slurmctld slurmd slurm-client munge)
  "${get[@]}" >/dev/null 2>&1 ||
    { apt-get -qq update && "${get[@]}" >/dev/null; } ||
    die 'apt-get could not install slurmctld slurmd slurm-client munge'
  present || die "installed, but of ${PROGRAMS[*]} one is missing"
}

# alive FILE: whether the process of this pid file runs and is a daemon of ours.
alive() {
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] &&
    grep -qaF "$DIR/" "/proc/$pid/cmdline" 2>/dev/null
}

# Three ports in a row that nobody listens on: controller, two nodes.
free_ports() {
  local base port
  for base in $(seq 17000 10 17990); do
    for port in "$base" $((base + 1)) $((base + 2)); do
      (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null && continue 2
    done
    echo "$base" && return
  done
  die 'no free ports between 17000 and 17999'
}

configure() {
  local base=$1 host
  host=$(hostname -s)
  cat >"$DIR/slurm.conf" <<CONF
ClusterName=local$base
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/munge.socket
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool.%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd.%n.log
# No control groups and no tracking of hardware: containers seldom have them.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
# Seconds, not minutes, from a submission or a requeue to the start.
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
FirstJobId=$base
KillWait=30
MinJobAge=86400
NodeName=sae${base}n[0-1] NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + 1))-$((base + 2)) CPUs=${CPUS:-2} State=UNKNOWN
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  # Edited in place: containers mount this file, and cannot have it replaced.
  echo "127.0.0.1 sae${base}n0 sae${base}n1 # $DIR" >>/etc/hosts
}

start() {
  root start
  present || die "slurm is not installed: run $0 install"
  if alive "$DIR/slurmctld.pid"; then
    echo "slurm_local: runs already in $DIR"
    return
  fi
  if [ -e "$DIR/slurm.conf" ]; then stop >/dev/null; fi  # what a crash left
  mkdir -p "$DIR/state"
  chmod 755 "$DIR"
  configure "$(free_ports)"
  export SLURM_CONF=$DIR/slurm.conf
  (umask 077 && head -c 128 /dev/urandom >"$DIR/munge.key")
  # --force: root runs it, and the folder's parents may be open to others.
  munged --force --key-file="$DIR/munge.key" --socket="$DIR/munge.socket" \
    --pid-file="$DIR/munged.pid" --log-file="$DIR/munged.log" \
    --seed-file="$DIR/munged.seed" 2>"$DIR/munged.err" ||
    die "munged did not start: $(tail -1 "$DIR/munged.err")"
  slurmctld -c -f "$SLURM_CONF" || die "see $DIR/slurmctld.log"
  local node
  for node in $(scontrol show hostnames "$(nodes)"); do
    slurmd -f "$SLURM_CONF" -N "$node" || die "see $DIR/slurmd.$node.log"
  done
  local _
  for _ in $(seq 100); do
    [ "$(sinfo -h -o %t -N 2>/dev/null | grep -c idle)" = 2 ] &&
      echo "export SLURM_CONF=$SLURM_CONF" && return
    sleep 0.2
  done
  sinfo -N >&2 || true
  die "the nodes are not there after 20 s: see $DIR/*.log"
}

nodes() { sed -n 's/^NodeName=\([^ ]*\) .*/\1/p' "$DIR/slurm.conf"; }

stop() {
  root stop
  export SLURM_CONF=$DIR/slurm.conf
  local _ file pid
  if alive "$DIR/slurmctld.pid"; then
    timeout 10 scancel --user=root || true
    for _ in $(seq 50); do
      [ -z "$(timeout 10 squeue -h 2>/dev/null)" ] && break
      sleep 0.2
    done
  fi
  # Steps that outlived their job, then the daemons, munged last.
  for pid in $(pgrep -x slurmstepd || true); do
    if grep -qaF "SLURM_CONF=$SLURM_CONF" "/proc/$pid/environ" 2>/dev/null; then
      kill -9 "$pid" 2>/dev/null || true
    fi
  done
  for file in "$DIR"/slurmctld.pid "$DIR"/slurmd.*.pid "$DIR"/munged.pid; do
    alive "$file" || continue
    pid=$(cat "$file")
    kill "$pid"
    for _ in $(seq 50); do alive "$file" || break; sleep 0.1; done
    if alive "$file"; then kill -9 "$pid"; fi
  done
  local hosts
  hosts=$(grep -vF "# $DIR" /etc/hosts || true)
  printf '%s\n' "$hosts" >/etc/hosts
  rm -rf "$DIR"/*.pid "$DIR"/munge.* "$DIR"/state "$DIR"/spool.* \
    "$DIR/slurm.conf"
  echo "slurm_local: stopped"
}

case "${1:-}:$#" in
  install:1) install_packages ;;
  start:2 | stop:2)
    DIR=$(realpath -m "$2")
    case "$DIR" in *[[:space:]\#,%]*) die "$DIR: no blanks, # , or % please" ;; esac
    "$1"
    ;;
  *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
