"""A user's mistake ends with one line, exit code 2, and nothing written."""

import json
import re
import shutil

import numpy as np
import pytest
from train_runs import SITE, config_of, overrides, planted_rows, run

import sae_jax
from sae_jax.store.create import write_arrays
from sae_jax.train import loop, progress, rows
from sae_jax.train import run as runs
from sae_jax.train.config import validate

# Found out before there is a config.
BAD_FLAGS = {
  'key': (['--config.optim.lrate=1'], ['lrate', 'lr']),
  'key like no other': (
    ['--config.act.kk=1'],
    ['config.act.kk', 'no such key'],
  ),
  'type': (['--config.train.rows=many'], ['rows', 'many']),
  'float for int': (['--config.sae.latents=3.5'], ['latents', '3.5']),
  'argument': (['rows=3'], ["'rows=3'"]),
  'flag': (['--workdri=x'], ['workdri']),
}
BAD = {
  'activation': (['--config.act.name=jumpreul'], ["'jumprelu'"]),
  'd_in': (['--config.sae.d_in=24'], ['24', '16 wide', 'd_in=16']),
  'site': (['--config.store.site=layer_9.resid_post'], [SITE]),
  'k': (['--config.act.k=65'], ['act.k=65', 'latents=64']),
  'aux_k': (['--config.loss.aux_k=65'], ['aux_k=65', 'latents=64']),
  'mesh and F': (['--config.mesh.dict=7'], ['latents=64', '63 or 70']),
  'mesh and B': (['--config.mesh.data=3'], ['batch_rows=64', 'multiple of 3']),
  'devices': (['--config.mesh.dict=16'], ['16', '8 cpu device']),
  'batch and block': (['--config.train.batch_rows=40'], ['40', '32 or 48']),
  'aux_k of none': (['--config.loss.aux_k=0'], ['aux_k=0', 'aux_coef=0']),
  'parts and B': (['--config.train.micro_batches=3'], ['64', 'batches=3']),
  'zero1 and F': (
    ['--config.mesh.zero1', '--config.mesh.data=2', '--config.sae.latents=65'],
    ['latents=65', 'zero1'],
  ),
  'dtype': (['--config.train.compute_dtype=bf16'], ["'bfloat16'"]),
  'codes': (['--config.train.codes=sparce'], ["'sparse'"]),
  'budget': (['--config.train.budget=3'], ['budget=3', 'active latents']),
  'no evaluation rows': (['--config.train.eval_size=0'], ['eval_size=0']),
  'eps': (['--config.optim.eps=0.0'], ['optim.eps=0.0']),
  'not finite': (['--config.optim.lr=inf'], ['optim.lr=inf']),
  'seed': (['--config.seed=-1'], ['seed=-1']),
  'target of topk': (['--config.loss.target_l0=9.0'], ['act.k']),
  'theta_ema': (['--config.act.theta_ema=1.0'], ['theta_ema=1.0', '[0, 1)']),
  'negative': (['--config.optim.lr=-1.0'], ['optim.lr=-1.0']),
  'store': (['--config.store.path=/nowhere'], ['/nowhere']),
  'no store': (['--config.store.path='], ['config.store.path is empty']),
}


BAD_BATCHTOPK = {
  'activation': (['--config.act.name=batchtop'], ["'batchtopk'"]),
  'k': (['--config.act.k=65'], ['act.k=65', 'latents=64']),
  'no k': (['--config.act.k=0'], ['act.k=0']),
  'aux_k': (['--config.loss.aux_k=65'], ['aux_k=65', 'latents=64']),
  'target': (['--config.loss.target_l0=9.0'], ['act.k', 'batchtopk']),
  'selected': (
    ['--config.act.k=64', f'--config.train.batch_rows={2**26}'],
    ['act.k=64', f'batch_rows={2**26}', 'lower'],
  ),
}


def refused(done, *words):
  """Asserts the documented form of a refusal."""
  lines = done.stderr.strip().splitlines()
  assert done.returncode == 2, done.stderr
  assert len(lines) == 1 and lines[0].startswith('error: '), done.stderr
  for word in words:
    assert word in lines[0], lines[0]


