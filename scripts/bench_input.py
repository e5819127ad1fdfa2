"""How long a training run waits for its input, on a store on the disk.

python scripts/bench_input.py --dir=. --rows=204800 --steps=30
Trains TopK (F = 4096) on a store of random rows, as float32 and as bfloat16,
through the training program; medians over the logged steps, a line of JSON
for each. `--cold` has the system forget the store's pages before each run.
"""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from absl import flags

from sae_jax import cli
from sae_jax.store.create import write_arrays
from sae_jax.train import loop

ROOT = Path(__file__).resolve().parents[1]
SITE, BLOCK, SHARD = 'layer_0.resid_post', 256, 1 << 15
_WIDTH = flags.DEFINE_integer('width', 768, 'Numbers in a row.', 1)
_ROWS = flags.DEFINE_integer('rows', 204_800, 'Rows of the store.', SHARD)
_LATENTS = flags.DEFINE_integer('latents', 4096, 'F.', 32)
_BATCH = flags.DEFINE_integer('batch', 4096, 'Rows of a step.', BLOCK)
_STEPS = flags.DEFINE_integer('steps', 30, 'Of each run.', 4)
_COLD = flags.DEFINE_bool('cold', False, 'Read from the disk, not its cache.')
_DIR = flags.DEFINE_string('dir', '.', 'On the disk to be measured.')


def main() -> None:
  with tempfile.TemporaryDirectory(dir=_DIR.value, prefix='bench_') as folder:
    for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
      root = Path(folder) / dtype.name
      write(root, dtype)
      if _COLD.value:
        forget(root)
      lines = trained(root, Path(folder) / f'run-{dtype.name}')
      print(json.dumps(report(lines, dtype)), flush=True)


def write(root: Path, dtype: np.dtype) -> None:
  """The store: normal rows; there is nothing to learn in them."""
  rng = np.random.default_rng(0)
  rows = np.empty((_ROWS.value, _WIDTH.value), dtype)
  for at in range(0, len(rows), SHARD):
    part = rows[at : at + SHARD]
    part[:] = rng.standard_normal(part.shape, np.float32)
  write_arrays(root, {SITE: rows}, rows_per_shard=SHARD, rows_per_block=BLOCK)


def forget(root: Path) -> None:
  os.sync()
  for path in root.rglob('*.bin'):
    with open(path, 'rb') as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def trained(root: Path, workdir: Path) -> list[dict]:
  """The lines of metrics.jsonl of a run that logs every step."""
  sys.path.insert(0, str(ROOT / 'configs'))
  import topk  # type: ignore[import]

  c = topk.get_config('demo')
  c.store.path, c.store.site, c.sae.d_in = str(root), SITE, _WIDTH.value
  c.sae.latents, c.train.batch_rows = _LATENTS.value, _BATCH.value
  c.train.rows = _STEPS.value * _BATCH.value
  c.train.log_rows, c.train.eval_rows = _BATCH.value, 0
  c.train.save_rows, c.loss.dead_rows = c.train.rows, 1 << 30
  loop.train(c, str(workdir))
  return [
    json.loads(line)
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]


def report(lines: list[dict], dtype: np.dtype) -> dict:
  """Medians and the worst, and the share of all logged time."""
  took = [line['perf/step_ms'] for line in lines if 'perf/step_ms' in line]
  waits = [line['perf/wait_ms'] for line in lines if 'perf/wait_ms' in line]
  return {
    'rows': dtype.name, 'width': _WIDTH.value, 'latents': _LATENTS.value,
    'batch': _BATCH.value, 'steps': len(took), 'cold': _COLD.value,
    'step_ms': round(statistics.median(took), 1),
    'wait_ms': round(statistics.median(waits), 3),
    'wait_ms_max': round(max(waits), 2),
    'wait_share': round(sum(waits) / sum(took), 5),
    'device': jax.devices()[0].device_kind,
    'load': round(os.getloadavg()[0], 1),
  }  # fmt: skip


if __name__ == '__main__':
  cli.run(main)
