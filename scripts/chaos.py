"""Kills a small job of several processes again and again, and compares.

python scripts/chaos.py --kills=20
One run is left alone, another one on the same rows is struck: SIGKILL of any
process (the coordinator too), at a random moment, in the middle of a save or
before a start's first step, SIGTERM, SIGSTOP. After each the whole job is
started again. It fails unless all exit codes are those of docs/faults.md, the
others notice within the heartbeat, and both runs end with the same parameters
and metrics, bit for bit. --seeds=N does so N times.

Faults of files are in tests/train: damaged checkpoints (test_damage.py), bad
shards and rows that are not a number (test_skipping.py, test_processes.py), a
full disk (test_full_disk.py).
"""

import collections
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from sae_jax.parallel.mesh import make_mesh
from sae_jax.store.create import write_arrays
from sae_jax.train import checkpoints
from sae_jax.train import run as runs
from sae_jax.train.state import State, abstract_state

_KILLS = flags.DEFINE_integer('kills', 20, 'Blows that the run survives.', 1)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the moments and the victims.')
_SEEDS = flags.DEFINE_integer('seeds', 1, 'Runs that are struck.', 1)
_PROCESSES = flags.DEFINE_integer('processes', 4, 'Processes of the job.', 2)
_STEPS = flags.DEFINE_integer('steps', 0, 'Steps of a run, 0: by the kills.')
_HEARTBEAT = flags.DEFINE_integer('heartbeat', 10, 'Its seconds.', 1)
_FOLDER = flags.DEFINE_string('folder', None, 'Where; default: temporary.')

ROOT = Path(__file__).resolve().parents[1]
SITE, BATCH, SAVE = 'layer_0.resid_post', 64, 10
DEVICES = 2  # of a process
LIMIT = 300  # seconds a start may take to its next blow, or to its end
# Each as often. 'coordinator' and 'worker' are SIGKILL at a random moment,
# 'save' of any process while a checkpoint is written, 'start' between its
# restore and its first step.
BLOWS = ('worker', 'coordinator', 'save', 'SIGTERM', 'SIGSTOP', 'start')
# Beyond the heartbeat until the others are gone: they share the cores.
SLACK = 15


def main(argv) -> None:
  del argv
  base = Path(_FOLDER.value or tempfile.mkdtemp(prefix='chaos_'))
  rows = np.random.default_rng(0).normal(size=(16 * 256, 16))
  if not (base / 'store').exists():
    write_arrays(
      base / 'store', {SITE: rows.astype(np.float32)}, rows_per_shard=256,
      rows_per_block=16, held_out_shards=2,
    )  # fmt: skip
  steps = _STEPS.value or 15 * _KILLS.value + 40
  alone = base / 'alone'
  began = time.monotonic()
  processes = start(base, alone, steps)
  wait(processes, LIMIT + steps)
  codes = [process.returncode for process in processes]
  check(not any(codes), f'the undisturbed job ended with {codes}', alone)
  print(f'undisturbed: {steps} steps in {time.monotonic() - began:.0f} s')
  for seed in range(_SEED.value, _SEED.value + _SEEDS.value):
    chaos(base, alone, base / f'struck{seed}', steps, random.Random(seed))


def chaos(base: Path, alone: Path, struck: Path, steps: int, rng) -> None:
  """Strikes one run and compares it with the one that was left alone."""
  blows = [BLOWS[i % len(BLOWS)] for i in range(_KILLS.value)]
  rng.shuffle(blows)
  seconds = collections.defaultdict(list)
  done, missed = 0, 0
  for blow in blows:
    processes = start(base, struck, steps)
    after = strike(processes, struck, blow, rng)
    if after is None:  # the job was faster
      break
    done += 1
    codes = [process.returncode for process in processes]
    if blow == 'save' and not open_saves(struck):  # it was over by then
      blow, missed = 'late', missed + 1
    seconds[blow].append(after)
    kept = checkpoints.kept_steps(struck)
    print(f'{done:3d} {blow:12s} others gone after {after:6.2f} s, exit codes '
          f'{codes}, checkpoints {kept}', flush=True)  # fmt: skip
  check(not missed or 'save' in seconds, 'no save was open when struck')
  processes = start(base, struck, steps)
  wait(processes, LIMIT + steps)
  codes = [process.returncode for process in processes]
  check(not any(codes), f'the last start ended with {codes}', struck)
  check(done == len(blows), f'{done} of {len(blows)} blows: raise --steps')
  same(alone, struck)
  for blow, times in sorted(seconds.items()):
    print(f'{blow:12s} {len(times):3d} times: others gone after '
          f'{statistics.median(times):.2f} s (median), '
          f'{max(times):.2f} s (most)')  # fmt: skip
  print(f'{done} blows, {steps} steps: the same bits in all arrays and metrics')


