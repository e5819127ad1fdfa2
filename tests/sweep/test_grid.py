"""Points, their ids, and every way in which a grid can be wrong."""

import hashlib
import json

import pytest
import studies

from sae_jax.errors import UserError
from sae_jax.sweep import drive, grid, packing, study, tables
from sae_jax.sweep.machine import UNKNOWN, Machine
from sae_jax.sweep.search import Halving, TargetL0
from sae_jax.train.config import (
  base_config,
  member_configs,
  stacks,
  validate,
)
from sae_jax.train.run import trajectory


def test_an_id_is_of_all_that_decides_the_result(store):
  ids = lambda **more: [
    s.id for s in studies.specs(studies.base(store, **more))
  ]
  first = ids()
  assert len(set(first)) == 4
  assert ids() == first
  assert ids(**{'train.log_rows': 64, 'mesh.data': 2}) == first
  assert not set(ids(**{'optim.b2': 0.99})) & set(first)


def test_keys_of_ids_are_known():
  keys = trajectory(base_config().to_dict()).keys() - grid.LATER.keys()
  found = hashlib.sha256(','.join(sorted(keys)).encode()).hexdigest()[:8]
  assert found == '402ce3c2', 'enter the new key in grid.LATER: ids must stay'


def test_a_study_outlives_a_new_key(store, tmp_path, monkeypatch):
  config = studies.base(store)
  del config.optim['ema']
  old = grid.id_of(config)
  monkeypatch.setattr(grid, 'LATER', grid.LATER | {'optim.ema': 0.0})
  config = studies.base(store)
  assert grid.id_of(config) == old
  open_study = lambda c: study.open_study(
    str(tmp_path), c, grid.entries(c, studies.POINTS)
  )
  drive.plan(open_study(config), lambda: studies.MACHINE, 0)
  record = study.read_study(tmp_path)
  del record['config']['optim']['ema']  # as it was made before
  (tmp_path / 'study.json').write_text(json.dumps(record))
  assert [p.state for p in tables.read(tmp_path)[0]] == ['missing'] * 4
  with pytest.raises(UserError, match='sweep: config.optim.ema differs'):
    open_study(studies.base(store, **{'optim.ema': 0.9}))
  again = open_study(config)
  assert len(drive.wanted(again)) == 4 and not drive.unplanned(again)


def test_changes_move_what_refers_to_them(store):
  c = studies.base(store)
  c.optim.warmup_rows = c.train.get_ref('rows') // 4
  (spec,) = studies.specs(c, [{'train.rows': 2560}])
  assert spec.config.optim.warmup_rows == 640
  assert c.optim.warmup_rows == 320


@pytest.mark.parametrize(
  'points, message',
  [
    ([{'sae.latent': 32}], r'sae.latent=32\).*did you mean sae.latents'),
    ([{'sae.latents': 'wide'}], 'must be a int'),
    ([{'act.k': 64}], r'point \(act.k=64\): config.act.k=64 is more than'),
    ([{'sae.latents': 30, 'mesh.dict': 4}], r'not divisible.*mesh.dict'),
    ([{'sae.latents': 64}] * 2, 'there twice'),
    (
      [{'sae.latents': 64}, {'sae.latents': 64, 'train.codes': 'dense'}],
      r'differs from \(sae.latents=64\) in nothing but train.codes',
    ),
    ([{'loss.l0_coef': TargetL0(8, low=2, high=1)}], 'low < high'),
    ([{'optim.lr': Halving((), rows=10)}], 'needs values'),
    ([{'loss.l0_coef': Halving((1e-3, 1e-2), rows=64)}], 'least sparse'),
    (['sae.latents'], 'not a dict'),
    ([{'train.eval_rows': 0}], 'eval_rows'),
    ([{'train.keep': 1}], 'train.keep=1'),
    ([{'optim.lr': None}], 'optim.lr=None: must be a float'),
    ([{'sae.latents': True}], 'sae.latents=True: must be a int'),
    ([{'optim.lr': 10**400}], 'too large'),
    ([{3: 4}], 'must be dotted keys'),
    ([{'members': ({'seed': 1},)}], 'must be dotted keys'),
    ([{'mesh.member': 2}], 'mesh.member=2: not in a study.*mesh.data'),
    ([{'optim.lr': Halving((-1.0, 1e-3, 2e-3), rows=64)}], 'optim.lr=-1'),
    ([{'optim.lr': Halving((1e-3, None), rows=64)}], 'point .*NoneType'),
    ([{'optim.lr': Halving((1e-3, 2e-3), rows=64.0)}], 'must be a whole'),
    ([{'loss.l0_coef': TargetL0('32', low=1, high=2)}], 'point .*str'),
  ],
)
def test_points_that_cannot_work(store, points, message):
  with pytest.raises(UserError, match=message):
    grid.entries(studies.base(store), points)


