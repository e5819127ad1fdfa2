"""Planted rows, and the training program as users run it."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from absl import flags as absl_flags
from ml_collections import config_flags

ROOT = Path(__file__).parents[2]
D, ATOMS, SITE = 16, 24, 'layer_0.resid_post'


def planted_rows(n, *, d=D, atoms=ATOMS, active=2, seed=0):
  """(rows [n, d], atoms [atoms, d]): sums of a few unit directions."""
  rng = np.random.default_rng(0)
  directions = rng.normal(size=(atoms, d)).astype(np.float32)
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  rng = np.random.default_rng(seed)
  f = rng.uniform(0.5, 1.5, (n, atoms)) * (
    rng.random((n, atoms)) < active / atoms
  )
  rows = f.astype(np.float32) @ directions + 0.3
  return rows + rng.normal(0, 0.01, rows.shape).astype(np.float32), directions


def overrides(store, **more):
  """Flags that shrink a demo config to the planted store."""
  values = {
    'store.path': store,
    'store.site': SITE,
    'sae.d_in': D,
    'sae.latents': 64,
    'train.rows': 40 * 64,
    'train.batch_rows': 64,
    'train.log_rows': 64,
    'train.save_rows': 10 * 64,
    'train.eval_rows': 10 * 64,
    'train.eval_size': 256,
    'loss.dead_rows': 512,
    'loss.aux_k': 8,
    'act.k': 4,
  } | more
  return [f'--config.{key}={value}' for key, value in values.items()]


def command(workdir, config, *flags):
  return [
    sys.executable, str(ROOT / 'launch' / 'train.py'), f'--workdir={workdir}',
    f'--config={ROOT}/configs/{config}', *map(str, flags),
  ]  # fmt: skip


def config_of(config, *flags):
  """The config that launch/train.py makes of these arguments."""
  values = absl_flags.FlagValues()
  found = config_flags.DEFINE_config_file('config', flag_values=values)
  argv = ['train.py', f'--config={ROOT}/configs/{config}', *map(str, flags)]
  with mock.patch.object(sys, 'argv', argv):  # it looks there for overrides
    values(argv)
  return found.value


def run(workdir, config, *flags, devices=8, more=(), **kwargs):
  """Runs launch/train.py to its end; the finished process with its output."""
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_NUM_CPU_DEVICES': str(devices),
  } | dict(more)  # fmt: skip
  return subprocess.run(
    command(workdir, config, *flags),
    env=env,
    capture_output=True,
    text=True,
    timeout=300,
    **kwargs,
  )


def start_job(workdir, config, *flags, processes, devices, each=()):
  """The processes of one job with so many devices each, just started.

  each: (process, flag) pairs for one of them only.
  """
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    job = [f'--coordinator=127.0.0.1:{s.getsockname()[1]}']
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_NUM_CPU_DEVICES': str(devices),
  }
  return [
    subprocess.Popen(
      command(
        workdir, config, *flags, *job, f'--processes={processes}',
        f'--process_id={i}', *(flag for process, flag in each if process == i),
      ),
      env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )
    for i in range(processes)
  ]  # fmt: skip


def start_children(code, *args, devices):
  """Two processes that run `code`, each with so many devices, just started;
  their arguments: a coordinator's address, their number, `args`."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    coordinator = f'localhost:{s.getsockname()[1]}'
  env = os.environ | {
    'PYTHONPATH': f'{ROOT}:{ROOT / "tests" / "train"}',
    'JAX_NUM_CPU_DEVICES': str(devices),
  }
  return [
    subprocess.Popen(
      [sys.executable, '-c', code, coordinator, str(i), *map(str, args)],
      env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for i in range(2)
  ]  # fmt: skip


def end_job(processes, *codes):
  """Waits for a job; what its processes said. They must end with `codes`."""
  said = [process.communicate(timeout=300)[1] for process in processes]
  found = [process.returncode for process in processes]
  assert found == list(codes or [0] * len(found)), '\n'.join(said)
  return said