def start(base: Path, run: Path, steps: int) -> list[subprocess.Popen]:
  """The processes of the job, each with its log beside the run's folder."""
  n = _PROCESSES.value
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  values = {
    'store.path': base / 'store', 'store.site': SITE, 'sae.d_in': 16,
    'sae.latents': 64, 'act.k': 4, 'loss.aux_k': 8, 'loss.dead_rows': 512,
    'train.rows': steps * BATCH, 'train.batch_rows': BATCH,
    'train.log_rows': BATCH, 'train.save_rows': SAVE * BATCH,
    'train.eval_rows': 20 * BATCH, 'train.eval_size': 256,
    'mesh.data': 2, 'mesh.dict': n * DEVICES // 2,
    'distributed.heartbeat_seconds': _HEARTBEAT.value,
  }  # fmt: skip
  command = [
    sys.executable, str(ROOT / 'launch' / 'train.py'), f'--workdir={run}',
    f'--config={ROOT}/configs/topk.py:demo', f'--coordinator={address}',
    *(f'--config.{key}={value}' for key, value in values.items()),
    f'--processes={n}',
  ]  # fmt: skip
  cache = {
    'JAX_COMPILATION_CACHE_DIR': str(base / 'compiled'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }
  env = cache | os.environ | {
    'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': str(DEVICES),
    'JAX_PLATFORMS': 'cpu',
  }  # fmt: skip
  processes = []
  for i in range(n):
    with open(base / f'{run.name}.{i}.log', 'ab') as log:
      processes.append(
        subprocess.Popen(
          [*command, f'--process_id={i}'], env=env, stdout=log, stderr=log
        )
      )
  return processes


def strike(processes, run: Path, blow: str, rng) -> float | None:
  """Seconds until the others were gone; None if the job ended before."""
  first, kept = lines(run), checkpoints.kept_steps(run)
  said = restores(run)
  target = first + rng.randint(1, 2 * SAVE)
  deadline = time.monotonic() + LIMIT

  def due() -> bool:
    return bool(open_saves(run)) if blow == 'save' else lines(run) >= target

  moved = lambda: lines(run) > first and checkpoints.kept_steps(run) != kept
  # Each start must get a checkpoint further, or the run would never end.
  begun = lambda: restores(run) > said if kept else (run / 'lock').exists()
  while not (begun() if blow == 'start' else moved() and due()):
    check(time.monotonic() < deadline, f'nothing happened for {LIMIT} s', run)
    if processes[0].poll() is not None:
      wait(processes, LIMIT)
      return None
    time.sleep(0.002)
  time.sleep(rng.uniform(0, {'save': 0.02, 'start': 1.0}.get(blow, 0.1)))
  victim = rng.randrange(1, len(processes))
  if blow == 'coordinator' or (blow != 'worker' and rng.random() < 0.25):
    victim = 0
  name = blow if blow.startswith('SIG') else 'SIGKILL'
  began = time.monotonic()
  processes[victim].send_signal(getattr(signal, name))
  others = [p for i, p in enumerate(processes) if i != victim]
  wait(others, LIMIT)
  after = time.monotonic() - began
  if blow == 'SIGSTOP':
    processes[victim].kill()
  wait(processes, LIMIT)
  codes = [process.returncode for process in processes]
  # JAX's abort prints all threads; one that is importing crashes it (SIGSEGV).
  died = (75, -signal.SIGABRT, -signal.SIGSEGV)
  good = (143,) if blow == 'SIGTERM' else died
  fell = 143 if blow == 'SIGTERM' else -signal.SIGKILL
  check(
    codes[victim] == fell and all(p.returncode in good for p in others),
    f'{blow} of process {victim}: exit codes {codes}', run,
  )  # fmt: skip
  check(after < _HEARTBEAT.value + SLACK, f'gone after {after:.1f} s only', run)
  return after


def open_saves(run: Path) -> list[Path]:
  return list((run / 'checkpoints').glob('*.orbax-checkpoint-tmp'))


def restores(run: Path) -> int:
  """How often process 0 went on from a checkpoint."""
  log = run.parent / f'{run.name}.0.log'
  return log.read_bytes().count(b'going on from step')


def lines(run: Path) -> int:
  log = run / 'metrics.jsonl'
  return log.read_bytes().count(b'\n') if log.exists() else 0


def wait(processes, seconds: float) -> None:
  deadline = time.monotonic() + seconds
  while any(process.poll() is None for process in processes):
    if time.monotonic() > deadline:
      for process in processes:
        process.kill()
      sys.exit(f'FAILED: processes still there after {seconds:.0f} s')
    time.sleep(0.002)


def check(good: bool, words: str, run: Path | None = None) -> None:
  if not good:
    where = f', logs: {run.parent}/{run.name}.*.log' if run else ''
    sys.exit(f'FAILED: {words}{where}')


def same(a: Path, b: Path) -> None:
  """Compares the last checkpoints and all lines of metrics but the timings."""
  values = [
    [
      {k: v for k, v in json.loads(line).items() if not k.startswith('perf/')}
      for line in (run / 'metrics.jsonl').read_text().splitlines()
    ]
    for run in (a, b)
  ]
  check(values[0] == values[1], f'the metrics of {a} and {b} differ')
  step = checkpoints.find_step(a)
  check(checkpoints.find_step(b) == step, 'another last step')
  one, two = (state_of(run, step) for run in (a, b))
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    check(x.tobytes() == y.tobytes(), 'the last checkpoints differ')


def state_of(run: Path, step: int) -> State:
  """The state of a checkpoint, on one device."""
  with jax.set_mesh(make_mesh(1, 1)):
    abstract = abstract_state(runs.read_config(run))
    return checkpoints.restore(run, step, abstract)[0]


if __name__ == '__main__':
  app.run(main)