@pytest.mark.parametrize('case', BAD_FLAGS)
def test_one_line(tmp_path, store, case):
  flags, words = BAD_FLAGS[case]
  workdir = tmp_path / 'run'
  refused(run(workdir, 'topk.py:demo', *overrides(store), *flags), *words)
  assert not workdir.exists()


def test_one_line_of_a_config(tmp_path, store):
  """What the cases below raise reaches the user in that form too."""
  flags, words = BAD['k']
  refused(run(tmp_path, 'topk.py:demo', *overrides(store), *flags), *words)


@pytest.mark.parametrize(
  'name, case',
  [('topk', case) for case in BAD] + [('batchtopk', c) for c in BAD_BATCHTOPK],
)
def test_configs_that_cannot_be(tmp_path, store, name, case):
  flags, words = (BAD if name == 'topk' else BAD_BATCHTOPK)[case]
  workdir = tmp_path / 'run'
  with pytest.raises(sae_jax.UserError) as error:
    config = config_of(f'{name}.py:demo', *overrides(store), *flags)
    loop.train(config, str(workdir))
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)
  assert not workdir.exists()


@pytest.mark.parametrize(
  'key, value, more',
  [
    ('train.batch_rows', 60, {'mesh.data': 3}),
    ('train.batch_rows', 40, {'train.micro_batches': 4}),
    ('sae.latents', 60, {'mesh.dict': 7, 'act.k': 60}),
    ('sae.latents', 62, {'mesh.dict': 2, 'mesh.data': 4, 'mesh.zero1': True}),
  ],
)
def test_values_that_are_proposed_are_accepted(store, key, value, more):
  def accept(given):
    flags = overrides(store, **{key: given} | more)
    config = config_of('topk.py:demo', *flags)
    validate(config)
    rows.open_source(config)

  with pytest.raises(sae_jax.UserError, match=f'{value}.*: use ') as error:
    accept(value)
  proposed = re.findall(r'\d+', str(error.value).rpartition(': use ')[2])
  assert proposed
  for given in proposed:
    accept(given)


@pytest.mark.parametrize('value', [0.0, 0.1, 1e4])
@pytest.mark.parametrize('center', [True, False])
def test_rows_that_do_not_vary(tmp_path, value, center):
  x = np.full((512, 16), value, np.float32)
  write = lambda name: write_arrays(
    tmp_path / name, {SITE: x}, rows_per_shard=128, rows_per_block=16
  )
  write('a')
  train = lambda name: loop.train(
    config_of(
      'topk.py:demo',
      *overrides(
        tmp_path / name,
        **{'sae.center': center, 'train.rows': 64, 'train.eval_size': 64},
      ),
    ),
    str(tmp_path / f'run_{name}'),
  )
  with pytest.raises(sae_jax.UserError, match=f'{SITE} in .*/a .* not vary'):
    train('a')
  if center and not value:  # one column that does is enough
    x[:, 3] = np.arange(512)
    write('b')
    train('b')


def test_missing_flags_and_config_files(tmp_path, store):
  refused(run(tmp_path / 'run', 'nothing.py'), 'nothing.py')
  refused(run(tmp_path / 'run', 'topk.py:opanai'), 'opanai', 'openai')
  refused(run(tmp_path / 'run', 'batchtopk.py:busman'), 'busman', 'bussmann')
  refused(run('', 'topk.py:demo'), 'workdir')
  assert not (tmp_path / 'run').exists()


def test_damaged_stores(tmp_path, store):
  copy = tmp_path / 'store'
  shutil.copytree(store, copy)
  flags = overrides(copy)
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


