"""A user's mistake ends with one line, exit code 2, and nothing written."""

import shutil

import pytest
from train_runs import SITE, overrides, run

import sae_jax
from sae_jax.train import run as runs

BAD = {
  'key': (['--config.optim.lrate=1'], ['lrate', 'lr']),
  'type': (['--config.train.rows=many'], ['rows', 'many']),
  'float for int': (['--config.sae.latents=3.5'], ['latents', '3.5']),
  'activation': (['--config.act.name=jumpreul'], ["'jumprelu'"]),
  'd_in': (['--config.sae.d_in=24'], ['24', '16 wide', 'd_in=16']),
  'site': (['--config.store.site=layer_9.resid_post'], [SITE]),
  'k': (['--config.act.k=65'], ['act.k=65', 'latents=64']),
  'aux_k': (['--config.loss.aux_k=65'], ['aux_k=65', 'latents=64']),
  'mesh and F': (['--config.mesh.dict=7'], ['latents=64', '63 or 70']),
  'mesh and B': (['--config.mesh.data=3'], ['batch_rows=64', '63 or 66']),
  'devices': (['--config.mesh.dict=16'], ['16', '8 cpu device']),
  'batch and block': (['--config.train.batch_rows=40'], ['40', '32 or 48']),
  'negative': (['--config.optim.lr=-1.0'], ['optim.lr=-1.0']),
  'store': (['--config.store.path=/nowhere'], ['/nowhere']),
  'argument': (['rows=3'], ["'rows=3'"]),
  'flag': (['--workdri=x'], ['workdri']),
}


def refused(done, *words):
  """Asserts the documented form of a refusal."""
  lines = done.stderr.strip().splitlines()
  assert done.returncode == 2, done.stderr
  assert len(lines) == 1 and lines[0].startswith('error: '), done.stderr
  for word in words:
    assert word in lines[0], lines[0]


@pytest.mark.parametrize('case', BAD)
def test_one_line(tmp_path, store, case):
  flags, words = BAD[case]
  workdir = tmp_path / 'run'
  refused(run(workdir, 'topk.py:demo', *overrides(store), *flags), *words)
  assert not workdir.exists()


def test_missing_flags_and_config_files(tmp_path, store):
  refused(run(tmp_path / 'run', 'nothing.py'), 'nothing.py')
  refused(run(tmp_path / 'run', 'topk.py:opanai'), 'opanai', 'openai')
  refused(run('', 'topk.py:demo'), 'workdir')
  assert not (tmp_path / 'run').exists()


def test_incomplete_and_damaged_stores(tmp_path, store):
  copy = tmp_path / 'store'
  shutil.copytree(store, copy)
  manifest = copy / 'manifest.json'
  text = manifest.read_text()
  manifest.write_text(text.replace('"complete"', '"writing"'))
  flags = overrides(copy)
  refused(run(tmp_path / 'a', 'topk.py:demo', *flags), 'complete', str(copy))
  manifest.write_text(text)
  shards = sorted((copy / 'sites' / SITE).glob('*.bin'))
  whole = shards[5].read_bytes()
  shards[5].write_bytes(whole[:-100])
  refused(run(tmp_path / 'b', 'topk.py:demo', *flags), shards[5].name, 'bytes')
  assert not (tmp_path / 'b').exists()
  shards[5].write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
  done = run(tmp_path / 'c', 'topk.py:demo', *flags)
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith('error: ') and shards[5].name in last


def test_a_run_of_another_config(tmp_path, store):
  flags = overrides(store)
  assert run(tmp_path, 'topk.py:demo', *flags).returncode == 0
  before = (tmp_path / 'config.json').read_text()
  changed = [*flags, '--config.optim.lr=0.5', '--config.train.rows=2688']
  done = run(tmp_path, 'topk.py:demo', *changed)
  refused(done, 'optim.lr 0.001 -> 0.5', 'train.rows 2560 -> 2688', 'resume')
  assert (tmp_path / 'config.json').read_text() == before
  done = run(tmp_path, 'topk.py:demo', *flags, '--config.act.k=5')
  refused(done, 'act.k 4 -> 5', 'another folder')
  done = run(
    tmp_path, 'topk.py:demo', *flags, '--config.act.k=5',
    '--config.train.resume',
  )  # fmt: skip
  refused(done, 'act.k 4 -> 5', 'another folder')
  done = run(tmp_path, 'topk.py:demo', *changed, '--config.train.resume')
  assert done.returncode == 0 and 'going on from step 40' in done.stderr


def test_loading_what_is_not_there(tmp_path):
  with pytest.raises(sae_jax.UserError, match='config.json'):
    sae_jax.load(tmp_path)
  (tmp_path / 'config.json').write_text('{"a": ')
  with pytest.raises(sae_jax.UserError, match='not JSON'):
    runs.read_config(tmp_path)
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(sae_jax.UserError, match='checkpoint'):
    sae_jax.load(tmp_path)
