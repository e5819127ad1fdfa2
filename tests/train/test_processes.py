"""Several real processes as one job: the same run as in one process."""

import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import test_growing
from train_runs import (
  SITE,
  D,
  end_job,
  overrides,
  planted_rows,
  run,
  start_job,
)

from sae_jax.errors import UserError
from sae_jax.parallel import processes
from sae_jax.parallel.mesh import make_mesh
from sae_jax.store.batches import BatchSource
from sae_jax.store.writer import open_writer
from sae_jax.train import checkpoints, rows, state
from sae_jax.train import run as runs
from sae_jax.train.config import base_config

CONFIG = 'topk.py:demo'
HEARTBEAT = '--config.distributed.heartbeat_seconds=10'


def mesh_flags(data, dict_):
  return [f'--config.mesh.data={data}', f'--config.mesh.dict={dict_}']


def metrics(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  keep = lambda k: not k.startswith('perf/')
  return [
    {k: v for k, v in json.loads(line).items() if keep(k)} for line in lines
  ]


def arrays(workdir, step=None):
  """Every array of a checkpoint, the last one by default."""
  step = checkpoints.find_step(workdir, step)
  with jax.set_mesh(make_mesh(1, 1)):
    abstract = state.abstract_state(runs.read_config(workdir))
    found, _ = checkpoints.restore(workdir, step, abstract)
  return jax.device_get(jax.tree.leaves(found))


def close(a, b, **tolerance):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    if isinstance(x, dict):
      assert x == pytest.approx(y, **tolerance)
    else:
      np.testing.assert_allclose(
        x, y, rtol=tolerance['rel'], atol=tolerance['abs']
      )


def from_checkpoint(workdir, step, to):
  """A copy of a run, as if it had been killed after `step`."""
  shutil.copytree(workdir, to)
  for kept in checkpoints.kept_steps(to):
    if kept > step:
      shutil.rmtree(checkpoints.folder(to) / str(kept))
  return to


@pytest.fixture(scope='module')
def four(store, tmp_path_factory):
  """The run of 4 processes with 2 devices each, on 2x4; keeps all saves."""
  workdir = tmp_path_factory.mktemp('four') / 'run'
  end_job(
    start_job(
      workdir, CONFIG, *flags_of(store), *mesh_flags(2, 4), processes=4,
      devices=2,
    )
  )  # fmt: skip
  return workdir


def flags_of(store):
  return [*overrides(store, **{'train.keep': 9}), HEARTBEAT]


@pytest.mark.slow
def test_four_processes_are_one_process(tmp_path, store, four):
  """Sums of four and of eight are taken in another order in gloo."""
  done = run(tmp_path, CONFIG, *flags_of(store), *mesh_flags(2, 4), devices=8)
  assert done.returncode == 0, done.stderr
  close(metrics(tmp_path), metrics(four), rel=1e-3, abs=1e-4)
  close(arrays(tmp_path), arrays(four), rel=1e-2, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['jumprelu', 'batchtopk and all else'])
def test_two_processes_are_one_process_to_the_bit(tmp_path, store, kind):
  """All sums over an axis of 2x2 have two terms."""
  job = ['jumprelu.py:demo', *flags_of(store), *mesh_flags(2, 2)]
  if kind != 'jumprelu':  # a batch that process 1 cannot read, too
    spoil(store, tmp_path / 'store')
    job[0] = 'batchtopk.py:demo'
    job[1:-2] = flags_of(tmp_path / 'store')
    job += ['--config.mesh.zero1', '--config.train.micro_batches=2']
    job += ['--config.train.on_bad_block=skip']
  end_job(start_job(tmp_path / 'two', *job, processes=2, devices=2))
  done = run(tmp_path / 'one', *job, devices=4)
  assert done.returncode == 0, done.stderr
  one, two = tmp_path / 'one', tmp_path / 'two'
  if kind == 'jumprelu':
    assert metrics(two) == metrics(one)
    for a, b in zip(arrays(two), arrays(one), strict=True):
      np.testing.assert_array_equal(a, b)
  else:  # with zero1 the gradient's norm is a sum over both axes
    values = [
      [{k: v for k, v in line.items() if v is not None} for line in metrics(d)]
      for d in (two, one)  # the skipped batch has no loss
    ]
    close(*values, rel=1e-5, abs=1e-6)
    close(arrays(two), arrays(one), rel=1e-4, abs=1e-5)
  meta = checkpoints.read_meta(tmp_path / 'two', 40)
  assert meta['skipped'] == (kind != 'jumprelu')


@pytest.mark.slow
def test_a_run_goes_on_in_other_processes_and_on_other_meshes(
  tmp_path, store, four
):
  """4 processes on 2x4 -> 1 on 1x1, 2 on 8x1 -> 4 on 2x4 again."""
  one = from_checkpoint(four, 20, tmp_path / 'one')
  done = run(one, CONFIG, *flags_of(store), *mesh_flags(1, 1), devices=1)
  assert 'going on from step 20 (1280 rows)' in done.stderr, done.stderr
  two = from_checkpoint(four, 20, tmp_path / 'two')
  job = dict(processes=2, devices=4)
  said = end_job(
    start_job(two, CONFIG, *flags_of(store), *mesh_flags(8, 1), **job)
  )
  assert 'going on from step 20 (1280 rows)' in said[0]
  back = from_checkpoint(two, 30, tmp_path / 'back')
  job = dict(processes=4, devices=2)
  end_job(start_job(back, CONFIG, *flags_of(store), *mesh_flags(2, 4), **job))
  for workdir in (one, two, back):
    # Another order of sums: of 40 steps' metrics, and of the parameters.
    close(metrics(workdir), metrics(four), rel=1e-3, abs=1e-4)
    close(arrays(workdir), arrays(four), rel=1e-2, abs=1e-3)


@pytest.mark.slow
def test_sigterm_to_one_saves_all_at_one_step(tmp_path, store, four):
  """And the next start ends with the bits of the run that was left alone."""
  job = [CONFIG, *flags_of(store), *mesh_flags(2, 4)]
  children = start_job(tmp_path, *job, processes=4, devices=2)
  log = tmp_path / 'metrics.jsonl'
  while not log.exists() or len(log.read_bytes().splitlines()) < 5:
    assert children[0].poll() is None, end_job(children)
    time.sleep(0.002)
  children[2].send_signal(signal.SIGTERM)
  said = end_job(children, 143, 143, 143, 143)
  step = checkpoints.find_step(tmp_path)
  assert 0 < step < 40 and f'saved at step {step}' in said[0]
  said = end_job(start_job(tmp_path, *job, processes=4, devices=2))
  assert f'going on from step {step}' in said[0]
  assert metrics(tmp_path) == metrics(four)
  for a, b in zip(arrays(tmp_path), arrays(four), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_processes_that_disagree(tmp_path, store):
  job = [CONFIG, *flags_of(store), *mesh_flags(2, 1)]
  each = [(1, '--config.optim.lr=0.5')]
  children = start_job(tmp_path / 'a', *job, processes=2, devices=1, each=each)
  said = end_job(children, 2, 2)
  assert last(said[0]) == (
    'error: process 0: process 1 of this job stopped: see there'
  )
  assert 'config.optim.lr is 0.5 in process 1 and 0.001 in' in last(said[1])
  assert not (tmp_path / 'a').exists()
  # What only the first one looks at stops the others as well.
  with runs.lock(tmp_path / 'b'):
    children = start_job(tmp_path / 'b', *job, processes=2, devices=1)
    said = end_job(children, 2, 2)
  assert 'is in use by another process' in last(said[0])
  assert 'process 0 of this job stopped: see there' in last(said[1])
  # What the disk does to one, outside of what all look at together.
  (tmp_path / 'c' / 'metrics.jsonl').mkdir(parents=True)
  children = start_job(tmp_path / 'c', *job, processes=2, devices=1)
  said = [child.communicate(timeout=120)[1] for child in children]
  assert children[0].returncode == 2, said[0]
  assert 'Traceback' not in said[0]
  assert 'error: process 0: ' in last(said[0]) and 'metrics.jsonl' in said[0]
  assert 'Is a directory: mend that and retry' in last(said[0])
  assert children[1].returncode in (75, -signal.SIGABRT), said[1]


@pytest.mark.slow
def test_a_mesh_must_take_all_devices_of_the_job(tmp_path, store):
  job = [CONFIG, *flags_of(store), *mesh_flags(1, 2)]
  said = end_job(start_job(tmp_path, *job, processes=2, devices=2), 2, 2)
  assert '1 x 2 devices are not the 4 of 2 processes' in last(said[0])


@pytest.mark.slow
def test_a_bad_block_that_one_process_reads_ends_all(tmp_path, store):
  """Process 1 of 2 reads the second half of a batch: the one that is bad."""
  bad = tmp_path / 'store'
  file, block = spoil(store, bad)
  job = [CONFIG, *flags_of(bad), *mesh_flags(2, 1)]
  children = start_job(tmp_path / 'run', *job, processes=2, devices=1)
  said = [child.communicate(timeout=120)[1] for child in children]
  assert children[1].returncode == 2, said[1]
  assert last(said[1]).startswith('error: process 1: '), said[1]
  assert f'{file.name}: block {block}' in last(said[1])
  assert children[0].returncode in (75, -signal.SIGABRT), said[0]
  assert checkpoints.kept_steps(tmp_path / 'run')[-1:] == [10]


def spoil(store, bad):
  """A copy of the store with a bad block in the second half of batch 12."""
  shutil.copytree(store, bad)
  source = BatchSource(bad, SITE, 64, seed=0, window=8)
  shard, block = source._locate(12 * 4 + 2)
  file = next((bad / 'sites').rglob(f'shard-{shard:05d}-of-*.bin'))
  data = bytearray(file.read_bytes())
  data[block * 16 * D * 4] ^= 1
  file.write_bytes(data)
  return file, block


def last(stderr):
  lines = [line for line in stderr.splitlines() if not line.startswith('[Gloo')]
  return lines[-1]


def test_a_coordinator_that_does_not_answer(tmp_path, store):
  flags = [
    *overrides(store), '--config.distributed.start_seconds=2',
    '--coordinator=127.0.0.1:1', '--processes=2', '--process_id=1',
  ]  # fmt: skip
  done = run(tmp_path / 'run', CONFIG, *flags)
  assert done.returncode == 75
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: --coordinator=127.0')
  assert 'process 0 does not answer after 2 s' in lines[0]
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'flags, message',
  [
    (('auto', 2, 0), '--processes=2: --coordinator=auto takes it from the'),
    (('auto', 1, 1), '--process_id=1: --coordinator=auto takes it from the'),
    (('', 1, 1), '--process_id=1: give --coordinator=HOST:PORT'),
  ],
)
def test_flags_that_would_not_count(flags, message):
  with pytest.raises(UserError, match=message):
    processes.start_processes(*flags, start_seconds=1)


def test_a_cluster_whose_first_host_is_away(tmp_path, store):
  """--coordinator=auto, as in the second task of a Slurm job."""
  slurm = {
    'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_STEP_NUM_TASKS': '2', 'SLURM_NTASKS': '2', 'SLURM_PROCID': '1',
    'SLURM_LOCALID': '1', 'SLURM_STEP_ID': '0',
  }  # fmt: skip
  flags = [
    *overrides(store), '--config.distributed.start_seconds=2',
    '--coordinator=auto',
  ]  # fmt: skip
  done = run(tmp_path / 'run', CONFIG, *flags, more=slurm)
  assert done.returncode == 75, done.stderr
  line = last(done.stderr.strip())
  assert line.startswith('error: --coordinator=auto: not all processes found')
  assert '--processes' not in line


@pytest.mark.parametrize(
  'flags, word',
  [
    (['--processes=2'], 'give --coordinator=HOST:PORT'),
    (['--coordinator=a:1', '--process_id=1'], 'must be below --processes=1'),
    (['--coordinator=auto'], 'no Slurm, GKE or TPU job'),
    (['--config.distributed.heartbeat_seconds=0'], 'must be above 0'),
  ],
)
def test_flags_that_do_not_fit(tmp_path, store, flags, word):
  done = run(tmp_path / 'run', CONFIG, *overrides(store), *flags)
  assert done.returncode == 2, done.stderr
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1 and word in lines[0], lines


class Device:
  def __init__(self, process):
    self.process_index = process


# Which processes have a device in each line along `data`; the last four are
# what jax makes of v5e:4x4 as 16x1 and 8x2, of v5p:2x2x4 as 8x2 and of
# v5p:4x4x4 as 16x4.
OWNERS = [
  [[0, 0], [1, 1]],
  [[0, 1], [2, 3]],
  [[0, 1], [0, 1]],
  [[0], [0], [0], [1]],
  [[int(p)] for p in '0011110233332220'],
  [[int(p)] for p in '00221133'],
  [[int(p)] for p in '01230123'],
  [[p, p + 1] for p in (0, 4, 8, 12, 0, 4, 8, 12, 2, 6, 10, 14, 2, 6, 10, 14)],
]


@pytest.mark.parametrize('owners', OWNERS)
def test_a_process_reads_the_rows_of_its_devices(monkeypatch, store, owners):
  """And no others, where blocks allow it: batches of 64 rows have only 4."""
  config = base_config()
  config.store.path, config.store.site, config.sae.d_in = str(store), SITE, D

  class Mesh:
    devices = np.array([[Device(p) for p in line] for line in owners])
    axis_names = ('data', 'dict')

  lines = len(owners)
  for batch in (64, 16 * lines):
    config.train.batch_rows = batch
    whole, each = rows.open_source(config)[3], batch // lines
    for process in {p for line in owners for p in line}:
      monkeypatch.setattr(jax, 'process_index', lambda p=process: p)
      parts, of = processes.data_parts(Mesh())  # type: ignore[arg-type]
      mine = [i for i, line in enumerate(owners) if process in line]
      assert (parts, of) == (mine, lines)
      source = rows.open_source(config, parts, of)
      read = source[3]
      assert len(read) == source.rows
      if batch == 16 * lines:
        assert len(read) == each * len(mine)
      for i in mine:
        start, end = i * each, (i + 1) * each
        np.testing.assert_array_equal(
          rows.part_rows(read, source.parts, start, end), whole[start:end]
        )


@pytest.mark.slow
def test_a_job_follows_a_harvest_and_stops_while_it_waits(tmp_path):
  """Process 0 alone looks for shards, and SIGTERM goes to the other one."""
  root, workdir = tmp_path / 'store', tmp_path / 'run'
  test_growing.begin(root, keep_bytes=0)
  rows, _ = planted_rows(test_growing.ROWS)
  more = {
    'store.window': 2, 'train.rows': 20 * 64, 'train.eval_rows': 0,
    'train.save_rows': 64 * 64,
  }  # fmt: skip
  job = [CONFIG, *overrides(root, **more), HEARTBEAT, *mesh_flags(2, 1)]
  site = {test_growing.SITE: rows[: 6 * test_growing.SHARD]}
  with open_writer(root) as writer:
    writer.write(0, site)
    children = start_job(workdir, *job, processes=2, devices=1)
    # Of windows of 2 shards, two are whole: 8 batches.
    step, deadline = checkpoints.folder(workdir) / '8', time.monotonic() + 120
    while not step.exists() and time.monotonic() < deadline:
      time.sleep(0.05)
    children[1].send_signal(signal.SIGTERM)
    said = end_job(children, 143, 143)
    assert 'waiting for the harvest: shard' in said[0]
    children = start_job(workdir, *job, processes=2, devices=1)
    writer.write(6 * test_growing.SHARD, {
      test_growing.SITE: rows[6 * test_growing.SHARD :]
    })  # fmt: skip
    said = end_job(children)
    assert 'going on from step 8' in said[0]
  assert checkpoints.find_step(workdir) == 20


@pytest.mark.slow
def test_members_in_two_processes_are_those_of_one(tmp_path, store):
  """Each process has its own two."""
  flags = [
    *flags_of(store), *mesh_flags(1, 2),
    '--config.mesh.member=2', '--config.train.rows=1280',
    # Ten rounds: the saves of several members are under way at once.
    '--config.train.save_rows=128',
  ]  # fmt: skip
  job, one = ['jumprelu.py:demo_members', *flags], tmp_path / 'one'
  done = run(one, *job, devices=4)
  assert done.returncode == 0, done.stderr
  end_job(start_job(tmp_path / 'two', *job, processes=2, devices=2))
  folders = sorted((one / 'members').iterdir())
  assert len(folders) == 4
  for there in folders:
    here = tmp_path / 'two' / 'members' / there.name
    assert metrics(here) == metrics(there)
    for a, b in zip(arrays(here), arrays(there), strict=True):
      np.testing.assert_array_equal(a, b)
