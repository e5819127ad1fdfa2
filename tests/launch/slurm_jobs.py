"""A Slurm cluster of two nodes on this machine, for tests of launch/slurm/."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def why_not() -> str:
  """Why no cluster can be started here; '' where one can."""
  if os.getuid() != 0:
    return 'a Slurm cluster of our own needs root'
  needed = ('slurmctld', 'slurmd', 'munged', 'sbatch')
  missing = [name for name in needed if not shutil.which(name)]
  if missing:
    return f'no {missing[0]} here: scripts/slurm_local.sh install'
  return ''


def local_slurm(command: str, folder: Path) -> str:
  # One at a time looks for free ports and names its nodes.
  with open(Path(tempfile.gettempdir()) / 'sae_jax_slurm_tests', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = subprocess.run(
      ['bash', 'scripts/slurm_local.sh', command, str(folder)],
      cwd=ROOT,
      env=os.environ | {'CPUS': '16'},  # of a node: many jobs of bash at once
      capture_output=True,
      text=True,
      timeout=120,
    )
  assert done.returncode == 0, done.stderr + done.stdout
  return done.stdout


def environment(folder: Path, devices: int) -> dict[str, str]:
  return os.environ | {
    'SLURM_CONF': str(folder / 'slurm.conf'),
    'PYTHONPATH': str(ROOT),
    'PYTHON': sys.executable,
    'JAX_NUM_CPU_DEVICES': str(devices),
  }


def submit(env, *arguments) -> str:
  """The number of the job; its output goes to $OUT/slurm-<job>.out."""
  return slurm(env, 'sbatch', '--parsable', *arguments)


def slurm(env, *command) -> str:
  done = subprocess.run(
    list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, (command, done.stderr)
  return done.stdout.strip()


def state_of(env, job: str) -> dict[str, str]:
  """What scontrol says of a job, or of one task of an array (17_0)."""
  words = slurm(env, 'scontrol', 'show', 'job', '-o', job).split()
  return dict(word.partition('=')[::2] for word in words)


def until(condition, what: str, env=None, seconds: float = 120):
  """Waits for `condition()`; jobs that were requeued need not wait for the
  two minutes after which Slurm starts them again."""
  began = time.monotonic()
  while not (value := condition()):
    assert time.monotonic() - began < seconds, f'{seconds} s without {what}'
    waiting = env and slurm(
      env, 'squeue', '-h', '-r', '-t', 'PD', '-o', '%i %r'
    )
    for line in (waiting or '').splitlines():
      job, reason = line.split(maxsplit=1)
      if 'BeginTime' in reason:
        subprocess.run(
          ['scontrol', 'update', f'JobId={job}', 'StartTime=now'],
          env=env,
          capture_output=True,  # it may have started in between
        )
    time.sleep(0.2 if env else 0.02)
  return value


def ended(env, *jobs: str) -> list[dict[str, str]]:
  """The last states of jobs, once none of them is in the queue."""
  over = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL')
  look = lambda: [state_of(env, job) for job in jobs]
  done = lambda: (s := look()) and all(x['JobState'] in over for x in s) and s
  return until(done, f'an end of jobs {jobs}', env)


def kill_process(*words: str) -> None:
  """SIGKILL to the one Python process with these words in its command."""
  found = []
  for entry in Path('/proc').glob('[0-9]*'):
    try:
      command = (entry / 'cmdline').read_bytes().decode().split('\0')
    except OSError:  # ended meanwhile
      continue
    if command[0] == sys.executable and all(w in command for w in words):
      found.append(int(entry.name))
  assert len(found) == 1, (words, found)
  os.kill(found[0], signal.SIGKILL)
