"""Studies that are run, killed, damaged, and run again."""

import contextlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import studies
from programs import program

from sae_jax.errors import UserError
from sae_jax.sweep import drive, grid, study, submit, tables
from sae_jax.sweep.search import Halving, TargetL0
from sae_jax.train.run import lock

pytestmark = pytest.mark.slow
LAUNCH = studies.ROOT / 'launch'


def opened(folder, config, points=studies.POINTS):
  return study.open_study(str(folder), config, grid.entries(config, points))


def go(s, **more):
  drive.drive(s, lambda: studies.MACHINE, LAUNCH, **more)


def attempts(s):
  return [study.read_job(j.folder)['attempts'] for j in study.jobs(s)]


def states(s):
  return [p.state for p in tables.read(s.folder)[0]]


@pytest.fixture(scope='module')
def finished(store, tmp_path_factory):
  """A study of four points that was run to its end in one job."""
  s = opened(tmp_path_factory.mktemp('studies') / 's', studies.base(store))
  go(s)
  return s


@pytest.fixture
def copy(finished, tmp_path):
  """The same, to damage."""
  shutil.copytree(finished.folder, tmp_path / 's')
  return finished._replace(folder=tmp_path / 's')


def test_all_points_are_trained_once_in_one_job(finished):
  assert states(finished) == ['done'] * 4
  assert [a['points'] for a in attempts(finished)[0]] == [4]
  go(finished)  # nothing is left to do
  assert len(attempts(finished)[0]) == 1
  assert drive.failures(finished) == []


def test_tables_have_the_flops_rows_and_seconds_of_each(finished):
  points, marks = tables.read(finished.folder)
  assert len(marks) == 4 * 5  # before the first step, and every fifth
  for p in points:
    assert p.flops == 20 * 12 * 64 * 16 * p.latents
    assert p.rows_done == p.rows == 1280 and p.k == 2
    assert 0 < p.fvu < 1 and p.l0 == pytest.approx(2, abs=0.1)
    assert p.fvu == [m.fvu for m in marks if m.point == p.point][-1]
    assert json.loads(p.changes)['sae.latents'] == p.latents
  (job,) = study.jobs(finished)
  lines = study.read_metrics(job.run(job.specs[0]))
  logged = [m for m in lines if 'perf/step_ms' in m]
  took = sum(5 * m['perf/step_ms'] for m in logged) / 1e3
  took *= 20 / (5 * len(logged))  # the first stretch has no time
  shares = [p.seconds for p in points]
  assert sum(shares) == pytest.approx(took, rel=0.3)
  pace = [p.seconds / p.flops_executed for p in points]
  assert pace == pytest.approx([pace[0]] * 4)


def test_a_grid_may_grow_but_not_become_another(copy, store):
  more = (*studies.POINTS, {'act.k': 4})
  s = opened(copy.folder, copy.base, more)
  go(s)
  assert states(s) == ['done'] * 5
  assert [a['points'] for (a,) in attempts(s)] == [4, 1]
  with pytest.raises(UserError, match='of another sweep: 1 of its points'):
    opened(copy.folder, copy.base, more[1:])
  other = studies.base(store, **{'optim.b2': 0.99})
  with pytest.raises(UserError, match='another sweep: config.optim.b2 differs'):
    opened(copy.folder, other, more)
  (copy.folder / 'study.json').write_text('{')
  with pytest.raises(UserError, match='not JSON'):
    opened(copy.folder, copy.base, more)


def test_folders_that_are_no_study(store, tmp_path):
  half = tmp_path / 'new' / 'study.json.1.tmp'  # killed while it was made
  half.parent.mkdir()
  half.write_text('{')
  opened(half.parent, studies.base(store))
  (tmp_path / 'notes.txt').write_text('mine')
  with pytest.raises(UserError, match='not empty and holds no study'):
    opened(tmp_path, studies.base(store))
  with pytest.raises(UserError, match='launch/sweep.py'):
    tables.read(tmp_path)


