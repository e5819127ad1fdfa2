"""The launcher on the real model: killed, started again, started once more."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sae_jax.store.manifest import read_manifest
from sae_jax.store.verify import problems

pytestmark = [pytest.mark.model, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def start(store):
  return subprocess.Popen(
    [
      sys.executable, 'launch/harvest.py',
      '--config=configs/harvest.py:smollm2',
      f'--config.store.path={store}',
      "--config.harvest.sites=('layer_2.resid_post', 'layer_0.mlp_out')",
      '--config.harvest.rows=5000',
      '--config.harvest.compute_dtype=float32',  # whatever is faster here
      '--config.harvest.batch_sequences=4',
      '--config.store.rows_per_shard=1024',
      '--config.store.dtype=bfloat16',
    ],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip


def contents(root):
  files = {
    path.relative_to(root).as_posix(): path.read_bytes()
    for path in root.rglob('*')
    if path.is_file()
  }
  manifest = json.loads(files.pop('manifest.json'))
  del manifest['made_by']  # a commit may happen during the test
  return files, manifest


def test_killed_and_started_again(tmp_path):
  fetch = [sys.executable, 'scripts/fetch_demo.py']
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  subprocess.run(fetch, cwd=ROOT, env=env, check=True)
  process = start(tmp_path / 'killed')
  record = tmp_path / 'killed' / 'records' / 'shard-00001-of-00005.json'
  while not record.exists():
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.01)
  process.kill()
  process.communicate()
  assert read_manifest(tmp_path / 'killed', complete=False).state == 'writing'
  for store in ('killed', 'whole'):
    error = start(tmp_path / store).communicate()[1]
    assert ('0 there already' in error) == (store == 'whole')
  assert contents(tmp_path / 'killed') == contents(tmp_path / 'whole')
  assert list(problems(tmp_path / 'killed')) == []
  process = start(tmp_path / 'killed')
  assert 'is complete, nothing to do' in process.communicate()[1]
  assert process.returncode == 0