def test_a_store_without_held_out_rows(tmp_path):
  store = tmp_path / 'store'
  rows = {SITE: planted_rows(1024)[0]}
  write_arrays(
    store, rows, rows_per_shard=256, rows_per_block=16, held_out_shards=0
  )
  flags = overrides(store)
  refused(run(tmp_path / 'run', 'topk.py:demo', *flags), 'held-out', 'eval')
  assert not (tmp_path / 'run').exists()
  off = [*flags, '--config.train.eval_rows=0']
  assert run(tmp_path / 'run', 'topk.py:demo', *off).returncode == 0


def test_run_folders_that_cannot_be(tmp_path, store):
  flags = overrides(store)
  file = tmp_path / 'file'
  file.write_text('mine')
  refused(run(file, 'topk.py:demo', *flags), 'is a file')
  refused(run(file / 'run', 'topk.py:demo', *flags), 'cannot be used')
  refused(run('gs://bucket/run', 'topk.py:demo', *flags), 'URL')
  assert file.read_text() == 'mine'
  with runs.lock(tmp_path / 'run'):
    refused(run(tmp_path / 'run', 'topk.py:demo', *flags), 'in use')


def test_what_a_finished_run_refuses_and_takes(tmp_path, store):
  """Nothing that is refused changes config.json."""
  flags = overrides(store)
  workdir = tmp_path / 'run'
  again = lambda *more: run(workdir, 'topk.py:demo', *flags, *more)
  assert again().returncode == 0
  before = (workdir / 'config.json').read_text()
  resume = '--config.train.resume'
  refused(again('--config.act.bandwidth=0.5', resume), 'act.bandwidth')
  done = again('--config.train.rows=1280', resume)
  assert done.returncode == 2 and 'rows=2560 or more' in done.stderr
  other = tmp_path / 'store'
  rows = {SITE: planted_rows(4096, seed=1)[0]}
  write_arrays(
    other, rows, rows_per_shard=256, rows_per_block=16, held_out_shards=2
  )
  done = again(f'--config.store.path={other}')
  assert done.returncode == 2 and 'not the one' in done.stderr
  assert 'Traceback' not in done.stderr
  assert (workdir / 'config.json').read_text() == before
  longer = ['--config.train.rows=3200', '--config.optim.clip_norm=1.0']
  done = again(*longer, resume)
  assert done.returncode == 0 and 'going on from step 40' in done.stderr
  with pytest.raises(sae_jax.UserError, match='step 7 .*kept: 40, 50'):
    sae_jax.load(workdir, step=7)
  config = json.loads((workdir / 'config.json').read_text())
  del config['act']['log_theta'], config['optim']['ema']
  (workdir / 'config.json').write_text(json.dumps(config))
  sae_jax.load(workdir)  # keys younger than the run have their defaults


def test_moments_keep_their_decay(tmp_path, store):
  """Rows that lag behind are brought up to date by it."""
  config = config_of('topk.py:demo', *overrides(store))
  runs.write_config(tmp_path, config)
  config.optim.b2, config.train.resume = 0.9, True
  with pytest.raises(sae_jax.UserError, match='optim.b2 cannot change'):
    runs.check_run(tmp_path, config)


@pytest.mark.parametrize('codes', ['sparse', 'dense'])
def test_a_word_on_batches_that_outgrow_sparse_codes(
  tmp_path, store, codes, monkeypatch, caplog
):
  monkeypatch.setattr(progress, '_DENSE', 5)
  values = {'train.codes': codes, 'train.budget': 1, 'loss.l0_coef': 0.0}
  config = config_of('jumprelu.py:demo', *overrides(store, **values))
  loop.train(config, str(tmp_path / 'run'))
  said = [r for r in caplog.messages if '5 updates in a row had more' in r]
  assert len(said) == (codes == 'sparse')


def test_loading_what_is_not_there(tmp_path):
  with pytest.raises(sae_jax.UserError, match='config.json'):
    sae_jax.load(tmp_path)
  (tmp_path / 'config.json').write_text('{"a": ')
  with pytest.raises(sae_jax.UserError, match='not the JSON'):
    runs.read_config(tmp_path)
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(sae_jax.UserError, match='checkpoint'):
    sae_jax.load(tmp_path)
