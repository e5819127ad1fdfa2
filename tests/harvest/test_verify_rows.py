"""Rows that are not the model's are found; the program's exit codes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import damage
import jax
import pytest
from tiny_harvest import tiny_config
from tiny_stores import SITE, SUBJECT, flipped, found_by, look, made, move

from sae_jax.errors import UserError
from sae_jax.harvest.again import stored_config
from sae_jax.lm.model import init
from sae_jax.store.manifest import read_manifest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_all_rows_are_the_models_to_the_bit(text, tmp_path, dtype):
  root = made(text, tmp_path / 's', dtype=dtype)
  before = damage.contents(root)
  *_, check = look(root)
  assert check.state == 'ok' and check.name == 'model'
  # 300 rows of two sites.
  assert '600 rows of 2 sites in 5 shards: 600 equal' in check.looked_at
  assert 'largest difference 0.0e+00' in check.looked_at
  assert damage.contents(root) == before


def test_some_rows_are_spread_over_shards(whole):
  assert '64 rows of 2 sites in 5 shards: 64' in look(whole, 32)[-1].looked_at
  assert '6 rows of 2 sites in 3 shards: 6' in look(whole, 3)[-1].looked_at
  check = look(whole, 0)[-1]
  assert check.state == 'skipped' and '--rows=0' in check.skipped


def test_a_row_that_is_not_the_models(store):
  damage.alter_rows(store, SITE, 3, move(1e-4))
  assert found_by(store) == {}  # another device may do that
  damage.alter_rows(store, SITE, 3, move(1e-2))
  found = found_by(store)
  assert list(found) == ['model']
  (line,) = found['model']
  assert f'{SITE}/shard-00003' in line and 'row 7 differs by 0.01' in line


def test_a_row_of_another_scale_in_int8(int8, tmp_path):
  def halve(scales):  # a larger number than all could be seen in the statistics
    scales[5] /= 2

  store = damage.copied(int8, tmp_path / 'store')
  part = SITE.replace('sites', 'scales')
  damage.alter_rows(store, part, 4, halve)
  assert list(found_by(store)) == ['model']


def test_rows_of_another_model(store):
  params = init(jax.random.key(1), SUBJECT.cfg)
  other = dataclasses.replace(SUBJECT, params=params)
  found = found_by(store, subject=other)
  assert list(found) == ['model'] and len(found['model']) > 5


def test_a_model_that_is_not_to_be_had_is_skipped(store):
  check = look(store, subject=None)[-1]
  assert check.state == 'skipped' and 'is not here' in check.skipped
  other = dataclasses.replace(SUBJECT, weights_sha256='others')
  check = look(store, subject=other)[-1]
  assert check.state == 'skipped' and 'another model' in check.skipped
  for kwargs in (dict(subject=None), dict(subject=other)):
    with pytest.raises(UserError, match='model_path'):
      look(store, model_path='/no/model.gguf', **kwargs)


def test_a_mesh_that_is_too_large_is_left_out(store):
  def enlarge(data):
    data['config']['mesh']['dict'] = 16

  damage.edit(store / 'manifest.json', enlarge)
  check = look(store)[-1]
  assert check.state == 'ok'
  assert 'mesh of 1 x 16 devices, computed without one: 8 here' in (
    check.looked_at
  )


def test_the_config_of_a_store(text, whole, tmp_path):
  manifest = read_manifest(whole)
  config = stored_config(whole, manifest)
  assert config == tiny_config(text, whole)
  del manifest.config['harvest']['skip_first']  # as of an older program
  moved = stored_config(tmp_path, manifest, 'm.gguf', 'texts')
  assert moved.harvest.skip_first == 1 and moved.store.path == str(tmp_path)
  assert (moved.model.path, moved.text.path) == ('m.gguf', 'texts')
  manifest.config['harvest']['later'] = 1
  with pytest.raises(UserError, match='harvest.later, which this program'):
    stored_config(whole, manifest)


def launch(*arguments):
  return subprocess.run(
    [sys.executable, 'launch/verify.py', *arguments],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_the_program(store, tmp_path):
  done = launch(f'--store={store}')
  assert done.returncode == 0, done.stderr
  names = [
    line.split()[:2] for line in done.stdout.splitlines() if line[0] != ' '
  ]
  assert names[:5] == [
    ['files', 'ok'], ['checksums', 'ok'], ['alignment', 'ok'],
    ['statistics', 'ok'], ['norms', 'ok'],
  ]  # fmt: skip
  assert names[5] == ['model', 'skipped'] and 'is not here' in done.stdout

  flipped(SITE, 2)(store)
  done = launch(f'--store={store}')
  assert done.returncode == 1 and 'checksums   1 problem' in done.stdout
  assert 'does not match its checksum' in done.stdout

  done = launch(f'--store={store}', '--json', '--rows=0')
  assert done.returncode == 1
  result = json.loads(done.stdout)
  assert not result['ok'] and len(result['checks']) == 6
  assert result['checks'][1]['problems'][0]['shard'] == 2

  for arguments, wanted in [
    ([f'--store={tmp_path / "none"}'], 'no activation store'),
    ([], '--store'),
    ([f'--store={store}', '--rows=few'], "give a number, 0 for none, or 'all'"),
    ([f'--store={store}', '--model_path=/no.gguf'], 'is not here'),
    ([f'--store={store}', '--repair'], 'is not here: give --model_path'),
  ]:
    done = launch(*arguments)
    assert done.returncode == 2, (arguments, done.stderr)
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith('error: ') and wanted in line
    assert 'Traceback' not in done.stderr
