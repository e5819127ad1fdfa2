"""What int8 and bfloat16 rows cost, on SmolLM2's activations.

Harvests float32 rows once, stores the same rows in three types, compares them
directly, and trains the TopK demo on each; FVU is of the float32 held-out rows.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from absl import flags

import sae_jax
from sae_jax import cli
from sae_jax.models.sae import SAE
from sae_jax.store import reader
from sae_jax.store.create import write_arrays

ROOT = Path(__file__).resolve().parents[1]
SITE = 'layer_9.resid_post'
DTYPES = ('float32', 'bfloat16', 'int8')
_ROWS = flags.DEFINE_integer('rows', 200_000, 'Rows to harvest.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Trainings of each type.')
_TRAIN_ROWS = flags.DEFINE_integer('train_rows', 300_000, 'Rows of each.')
_DIR = flags.DEFINE_string(
  'dir', '', 'Where to work; a temporary folder if empty.'
)


def main() -> None:
  with tempfile.TemporaryDirectory(dir=_DIR.value or None) as folder:
    root = Path(folder)
    rows = harvested(root / 'harvest')
    stores = {dtype: stored(root / dtype, rows, dtype) for dtype in DTYPES}
    blocks = [x for x, _ in reader.held_out(stores['float32'], SITE)]
    exact = np.concatenate(blocks)
    centred = np.square(exact - exact.mean(0)).sum()
    for dtype in DTYPES:
      x = np.concatenate([x for x, _ in reader.held_out(stores[dtype], SITE)])
      error = np.square(x.astype(np.float32) - exact).sum() / centred
      found = [
        fvu(trained(root, stores[dtype], dtype, seed), exact)
        for seed in range(_SEEDS.value)
      ]
      print(json.dumps({
        'dtype': dtype, 'bytes_per_row': bytes_per_row(stores[dtype]),
        'storage_fvu': float(error), 'sae_fvu': found,
        'sae_fvu_mean': statistics.mean(found),
      }), flush=True)  # fmt: skip


def launch(program: str, *arguments: str) -> None:
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  command = [sys.executable, f'launch/{program}', *arguments]
  subprocess.run(command, cwd=ROOT, env=environment, check=True)


def harvested(store: Path) -> np.ndarray:
  """Rows [N, 576] float32, shuffled within shards, as harvested."""
  launch(
    'harvest.py', '--config=configs/harvest.py:smollm2',
    f'--config.store.path={store}', '--config.store.dtype=float32',
    '--config.harvest.compute_dtype=float32',
    f'--config.harvest.rows={_ROWS.value}',
  )  # fmt: skip
  shards = range(-(-_ROWS.value // 2**16))
  return np.concatenate(
    [x for x, _ in reader.shard_blocks(store, SITE, shards)]
  )


def stored(root: Path, rows: np.ndarray, dtype: str) -> Path:
  """A store of the rows in one type; the first shard of 2^15 is held out."""
  if dtype == 'bfloat16':
    rows = rows.astype(ml_dtypes.bfloat16)
  write_arrays(
    root, {SITE: rows}, rows_per_shard=2**15, rows_per_block=256, dtype=dtype
  )
  return root


def bytes_per_row(store: Path) -> float:
  sizes = [
    path.stat().st_size
    for part in ('sites', 'scales')
    for path in (store / part).rglob('*.bin')
  ]
  return sum(sizes) / _ROWS.value


def trained(root: Path, store: Path, dtype: str, seed: int) -> SAE:
  """The TopK demo on a store."""
  run = root / f'run-{dtype}-{seed}'
  launch(
    'train.py', '--config=configs/topk.py:demo', f'--workdir={run}',
    f'--config.store.path={store}', f'--config.seed={seed}',
    f'--config.train.rows={_TRAIN_ROWS.value}', '--config.train.eval_rows=0',
  )  # fmt: skip
  return sae_jax.load(run)


def fvu(sae: SAE, rows: np.ndarray) -> float:
  """Fraction of the variance of rows that the SAE leaves unexplained."""
  run = jax.jit(lambda x: sae.decode(sae.encode(x)))
  error = sum(
    float(np.square(np.asarray(run(x)) - x).sum())
    for x in np.array_split(rows, max(len(rows) // 2048, 1))
  )
  return error / float(np.square(rows - rows.mean(0)).sum())


if __name__ == '__main__':
  cli.run(main)
