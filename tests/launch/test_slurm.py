"""launch/slurm/ on a real Slurm: killed and requeued jobs end the same."""

import json
import subprocess

import jax
import numpy as np
import pytest
import slurm_jobs as jobs
import train_runs

from sae_jax.parallel.mesh import make_mesh
from sae_jax.store.create import write_arrays
from sae_jax.train import checkpoints, state
from sae_jax.train import run as runs

tiny_hf = pytest.importorskip('tiny_hf')  # needs torch

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(bool(jobs.why_not()), reason=jobs.why_not()),
]


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
  folder = tmp_path_factory.mktemp('slurm')
  jobs.local_slurm('start', folder)
  yield folder
  jobs.local_slurm('stop', folder)


# Saves for a second after SIGTERM; done when started again.
SAVES = (
  'trap "echo got SIGTERM; sleep 1; echo saved; exit 143" TERM; '
  '(( SLURM_RESTART_COUNT )) && exit; '
  'echo begins; for i in {1..900}; do sleep 0.1; done'
)
# The shortest limit Slurm knows is a minute; its signal comes at once.
LIMIT = ('--time=1', '--signal=TERM@58')
AGAIN = 'back into the queue (restart 1)'

# What each of two tasks runs (a line of bash), options of sbatch, and what is
# wanted: the job's state and exit code, restarts, words in the output.
CASES = [
  # One task's mistake or bug outweighs what the others then end with.
  ('exit $(( SLURM_PROCID ? 75 : 2 ))', (), 'FAILED', '2:0', 0, ''),
  ('exit $(( SLURM_PROCID ? 2 : 143 ))', (), 'FAILED', '2:0', 0, ''),
  ('exit $(( SLURM_PROCID ? 75 : 1 ))', (), 'FAILED', '1:0', 0, ''),
  ('exit $(( SLURM_PROCID ? 1 : 134 ))', (), 'FAILED', '1:0', 0, ''),
  # A process that died, and another that noticed; then all is well.
  ('(( SLURM_RESTART_COUNT )) && exit; (( SLURM_PROCID )) && exit 75; '
   'kill -9 $$', (), 'COMPLETED', '0:0', 1, f'exit code 137: {AGAIN}'),
  ('exit 75', (), 'FAILED', '75:0', 1, 'after 1 restarts: given up'),
  (SAVES, LIMIT, 'COMPLETED', '0:0', 1, f'exit code 143: {AGAIN}'),
]  # fmt: skip


def submit_step(env, out, command, *options):
  """A job of two tasks that each run a line of bash."""
  script = f"""#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append
exec bash launch/slurm/step.sh bash -c '{command}'
"""
  out.with_suffix('.sbatch').write_text(script)
  return jobs.submit(
    env, f'--output={out}', *options, out.with_suffix('.sbatch')
  )


@pytest.fixture(scope='module')
def steps(cluster, tmp_path_factory):
  """The jobs of CASES with their outputs. Slurm looks at time limits twice a
  minute, so they run beside the other tests."""
  env = jobs.environment(cluster, devices=1) | {'SAE_MAX_RESTARTS': '1'}
  outs = [tmp_path_factory.mktemp('steps') / str(i) for i in range(len(CASES))]
  submitted = [
    submit_step(env, out, command, *options)
    for out, (command, options, *_) in zip(outs, CASES, strict=True)
  ]
  return submitted, outs


def test_cancelled_jobs_save_and_stay_cancelled(cluster, tmp_path):
  env, out = jobs.environment(cluster, devices=1), tmp_path / 'out'
  job = submit_step(env, out, SAVES)
  begun = lambda: out.exists() and out.read_text().count('begins') == 2
  jobs.until(begun, 'a start')
  jobs.slurm(env, 'scancel', job)
  (last,) = jobs.ended(env, job)
  said = out.read_text()
  assert said.count('saved') == 2 and 'left as it is' in said, said
  assert (last['JobState'], last['Restarts']) == ('CANCELLED', '0'), said


def harvest_flags(folder, store):
  return [
    '--config=configs/harvest.py:tiny', f'--config.model.path={folder}/model',
    f'--config.text.path={folder}/text', f'--config.store.path={store}',
    '--config.harvest.rows=20000', '--config.harvest.sequence_length=20',
    '--config.harvest.batch_sequences=8', '--config.store.rows_per_shard=256',
  ]  # fmt: skip


@pytest.fixture(scope='module')
def subject(tmp_path_factory):
  """A folder with a tiny model and a text."""
  folder = tmp_path_factory.mktemp('subject')
  tiny_hf.save(folder / 'model', tiny_hf.model_of('llama'))
  rng = np.random.default_rng(0)
  (folder / 'text').mkdir()
  for i in range(50):
    words = [f'w{n}' for n in rng.integers(3, 61, 1000)]
    (folder / 'text' / f'{i:03d}.txt').write_text(' '.join(words))
  return folder