@pytest.mark.parametrize(
  'damage', ['config', 'config is a list', 'checkpoints', 'metrics', 'gone']
)
def test_a_corrupt_point_alone_is_trained_again(copy, damage, caplog):
  (job,) = study.jobs(copy)
  run = job.run(job.specs[1])
  before = tables.read(copy.folder)[0][1]
  match damage:
    case 'config':
      (run / 'config.json').write_text('{"seed": 1')
    case 'config is a list':
      (run / 'config.json').write_text('[]')
    case 'checkpoints':
      for record in run.glob('checkpoints/*/meta/record.json'):
        record.write_text('{}')
    case 'metrics':
      (run / 'metrics.jsonl').write_bytes(b'\xff\n')
    case 'gone':
      shutil.rmtree(run)
  go(copy)
  assert f'point {job.specs[1].id}' in caplog.text
  assert 'is corrupt' in caplog.text and 'trained again' in caplog.text
  assert [a['points'] for a in attempts(copy)[0]] == [4, 1]
  after = tables.read(copy.folder)[0][1]
  assert after.state == 'done'
  assert after.fvu == pytest.approx(before.fvu, rel=1e-4)
  if damage != 'gone':
    assert (run.parent / f'{run.name}.corrupt-1').is_dir()


def test_a_damaged_checkpoint_costs_what_came_after_the_one_before(
  copy, caplog
):
  (job,) = study.jobs(copy)
  run = job.run(job.specs[1])
  (run / 'checkpoints' / '20' / 'meta' / 'record.json').write_text('{}')
  assert study.state(run, job.specs[1].config, True) == 'open'
  go(copy)
  assert 'goes on from the one before' in caplog.text
  assert [a['points'] for a in attempts(copy)[0]] == [4, 1]
  assert states(copy) == ['done'] * 4
  assert 'going on from step 15' in (job.folder / 'log.txt').read_text()


def test_the_others_go_on_together_when_one_begins_anew(copy):
  (job,) = study.jobs(copy)
  first, *others = job.specs
  record = study.read_job(job.folder)
  record['done'], record['alone'] = [], {s.id: 0 for s in job.specs}
  study.write_job(job.folder, record)
  shutil.rmtree(job.run(first))
  for spec in others:
    last = job.run(spec) / 'checkpoints' / '20' / 'meta' / 'record.json'
    last.write_text('{}')
  go(copy)
  assert states(copy) == ['done'] * 4
  assert [a['points'] for a in attempts(copy)[0]] == [4, 3, 1]
  assert not any(a['failed'] for a in attempts(copy)[0])
  assert 'going on from step 15' in (job.folder / 'log.txt').read_text()
  # Their time is that of the job again.
  assert study.read_job(job.folder)['alone'] == {first.id: 0}


def test_points_that_were_planned_for_more_devices(copy, monkeypatch):
  config = studies.base(copy.base.store.path, **{'mesh.dict': 16})
  (job,) = study.jobs(copy)
  shutil.rmtree(job.run(job.specs[0]))
  s = copy._replace(base=config)
  before = (job.folder / 'job.json').read_text()
  with pytest.raises(UserError, match='16 devices, there are 8'):
    go(s)
  assert (job.folder / 'job.json').read_text() == before
  go(s, only=job.id)  # such as a task of a Slurm array: it is not tried again
  failed = study.read_job(job.folder)['failed']
  assert list(failed) == [job.specs[0].id]
  assert '16 devices, there are 8' in failed[job.specs[0].id]
  study.write_job(job.folder, json.loads(before))
  changes = job.specs[1].changes | {'mesh.dict': 1, 'seed': 9}
  study.add_jobs(s, [[job.specs[1]._replace(id='fits', changes=changes)]])
  ran = lambda r: sys.exit(f'ran {r.job.id}')
  monkeypatch.setattr(drive.run_job, 'run', ran)
  with pytest.raises(SystemExit, match='ran fits'):  # it keeps no other back
    go(s)


