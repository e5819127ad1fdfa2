"""Tiny studies, as files and as objects."""

import os
import subprocess
import sys
from pathlib import Path

from train_runs import SITE, D

from sae_jax.sweep import grid
from sae_jax.sweep.machine import Machine
from sae_jax.train.config import base_config

ROOT = Path(__file__).parents[2]
MACHINE = Machine('cpu', 8, 8 * 2**30)


def base(store, **changes):
  """TopK, 20 steps of 64 rows."""
  c = base_config()
  c.store.path, c.store.site, c.store.seed = str(store), SITE, 0
  c.sae.d_in, c.sae.latents = D, 32
  c.act.name, c.act.k, c.loss.aux_k = 'topk', 2, 8
  c.train.rows, c.train.batch_rows = 20 * 64, 64
  c.train.log_rows = c.train.eval_rows = c.train.save_rows = 5 * 64
  c.train.eval_size = 256
  c.loss.dead_rows = 512
  c.optim.lr = 1e-3
  for key, value in changes.items():
    c.update_from_flattened_dict({key: value})
  return c


POINTS = (
  {'sae.latents': 32}, {'sae.latents': 32, 'seed': 1},
  {'sae.latents': 64}, {'sae.latents': 64, 'optim.lr': 3e-3},
)  # fmt: skip


def specs(config, points=POINTS):
  entries = grid.entries(config, points)
  return [grid.resolve(config, e, lambda id: None) for e in entries]


def write_config(path, store, points=POINTS, **changes):
  """A config file of the study `base` with these points."""
  text = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
sys.path.append({str(ROOT / 'tests' / 'train')!r})
from sae_jax.sweep.search import Halving, TargetL0
import studies

def get_config():
  return studies.base({str(store)!r}, **{changes!r})

def sweep():
  yield from {points!r}
"""
  path.write_text(text)
  return path


def command(config, workdir, *flags):
  return [
    sys.executable, str(ROOT / 'launch' / 'sweep.py'), f'--config={config}',
    f'--workdir={workdir}', '--sequences=0', *flags,
  ]  # fmt: skip


def environment(devices=1):
  return os.environ | {
    'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': str(devices)
  }  # fmt: skip


def run(config, workdir, *flags, devices=1):
  """launch/sweep.py to its end; the finished process with its output."""
  return subprocess.run(
    command(config, workdir, *flags), env=environment(devices),
    capture_output=True, text=True, timeout=300,
  )  # fmt: skip
