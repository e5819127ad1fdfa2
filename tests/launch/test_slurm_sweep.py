"""A study as a job array on a real Slurm."""

import subprocess
import sys
from pathlib import Path

import pytest
import slurm_jobs as jobs
import train_runs

sys.path.append(str(Path(__file__).parents[1] / 'sweep'))
import studies  # noqa: E402

from sae_jax.store.create import write_arrays  # noqa: E402
from sae_jax.sweep import study, tables  # noqa: E402

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(bool(jobs.why_not()), reason=jobs.why_not()),
]


@pytest.fixture
def cluster(tmp_path_factory):
  folder = tmp_path_factory.mktemp('slurm')  # sockets need a short path
  jobs.local_slurm('start', folder)
  yield folder
  jobs.local_slurm('stop', folder)


@pytest.fixture
def config(tmp_path):
  rows = train_runs.planted_rows(8 * 256)[0]
  write_arrays(
    tmp_path / 'store', {train_runs.SITE: rows}, rows_per_shard=256,
    rows_per_block=16, held_out_shards=2,
  )  # fmt: skip
  return studies.write_config(tmp_path / 'study.py', tmp_path / 'store')


def test_an_array_runs_what_is_missing_and_no_more(cluster, config, tmp_path):
  env, folder = jobs.environment(cluster, devices=1), tmp_path / 's'
  flags = ['--submit=slurm', '--points_per_job=2', '--slurm=--hold']

  def sweep():
    done = subprocess.run(
      studies.command(config, folder, *flags), env=env, cwd=tmp_path,
      capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr

  assert '2 jobs submitted' in sweep()
  assert '2 jobs are in the queue: nothing to submit' in sweep()
  arrays = jobs.slurm(env, 'squeue', '-h', '-o', '%F').split()
  assert len(set(arrays)) == 1
  jobs.slurm(env, 'scontrol', 'release', arrays[0])
  last = jobs.ended(env, f'{arrays[0]}_0', f'{arrays[0]}_1')
  said = ''.join(p.read_text() for p in (folder / 'slurm').glob('*.out'))
  assert [x['JobState'] for x in last] == ['COMPLETED'] * 2, said
  assert [p.state for p in tables.read(folder)[0]] == ['done'] * 4
  assert '4 of 4 points are done' in sweep()
  # A damaged point, and it alone, is submitted again.
  job = (folder / 'jobs').glob('*/job.json').__next__().parent
  (point, _) = study.read_job(job)['points']
  (job / 'members' / point['id'] / 'config.json').unlink()
  flags[-1] = '--slurm='
  assert '1 jobs submitted' in sweep()


def test_without_slurm_it_says_so(config, tmp_path):
  done = subprocess.run(
    studies.command(config, tmp_path / 's', '--submit=slurm'),
    env=studies.environment() | {'PATH': str(tmp_path)},
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 2 and 'no sbatch here' in done.stderr