def test_one_job_at_a_time_on_a_machine(copy, monkeypatch):
  (job,) = study.jobs(copy)
  shutil.rmtree(job.run(job.specs[0]))
  ran = mock.Mock(side_effect=SystemExit('ran'))
  monkeypatch.setattr(drive.run_job, 'run', ran)
  with study.claim(drive.machine_folder(copy)), asked_to_stop():
    with pytest.raises(SystemExit, match='143'):
      go(copy)
    with pytest.raises(SystemExit, match='ran'):
      go(copy, only=job.id)  # whoever names a job has room for it
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '1')  # another share of it
    with pytest.raises(SystemExit, match='ran'):
      go(copy)


def test_a_point_that_fails_is_reported_and_stops_no_other(store, tmp_path):
  points = [{}, {'optim.lr': 1e38}, {'sae.latents': 64}]
  config = studies.write_config(tmp_path / 'study.py', store, points)
  done = studies.run(config, tmp_path / 's')
  assert done.returncode == 2, done.stderr
  (line,) = [x for x in done.stderr.splitlines() if x.startswith('error: ')]
  assert '1 points of' in line and 'optim.lr=1e+38' in line
  assert '--retry_failed' in line
  points, _ = tables.read(tmp_path / 's')
  assert [p.state for p in points] == ['done', 'failed', 'done']
  assert 'not finite' in points[1].reason
  before = [p.fvu for p in points]
  again = studies.run(config, tmp_path / 's')
  assert again.returncode == 2
  (job,) = (tmp_path / 's' / 'jobs').iterdir()
  ran = lambda: [
    a['points'] for a in study.read_job(job)['attempts'] if 'points' in a
  ]
  assert ran() == [3, 1, 1, 1]
  assert studies.run(config, tmp_path / 's', '--retry_failed').returncode == 2
  assert ran() == [3, 1, 1, 1, 1]  # it alone
  assert [p.fvu for p in tables.read(tmp_path / 's')[0]] == before


