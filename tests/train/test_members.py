"""Members of one job: each is what it would be alone, and a run of its own."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_bad_input import refused
from test_loop import _metrics
from test_skipping import changed_batches, nan_at, same, stop_at
from train_runs import ROOT, SITE, D, command, overrides, run

import sae_jax
from sae_jax.errors import UserError
from sae_jax.parallel.mesh import make_mesh
from sae_jax.store import reader
from sae_jax.train import checkpoints, loop, members
from sae_jax.train import run as runs
from sae_jax.train.config import base_config, stacks, validate
from sae_jax.train.state import abstract_state

B, STEPS = 64, 12
# Three of one stack and one of another: of half the width.
MEMBERS = (
  {},
  {'optim.lr': 3e-3, 'seed': 1},
  {'loss.l0_coef': 0.05, 'loss.aux_coef': 0.1, 'seed': 2, 'act.theta': 0.05},
  {'sae.latents': 32, 'name': 'narrow'},
)
NAMES = ('00', '01', '02', 'narrow')


def config_of(store, name='topk', members=MEMBERS):
  c = base_config()
  c.store.path, c.store.site, c.sae.d_in = str(store), SITE, D
  c.act.name, c.act.k, c.act.theta, c.act.bandwidth = name, 4, 0.2, 0.3
  c.sae.latents, c.loss.aux_k, c.loss.dead_rows = 64, 8, 2 * B
  c.loss.l0_coef, c.optim.lr, c.optim.eps = 0.01, 1e-2, 1e-4
  c.train.batch_rows = c.train.log_rows = B
  c.train.rows, c.train.save_rows = STEPS * B, 4 * B
  c.train.eval_rows, c.train.eval_size = 4 * B, 128
  c.members = members
  return c


def alone(config, overrides):
  """The same SAE as a plain run, its config written key by key."""
  c: Any = ConfigDict(config.to_dict() | {'members': ()})
  for key, value in overrides.items():
    if key != 'name':
      group, _, last = key.rpartition('.')
      (c[group] if group else c)[last] = value
  c.store.seed, c.mesh.member = config.seed, 1
  return c


def end_of(run_dir):
  config = runs.read_config(run_dir)
  with jax.set_mesh(make_mesh(1, 1)):
    found = checkpoints.newest(run_dir, abstract_state(config))
  assert found
  return found[0], jax.device_get(found[1]), found[2]


def folder(workdir, name):
  return workdir / 'members' / name


def near(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  'name, codes, mesh',
  [
    ('topk', 'dense', (1, 1, 1)),
    ('jumprelu', 'sparse', (1, 1, 1)),
    ('topk', 'sparse', (1, 4, 2)),
    pytest.param('batchtopk', 'dense', (2, 2, 2), marks=pytest.mark.slow),
  ],
)
def test_a_member_is_the_same_sae_trained_alone(
  tmp_path, store, name, codes, mesh
):
  each = MEMBERS
  if mesh[2] == 2:  # twice two
    each = (*MEMBERS[::2], MEMBERS[3], {'sae.latents': 32, 'seed': 5})
  config = config_of(store, name, each)
  config.mesh.data, config.mesh.dict, config.mesh.member = mesh
  config.mesh.zero1, config.train.codes = mesh[0] > 1, codes
  config.train.budget = 24 * (name == 'jumprelu')
  job = loop.train(config, str(tmp_path / 'job'))
  assert [len(stack.step) for stack in job] == (
    [3, 1] if mesh[2] == 1 else [2, 2]
  )
  config.mesh.data = config.mesh.dict = 1
  config.mesh.zero1 = False
  for i in (1, 2, 3) if mesh == (1, 1, 1) else (1,):
    found = folder(tmp_path / 'job', each[i].get('name', f'{i:02d}'))
    single = tmp_path / str(i)
    loop.train(alone(config, each[i]), str(single))
    (_, a, _), (_, b, _) = end_of(found), end_of(single)
    near(a, b)
    lines = zip(_metrics(found), _metrics(single), strict=True)
    for one, two in lines:
      assert one == pytest.approx(two, rel=1e-2, abs=1e-3)
    steps = [line for line in _metrics(found) if 'train/l0' in line]
    assert len(steps) == STEPS
  assert not (tmp_path / 'job' / 'checkpoints').exists()


def stopped(tmp_path, config, monkeypatch, step):
  """A job that was asked to stop at a step, when it has saved."""
  with monkeypatch.context() as patch:
    patch.setattr(loop, 'stop_signals', stop_at(step))
    with pytest.raises(SystemExit):
      loop.train(config, str(tmp_path))


def lose(workdir, name, step):
  shutil.rmtree(checkpoints.folder(folder(workdir, name)) / str(step))


def damage(workdir, name, step):
  path = checkpoints.folder(folder(workdir, name)) / str(step)
  (path / 'meta' / 'record.json').write_text('damaged')


@pytest.mark.parametrize('what', ['stopped', 'one behind', 'damaged'])
def test_it_goes_on_with_the_same_bits(
  tmp_path, store, monkeypatch, caplog, what
):
  """From the newest step that all have, as if it had never stopped."""
  config = config_of(store)
  whole, job = tmp_path / 'whole', tmp_path / 'job'
  loop.train(config, str(whole))
  stopped(job, config, monkeypatch, 6)
  if what == 'one behind':
    lose(job, '01', 6)
  if what == 'damaged':
    damage(job, 'narrow', 6)
  caplog.set_level(logging.INFO, 'absl')
  loop.train(config, str(job))
  step = 6 if what == 'stopped' else 4
  assert f'going on from step {step} ' in caplog.text
  for name in NAMES:
    (last, a, _), (_, b, _) = (
      end_of(folder(job, name)),
      end_of(folder(whole, name)),
    )
    assert last == STEPS
    same(a, b)
    assert _metrics(folder(job, name)) == _metrics(folder(whole, name))
    aside = {
      p.name
      for p in checkpoints.folder(folder(job, name)).iterdir()
      if not p.name.isdecimal()
    }
    expected = {
      'stopped': set(),
      'one behind': {'ahead-6'} - ({'ahead-6'} if name == '01' else set()),
      'damaged': {'damaged-6' if name == 'narrow' else 'ahead-6'},
    }
    assert aside == expected[what]


def test_without_a_common_step(tmp_path, store, monkeypatch):
  """Killed within the first round it starts anew; what is lost later is not
  trained again in silence."""
  config = config_of(store, members=MEMBERS[:2])
  job = tmp_path / 'job'
  stopped(job, config, monkeypatch, 2)
  lose(job, '01', 2)
  stopped(job, config, monkeypatch, 6)
  assert checkpoints.kept_steps(folder(job, '00')) == [4, 6]
  for step in (4, 6):
    lose(job, '01', step)
  with pytest.raises(UserError, match=r'00: 4, 6; 01: none.*another --workdir'):
    loop.train(config, str(job))


def test_a_member_is_a_run(tmp_path, store, monkeypatch):
  """It is loaded, evaluated, and continued alone with the same batches."""
  config = config_of(store)
  loop.train(config, str(tmp_path / 'whole'))
  job = tmp_path / 'job'
  stopped(job, config, monkeypatch, 6)
  mine = folder(job, '01')
  its = runs.read_config(mine)
  assert (its.seed, its.store.seed, its.optim.lr) == (1, 0, 3e-3)
  assert its.members == () and its.train.rows == config.train.rows
  sae = sae_jax.load(mine)
  rows: Any = np.concatenate([r for r, _ in reader.held_out(store, SITE)])
  assert np.isfinite(np.asarray(sae.decode(sae.encode(rows)))).all()
  with pytest.raises(UserError, match='holds members: give one of'):
    sae_jax.load(job)
  loop.train(its, str(mine))
  near(end_of(mine)[1], end_of(folder(tmp_path / 'whole', '01'))[1])
  with pytest.raises(UserError, match='no step of which all members'):
    loop.train(config, str(job))


@pytest.mark.slow
def test_launch_and_evaluate(tmp_path, store):
  """As users do it; killed once on the way, wherever it happens to be."""
  flags = overrides(store, **{'train.save_rows': 4 * B})
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  done = run(whole, 'jumprelu.py:demo_members', *flags)
  assert done.returncode == 0, done.stderr
  child = subprocess.Popen(
    command(killed, 'jumprelu.py:demo_members', *flags),
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  log = folder(killed, 'l0_coef=0.004') / 'metrics.jsonl'
  while child.poll() is None:
    if log.exists() and len(log.read_bytes().splitlines()) > 12:
      break
    time.sleep(0.005)
  child.send_signal(signal.SIGKILL)
  child.wait(timeout=60)
  done = run(killed, 'jumprelu.py:demo_members', *flags)
  assert done.returncode == 0, done.stderr
  names = sorted(path.name for path in (whole / 'members').iterdir())
  assert len(names) == 4
  for name in names:
    mine, other = folder(whole, name), folder(killed, name)
    assert _metrics(other) == _metrics(mine)
    same(end_of(other)[1], end_of(mine)[1])
  evaluate = [sys.executable, str(ROOT / 'launch' / 'evaluate.py'), '--nolm']
  done = subprocess.run(
    [*evaluate, f'--workdir={mine}'],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert list(mine.rglob('report.html'))
  more = [f'--config.train.rows={50 * B}', '--config.train.resume']
  done = run(mine, f'run.py:{mine}', *more)
  assert done.returncode == 0, done.stderr
  assert 'going on from step 40' in done.stderr
  assert checkpoints.find_step(mine) == 50


def test_what_one_leaves_out_is_its_own(tmp_path, store, monkeypatch, caplog):
  """A batch that is not a number is left out by all; of a member whose rate is
  too high nothing is saved, and it is named."""
  config = config_of(store, 'jumprelu')
  changed_batches(monkeypatch, nan_at(2))
  loop.train(config, str(tmp_path / 'one'))
  assert [end_of(folder(tmp_path / 'one', n))[2]['skipped'] for n in NAMES] == (
    [1] * 4
  )
  assert 'member narrow: step 3 changes nothing' in caplog.text
  config.train.max_skipped, config.train.save_rows = 3, B
  config.members = (*MEMBERS[:3], {'optim.lr': 1e30, 'name': 'wild'})
  changed_batches(monkeypatch, nan_at())
  with pytest.raises(UserError, match='member wild: 3 updates in a row'):
    loop.train(config, str(tmp_path / 'two'))
  assert end_of(folder(tmp_path / 'two', '00'))[2]['skipped'] == 0
  for x in jax.tree.leaves(end_of(folder(tmp_path / 'two', 'wild'))[1]):
    assert np.isfinite(x).all()


def test_all_go_back_together(tmp_path, store, monkeypatch):
  """Batches 5 to 7 are bad: back to step 4, on with batch 8."""
  config = config_of(store, members=MEMBERS[1:])
  config.train.max_skipped = 3
  changed_batches(monkeypatch, nan_at(5, 6, 7))
  loop.train(config, str(tmp_path / 'bad'))
  changed_batches(monkeypatch, lambda source, i: source[i if i < 4 else i + 4])
  loop.train(config, str(tmp_path / 'without'))
  for name in ('00', '01', 'narrow'):
    _, state, record = end_of(folder(tmp_path / 'bad', name))
    assert record['jumps'] == [[4 * B, 8 * B]]
    same(state, end_of(folder(tmp_path / 'without', name))[1])


def test_another_config_is_refused(tmp_path, store, monkeypatch):
  config = config_of(store)
  stopped(tmp_path, config, monkeypatch, 2)

  def again(members, **more):
    c = config_of(store, members=members)
    c.train.update(more)
    loop.train(c, str(tmp_path))

  with pytest.raises(UserError, match=r'members 4 -> 3.*cannot change'):
    again(MEMBERS[:3])
  with pytest.raises(UserError, match=r'members\[1\].seed 1 -> 2.*cannot'):
    again((MEMBERS[0], {**MEMBERS[1], 'seed': 2}, *MEMBERS[2:]))
  other = (MEMBERS[0], {**MEMBERS[1], 'optim.lr': 2e-3}, *MEMBERS[2:])
  with pytest.raises(UserError, match=r'members\[1\].optim.lr .*train.resume'):
    again(other)
  again(other, resume=True)
  assert runs.read_config(folder(tmp_path, '01')).optim.lr == 2e-3
  with pytest.raises(UserError, match='members 4 -> 0'):
    again(())


BAD = {
  'no key': (
    {'optim.lrr': 1e-3},
    'config.members[0].optim.lrr: no such key, did you mean optim.lr?',
  ),
  'shared': ({'train.rows': 3}, 'members[0].train.rows: all members share it'),
  'width': ({'sae.d_in': 3}, 'set config.sae.d_in instead'),
  'type': ({'optim.lr': 'high'}, "members[0].optim.lr='high': must be a float"),
  'value': ({'act.k': 65}, 'config.members[0]: config.act.k=65 is more than'),
  'no dict': ('optim.lr', "'optim.lr' is not a dict"),
  'name': ({'name': '../x'}, "members[0].name='../x': must be letters"),
  'same name': ({'name': '01'}, "members[1].name='01': also that of"),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_members(store, case):
  member, words = BAD[case]
  with pytest.raises(UserError) as error:
    validate(config_of(store, members=(member, {})))
  assert words in str(error.value)


def test_bad_jobs_with_members(tmp_path, store):
  config = config_of(store)
  config.mesh.member = 2
  with pytest.raises(UserError, match='does not divide the 3 members 0, 1, 2'):
    validate(config)
  config.members = ()
  with pytest.raises(UserError, match='there are no config.members'):
    validate(config)
  config = config_of(store)
  config.train.keep = 1
  with pytest.raises(UserError, match='train.keep=1: members need 2'):
    validate(config)
  members = '--config.members=({"optim.lrr":1.0},)'
  done = run(tmp_path / 'x', 'topk.py:demo', *overrides(store), members)
  refused(done, 'members[0].optim.lrr', 'did you mean optim.lr')
  assert not (tmp_path / 'x').exists()


def test_members_survive_a_file(store):
  """As nested dicts, as ConfigDicts, and back from config.json."""
  nested = config_of(store, members=({'optim': {'lr': 2e-3}}, ConfigDict()))
  nested.members = (*nested.members, ConfigDict({'sae': {'latents': 32}}))
  text = json.dumps(loop.plain_members(nested).to_dict())
  back = base_config()
  back.update(json.loads(text))
  assert back.members == ({'optim.lr': 2e-3}, {}, {'sae.latents': 32})
  configs = members.member_configs(back)
  assert [c.optim.lr for c in configs] == [2e-3, 1e-2, 1e-2]
  assert stacks(configs) == [[0, 1], [2]]
  assert not runs.changed_keys(nested.to_dict(), back.to_dict())