@pytest.mark.parametrize(
  'sweep, given, message',
  [
    ('def sweep():\n  return []', (), 'yields no points'),
    ('', (), r'has no sweep\(\)'),
    ('sweep = []', (), r'has no sweep\(\)'),
    ('def sweep():\n  pass', (), 'yields no points'),
    ('def sweep(a, b):\n  pass', (), 'missing a required argument'),
    (
      "def sweep():\n  yield {'seed': 1}", ('seed',),
      r'--config.seed: sweep\(\).*sets it',
    ),
  ],
)  # fmt: skip
def test_files_that_cannot_work(tmp_path, sweep, given, message):
  path = tmp_path / 'study.py'
  path.write_text(sweep)
  with pytest.raises(UserError, match=message):
    grid.load_sweep(str(path), given)


def test_an_argument_reaches_the_sweep(tmp_path):
  path = tmp_path / 'study.py'
  path.write_text("def sweep(arg='no'):\n  yield {'name': arg}")
  assert grid.load_sweep(f'{path}:yes') == [{'name': 'yes'}]
  assert grid.load_sweep(str(path)) == [{'name': 'no'}]


def test_a_job_trains_the_very_points(store):
  specs = studies.specs(studies.base(store))
  (pack,) = packing.pack(specs, studies.MACHINE)
  job = packing.job_config(pack)
  validate(job)
  assert [m['name'] for m in job.members] == [s.id for s in pack]
  assert stacks(member_configs(job)) == [[0, 1], [2, 3]]


def test_points_share_a_job_only_with_the_same_batches(store):
  points = [
    {}, {'seed': 1}, {'train.rows': 640}, {'store.seed': 3},
    {'train.batch_rows': 32},
  ]  # fmt: skip
  packs = packing.pack(
    studies.specs(studies.base(store), points), studies.MACHINE
  )
  assert sorted(map(len, packs)) == [1, 1, 1, 2]
  seeds = studies.base(store, **{'store.seed': -1})
  packs = packing.pack(studies.specs(seeds, points[:2]), studies.MACHINE)
  assert len(packs) == 2  # each draws its own order


def test_jobs_are_as_large_as_memory_and_the_limit_allow(store):
  specs = studies.specs(studies.base(store))
  assert len(packing.pack(specs, UNKNOWN)) == 1
  assert list(map(len, packing.pack(specs, UNKNOWN, 3))) == [1, 3]
  configs = [s.config for s in specs]
  need, _ = packing.job_bytes(configs, 'cpu')
  device, host = packing.job_bytes(configs, 'gpu')
  for share, jobs in ((0.99, 2), (1.01, 1)):  # 70% may be used
    for machine in (
      Machine('cpu', 1, share * need / 0.7),
      Machine('gpu', 1, share * device / 0.7, host_bytes=2 * host),
      Machine('gpu', 1, 2 * device, host_bytes=share * host / 0.7),
    ):
      assert len(packing.pack(specs, machine)) == jobs


def test_a_cpu_has_room_for_a_copy_of_each_member_that_is_saved(store):
  configs = [s.config for s in studies.specs(studies.base(store))]
  (device, host), (all_, none) = (
    packing.job_bytes(configs, platform) for platform in ('gpu', 'cpu')
  )
  assert (all_, none) == (device + host, 0)
  # Parameters and one moment.
  assert host == sum(4 * 2 * (2 * 16 + 1) * c.sae.latents for c in configs)


def test_points_that_do_not_fit_the_machine(store):
  specs = studies.specs(studies.base(store), [{}, {'mesh.data': 4, 'seed': 9}])
  with pytest.raises(
    UserError, match=r'mesh.data=4, seed=9\).* 4 devices, there are 2'
  ):
    packing.pack(specs, Machine('cpu', 2, 2**33))
  with pytest.raises(UserError, match='GiB a device.*and 1 points more'):
    packing.pack(specs, Machine('cpu', 8, 2**12))


def test_points_of_other_streams_are_apart_whatever_their_seeds(store):
  config = studies.base(store, **{'store.seed': -1})
  points = [{}, {'seed': 1, 'store.seed': 0}]  # both draw from 0
  packs = packing.pack(studies.specs(config, points), studies.MACHINE)
  assert len(packs) == 2


def test_a_point_comes_back_from_its_record(store):
  config = studies.base(store)
  config.train.rows = config.sae.get_ref('latents') * 40
  (spec,) = studies.specs(config, [{'sae.latents': 64}])
  record = json.loads(json.dumps(grid.record_of(spec, config)))
  plain = config.copy_and_resolve_references()  # as study.json has it
  again = grid.read_spec(record, plain)
  assert again.config.train.rows == 2560
  assert again == spec._replace(config=again.config)


def test_published_flops_are_12BDF(store):
  (spec,) = studies.specs(studies.base(store), [{}])
  assert packing.cost(spec.config, 'cpu').flops == 20 * 12 * 64 * 16 * 32
