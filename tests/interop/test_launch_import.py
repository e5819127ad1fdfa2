"""launch/import_store.py as users run it: what it makes trains and is
evaluated on its held-out rows; bad flags end with one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cached_sources import HOOK, SITE, write_npy, write_saelens

from sae_jax.evaluate import job
from sae_jax.store.manifest import read_manifest

ROOT = Path(__file__).parents[2]
D, T = 16, 32


def launch(program, *flags):
  return subprocess.run(
    [sys.executable, f'launch/{program}.py', *map(str, flags)],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )


def planted(rows):
  """Rows [rows, D]: sums of a few of 24 directions."""
  rng = np.random.default_rng(0)
  directions = rng.normal(size=(24, D))
  f = rng.uniform(0.5, 1.5, (rows, 24)) * (rng.random((rows, 24)) < 1 / 12)
  return (f @ directions + 0.3).astype(np.float32)


@pytest.mark.slow
def test_an_imported_store_trains_and_is_evaluated(tmp_path):
  rows = planted(128 * T).reshape(128, T, D)
  tokens = np.random.default_rng(1).integers(3, 50, (128, T))
  tokens[:, 0] = 0
  write_saelens(tmp_path / 'cache', {HOOK: rows}, tokens)
  store, run = tmp_path / 'store', tmp_path / 'run'
  done = launch(
    'import_store', '--from=saelens', f'--source={tmp_path}/cache',
    f'--store={store}', f'--site={SITE}', '--rows_per_shard=256',
    '--rows_per_block=16', '--held_out_shards=2', '--skip_tokens=0',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert f'{128 * (T - 1):,} rows of {SITE}' in done.stdout
  values = {
    'store.path': store, 'store.site': SITE, 'sae.d_in': D, 'sae.latents': 64,
    'train.rows': 400 * 64, 'train.batch_rows': 64, 'train.log_rows': 6400,
    'train.save_rows': 6400, 'train.eval_rows': 6400, 'train.eval_size': 256,
    'loss.dead_rows': 512, 'loss.aux_k': 8, 'act.k': 4,
  }  # fmt: skip
  done = launch(
    'train', f'--workdir={run}', '--config=configs/topk.py:demo',
    *(f'--config.{key}={value}' for key, value in values.items()),
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  result = job.evaluate(run, language_model=False)
  assert result['rows'] == 2 * 256 and result['figures']['fvu'] < 0.5
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  held_out = [r['eval/fvu'] for r in map(json.loads, lines) if 'eval/fvu' in r]
  assert held_out[-1] < 0.5 * held_out[0]
  policy = read_manifest(store).policy
  assert policy['tokens_without_rows'] == [0]


def test_bad_flags_end_with_one_line(tmp_path):
  write_npy(tmp_path / 'a', np.zeros((64, 4), np.float32), np.arange(64))
  base = [f'--source={tmp_path}/a', f'--store={tmp_path}/s']
  for flags, wanted in (
    (['--from=numpy', '--site=x'], "'npy'"),
    (['--from=npy'], '--site=NAME'),
    (['--from=npy', '--sites=x'], 'HOOK=NAME'),
    (['--from=npy', '--site=a/b'], 'a name is'),
    (['--from=npy', '--site=x', '--skip_tokens=bos'], 'give ids'),
    (['--from=llamascopium', '--site=x', '--sequence_length=4'], 'only for'),
    (['--from=npy', '--site=x', '--source_dtype=float16'], 'bfloat16'),
    (['--from=npy', '--site=x', '--dtype=int7'], "did you mean 'int8'"),
    (['--from=npy', '--site=x'], '64 rows'),
  ):
    done = launch('import_store', *flags, *base)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith('error: '), lines
    assert wanted in lines[0], lines
  assert not (tmp_path / 's').exists()