def start(config, folder, *flags, **env):
  return subprocess.Popen(
    studies.command(config, folder, *flags), env=studies.environment() | env,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip


def until_saved(folder, seconds=120):
  """Waits for a checkpoint of any point."""
  over = time.monotonic() + seconds
  while time.monotonic() < over:
    if any(folder.glob('jobs/*/members/*/checkpoints/*/meta')):
      return
    time.sleep(0.05)
  raise AssertionError('nothing was saved')


LONG = {
  f'train.{key}_rows': steps * 64
  for key, steps in (('eval', 500), ('save', 50), ('log', 50))
} | {'train.rows': 1000 * 64}


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_killed_goes_on(store, tmp_path, number):
  config = studies.write_config(tmp_path / 'study.py', store, **LONG)
  folder = tmp_path / 's'
  first = start(config, folder)
  until_saved(folder)
  first.send_signal(number)
  said = first.communicate(timeout=120)[0]
  assert first.returncode == {15: 143, 9: -9}[int(number)], said
  (job,) = (folder / 'jobs').iterdir()
  # Killed, its child goes on, and keeps the job.
  (machine,) = (folder / 'machines').iterdir()
  goes_on = number == signal.SIGKILL
  assert study.is_taken(job) == study.is_taken(machine) == goes_on
  second = studies.run(config, folder)
  assert second.returncode == 0, second.stderr
  points, _ = tables.read(folder)
  assert [p.state for p in points] == ['done'] * 4
  log = next(folder.glob('jobs/*/log.txt')).read_text()
  assert log.count('going on from step') == (number == signal.SIGTERM)


def test_two_drivers_do_not_run_a_point_twice(store, tmp_path):
  config = studies.write_config(tmp_path / 'study.py', store)
  folder = tmp_path / 's'
  both = [  # as on two machines
    start(config, folder, '--points_per_job=2', SLURM_JOB_ID=str(i))
    for i in range(2)
  ]
  said = [p.communicate(timeout=240)[0] for p in both]
  assert [p.returncode for p in both] == [0, 0], said
  jobs = list((folder / 'jobs').iterdir())
  assert [len(study.read_job(j)['attempts']) for j in jobs] == [1, 1]
  assert [p.state for p in tables.read(folder)[0]] == ['done'] * 4


def test_searches_run_their_trials_first(store, tmp_path):
  search = 'Halving((1e-4, 3e-3), rows=320, eta=2)'
  config = tmp_path / 'study.py'
  studies.write_config(config, store, [{'optim.lr': 'HERE'}])
  config.write_text(config.read_text().replace("'HERE'", search))
  done = studies.run(config, tmp_path / 's')
  assert done.returncode == 0, done.stderr
  points, _ = tables.read(tmp_path / 's')
  assert [p.stage for p in points] == ['trial', 'trial', 'trial', 'grid'][
    -len(points) :
  ]
  assert points[-1].rows == 1280
  trials = {p.lr: p.fvu for p in points if p.stage == 'trial' and p.rows == 320}
  assert points[-1].lr == pytest.approx(min(trials, key=trials.get))


def test_a_damaged_trial_does_not_stop_a_study(store, tmp_path):
  config = studies.base(store)
  lrs = Halving((1e-4, 3e-3), rows=320, eta=2)
  points = [{'optim.lr': lrs}, {'optim.lr': lrs, 'sae.latents': 64}]
  s = opened(tmp_path / 's', config, points[:1])
  go(s)
  (trial, point) = study.jobs(s)
  (trial.run(trial.specs[0]) / 'metrics.jsonl').write_bytes(b'5\n\xff')
  tables.read(s.folder)  # says what it can
  s = opened(tmp_path / 's', config, points)
  go(s)
  assert states(s) == ['done'] * 6
  assert [len(a) for a in attempts(s)] == [2, 1, 1, 1]


def test_points_that_share_trials_share_them(store, tmp_path):
  config = studies.base(store, **{'act.name': 'jumprelu'})
  points = [
    {'loss.l0_coef': TargetL0(l0, low=1e-3, high=1e-1)} for l0 in (2, 4)
  ]
  s = study.Study(tmp_path / 's', config, grid.entries(config, points))
  assert [x.stage for x in drive.wanted(s)] == ['trial'] * 3
  same = [*points, {'loss.l0_coef': 1e-3}]  # the first trial of both
  s = s._replace(entries=grid.entries(config, same))
  assert sorted(x.stage for x in drive.wanted(s)) == ['grid'] + ['trial'] * 2


def test_evaluations_that_were_cut_off_are_made_up(copy, tmp_path):
  # Stands for the evaluation with a language model.
  program = tmp_path / 'evaluate.py'
  program.write_text(
    'import json, sys\n'
    'for run in sys.argv[1:]:\n'
    "  figures = {'figures': {'delta_loss': 0.5}}\n"
    "  open(run + '/evaluation.json', 'w').write(json.dumps(figures))\n"
  )

  def after(runs):
    left = [str(r) for r in runs if not tables.evaluation(r)]
    return [str(program), *left] if left else []

  go(copy, after=after)
  assert [p.delta_loss for p in tables.read(copy.folder)[0]] == [0.5] * 4
  (job,) = study.jobs(copy)
  (job.run(job.specs[2]) / 'evaluation.json').write_text('{"fig')
  go(copy, after=after)
  assert [p.delta_loss for p in tables.read(copy.folder)[0]] == [0.5] * 4
  assert len(attempts(copy)[0]) == 1  # nothing was trained for it
  program.write_text('raise SystemExit(3)')
  (job.run(job.specs[2]) / 'evaluation.json').unlink()
  go(copy, after=after)  # tried once, and ends


def test_delta_losses_are_of_the_same_sequences(tmp_path):
  def evaluated(sequences=16, record=None, **figures):
    record = {'figures': figures, 'held_out_sequences': 40} | (record or {})
    (tmp_path / 'evaluation.json').write_text(json.dumps(record))
    return tables.evaluated(tmp_path, sequences)

  assert not tables.evaluated(tmp_path, 16)
  assert evaluated(record={'sequences': 16}, delta_loss=0.5)
  assert evaluated(64, {'sequences': 40}, delta_loss=0.5)  # all there are
  assert not evaluated(record={'sequences': 0}, fvu=0.1)  # --nolm
  assert not evaluated(32, {'sequences': 16}, delta_loss=0.5)
  assert not evaluated(record={'sequences': 64}, delta_loss=0.5)
  assert not evaluated(record={'figures': [1]})
  with program('launch/sweep.py') as sweep:
    sweep._SEQUENCES = mock.Mock(value=16)
    assert sweep.evaluation([tmp_path])[-1] == f'--workdir={tmp_path}'
    assert evaluated(record={'sequences': 16}, delta_loss=0.5)
    assert sweep.evaluation([tmp_path]) == []


def test_what_failed_is_tried_again_together(copy, store, tmp_path):
  (job,) = study.jobs(copy)
  record = study.read_job(job.folder)
  record['failed'] = {spec.id: 'the disk was full' for spec in job.specs}
  record['done'] = []
  record['attempts'][-1]['failed'] = True
  study.write_job(job.folder, record)
  for spec in job.specs:
    shutil.rmtree(job.run(spec))
  assert len(drive.failures(copy)) == 4 and drive.failures(copy, 'other') == []
  assert submit.missing(copy, False, lambda runs: []) == []
  go(copy)
  assert states(copy) == ['failed'] * 4
  assert len(submit.missing(copy, True, lambda runs: [])) == 1  # forgiven
  go(copy)
  assert states(copy) == ['done'] * 4
  assert attempts(copy)[0][-1]['points'] == 4
  # A sweep without a point that failed is the same study.
  record = study.read_job(job.folder)
  record['failed'] = {job.specs[0].id: 'no'}
  study.write_job(job.folder, record)
  fewer = opened(copy.folder, copy.base, studies.POINTS[1:])
  assert len(drive.failures(copy)) == 1 and drive.failures(fewer) == []


def test_a_trial_that_is_the_point_stands_for_it(copy):
  (job,) = study.jobs(copy)
  run = job.specs[2].id  # was to find a value for another
  record = study.read_job(job.folder)
  record['points'][2]['stage'] = 'trial'
  study.write_job(job.folder, record)
  manifest = study.read_study(copy.folder)
  del manifest['grid'][run]
  (copy.folder / 'study.json').write_text(json.dumps(manifest))
  search = {'sae.latents': 64, 'optim.lr': Halving((1e-3,), rows=1280)}
  points = [*(studies.POINTS[i] for i in (0, 1, 3)), search]
  asked = []
  for _ in range(2):
    s = opened(copy.folder, copy.base, points)
    assert len(drive.wanted(s)) == 4
    go(s, after=lambda runs: asked.append([r.name for r in runs]) or [])
  assert [len(a) for a in attempts(s)] == [1]
  assert states(s) == ['done'] * 4 and run in asked[-1]
  assert {p.stage for p in tables.read(s.folder)[0]} == {'grid'}
  with pytest.raises(UserError, match='1 of its points are not in this one'):
    opened(copy.folder, copy.base, points[:3])


def test_tables_are_of_the_grid(copy):
  (job,) = study.jobs(copy)
  record = study.read_job(job.folder)
  lost, trial, *_ = [spec.id for spec in job.specs]
  record |= {'done': [], 'failed': {lost: 'no', trial: 'no'}}  # run by hand
  study.write_job(job.folder, record)
  more = [
    {'seed': 1, 'optim.lr': Halving((1e-3,), rows=1280)},
    {'seed': 1, 'optim.lr': Halving((1e-3,), rows=640)},
  ]
  s = opened(copy.folder, copy.base, [*studies.POINTS[1:], *more])
  drive.plan(s, lambda: studies.MACHINE, 0)
  points = {p.point: p for p in tables.read(s.folder)[0]}
  got = [(points[e.id].state, points[e.id].reason) for e in s.entries]
  assert got == [
    ('failed', 'no'), ('done', ''), ('done', ''),
    ('failed', 'optim.lr: all trials of 1 values failed'),
    ('missing', 'its trials have not ended'),
  ]  # fmt: skip
  assert lost not in points and len(points) == 6  # and a trial
  (first, _) = submit.missing(s, True, lambda runs: [])
  assert study.read_job(first.folder)['failed'] == {lost: 'no'}


@contextlib.contextmanager
def asked_to_stop():
  """As soon as it waits."""
  asked = itertools.chain([0, 0], itertools.repeat(15))

  @contextlib.contextmanager
  def signals():
    yield lambda: next(asked)

  with mock.patch.object(drive, 'stop_signals', signals):
    yield


def test_a_job_that_is_run_by_hand_is_left_alone(copy):
  (job,) = study.jobs(copy)
  assert (job.folder / 'config.json').exists()
  shutil.rmtree(job.run(job.specs[0]))
  with lock(job.folder), asked_to_stop():
    assert submit.missing(copy, False, lambda runs: []) == []
    with pytest.raises(SystemExit) as stopped:
      go(copy)
  assert stopped.value.code == 143
  assert not job.run(job.specs[0]).exists()


def test_time_alone_is_a_points_own(copy):
  points = {p.point: p for p in tables.read(copy.folder)[0]}
  (job,) = study.jobs(copy)
  record = study.read_job(job.folder)
  first = job.specs[0].id
  record['alone'] = {first: 15}  # of 20 steps
  study.write_job(job.folder, record)
  after = {p.point: p for p in tables.read(copy.folder)[0]}
  total = sum(p.seconds for p in points.values())
  assert points[first].seconds < after[first].seconds < total
  others = [id for id in points if id != first]
  assert all(after[id] == points[id] for id in others)
  assert after[first].members == 4
  record['alone'][first] = 0
  study.write_job(job.folder, record)
  assert [p.members for p in tables.read(copy.folder)[0]] == [1, 4, 4, 4]


def test_dry_run_writes_nothing(store, tmp_path):
  config = studies.write_config(tmp_path / 'study.py', store)
  done = studies.run(config, tmp_path / 's', '--dry_run')
  assert done.returncode == 0, done.stderr
  assert '4 points to train in 1 jobs' in done.stdout
  total = 20 * 12 * 64 * 16 * (2 * 32 + 2 * 64)
  assert f'{total:.3g} FLOPs' in done.stdout and 'GiB' in done.stdout
  assert 'about' in done.stdout and not (tmp_path / 's').exists()


def test_printed_commands_run_their_jobs(store, tmp_path):
  config = studies.write_config(tmp_path / 'study.py', store)
  done = studies.run(
    config, tmp_path / 's', '--submit=print', '--points_per_job=2'
  )
  lines = done.stdout.splitlines()
  assert len(lines) == 2 and all('--job=' in line for line in lines), done
  subprocess.run(lines[1], shell=True, check=True, env=studies.environment())
  assert states_of(tmp_path / 's') == ['done', 'done', 'missing', 'missing']
  again = studies.run(config, tmp_path / 's', '--submit=print')
  assert again.stdout.splitlines() == [
    lines[0].replace(' --points_per_job=2', '')
  ]
  wrong = studies.run(config, tmp_path / 's', '--job=none')
  assert wrong.returncode == 2 and 'has no such job' in wrong.stderr


def test_commands_of_jobs_have_the_other_flags_only():
  given = [
    '--config=a.py', '--submit', 'slurm', '--workdir', 'slurm', '--nodry_run',
    '--slurm', '--gpus=1', '--retry_failed', '--sequences=0', '--slurm=--x=1',
  ]  # fmt: skip
  with program('launch/sweep.py') as sweep:
    kept = sweep.inherited(given)
  assert kept == ['--config=a.py', '--workdir', 'slurm', '--sequences=0']


def states_of(folder):
  return sorted(p.state for p in tables.read(folder)[0])