def contents(store):
  """Every file of a store but its lock; who made it is left out."""
  files = {
    str(path.relative_to(store)): path.read_bytes()
    for path in store.rglob('*')
    if path.is_file() and path.name != 'lock'
  }
  manifest = json.loads(files['manifest.json'])
  del manifest['made_by']
  return files | {'manifest.json': json.dumps(manifest).encode()}


@pytest.mark.usefixtures('steps')
def test_array_harvest_with_a_killed_task(cluster, subject, tmp_path):
  env = jobs.environment(cluster, devices=1)
  flags = harvest_flags(subject, tmp_path / 'store')
  out = f'--output={tmp_path}/out-%a'
  script = 'launch/slurm/harvest.sbatch'
  job = jobs.submit(env, '--array=0-1', out, script, *flags)
  last = jobs.submit(
    env, f'--dependency=afterok:{job}', out, script, '--finalize', *flags
  )
  # The second task dies when it has written a shard and has more to write.
  record = tmp_path / 'store/records/shard-00003-of-00079.json'
  jobs.until(record.exists, 'a shard of task 1')
  jobs.kill_process('launch/harvest.py', '--config.task=1/2', flags[3])
  states = jobs.ended(env, f'{job}_0', f'{job}_1', last)
  said = (tmp_path / 'out-1').read_text()
  assert [s['JobState'] for s in states] == ['COMPLETED'] * 3, said
  assert [s['Restarts'] for s in states] == ['0', '1', '0'], said
  assert 'exit code 137: back into the queue (restart 1)' in said
  assert 'there already' in said.split('back into the queue')[1]

  whole = harvest_flags(subject, tmp_path / 'whole')
  subprocess.run(
    [env['PYTHON'], 'launch/harvest.py', *whole],
    cwd=jobs.ROOT,
    env=env,
    check=True,
    capture_output=True,
  )
  assert contents(tmp_path / 'store') == contents(tmp_path / 'whole')


def test_requeued_training_ends_as_if_never_stopped(cluster, tmp_path):
  """Two nodes with a process of two devices each; requeued in the middle."""
  write_arrays(
    tmp_path / 'store',
    {train_runs.SITE: train_runs.planted_rows(16 * 256)[0]},
    rows_per_shard=256,
    rows_per_block=16,
    held_out_shards=2,
  )
  flags = train_runs.overrides(
    tmp_path / 'store',
    **{
      'mesh.data': 2, 'mesh.dict': 2, 'train.rows': 64 * STEPS,
      'train.log_rows': 64 * 10, 'train.save_rows': 64 * STEPS,
      'train.eval_rows': 64 * 100,
    },
  )  # fmt: skip
  env = jobs.environment(cluster, devices=2)

  def submit(name):
    return jobs.submit(
      env, f'--output={tmp_path}/out-{name}', 'launch/slurm/train.sbatch',
      f'--workdir={tmp_path / name}', '--config=configs/topk.py:demo', *flags,
    )  # fmt: skip

  stopped = submit('stopped')
  log = tmp_path / 'stopped' / 'metrics.jsonl'
  lines = lambda: len(log.read_bytes().splitlines()) if log.exists() else 0
  jobs.until(lambda: lines() > 1, 'a step')
  jobs.slurm(env, 'scontrol', 'requeue', stopped)
  jobs.until(lambda: 'saved at step' in output(tmp_path, 'stopped'), 'a save')
  whole = submit('whole')
  states = jobs.ended(env, stopped, whole)
  said = output(tmp_path, 'stopped') + output(tmp_path, 'whole')
  assert [s['JobState'] for s in states] == ['COMPLETED'] * 2, said
  assert [s['Restarts'] for s in states] == ['1', '0'], said
  assert 'going on from step' in said
  assert metrics(tmp_path / 'stopped') == metrics(tmp_path / 'whole')
  for a, b in zip(
    arrays(tmp_path / 'stopped'), arrays(tmp_path / 'whole'), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_what_exit_codes_lead_to(cluster, steps):
  submitted, outs = steps
  states = jobs.ended(jobs.environment(cluster, devices=1), *submitted)
  for case, out, last in zip(CASES, outs, states, strict=True):
    said = out.read_text()
    found = last['JobState'], last['ExitCode'], int(last['Restarts'])
    assert found == case[2:5] and case[5] in said, (case, found, said)
  assert outs[-1].read_text().count('saved') == 2


STEPS = 300


def output(tmp_path, name):
  return (tmp_path / f'out-{name}').read_text()


def metrics(workdir):
  """The lines of metrics.jsonl without the timings."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [
    {k: v for k, v in row.items() if not k.startswith('perf/')} for row in rows
  ]


def arrays(workdir):
  """Every array of the last checkpoint: SAE, optimiser, counters."""
  config = runs.read_config(workdir)
  config.mesh.data = config.mesh.dict = 1
  with jax.set_mesh(make_mesh(1, 1)):
    assert checkpoints.find_step(workdir) == STEPS
    abstract = state.abstract_state(config)
    found, _ = checkpoints.restore(workdir, STEPS, abstract)
  return jax.device_get(jax.tree.leaves(found))
