"""A short session of scripts/chaos.py: kills, restarts, the same bits."""

import os
import subprocess
import sys

import pytest
from train_runs import ROOT


@pytest.mark.slow
def test_a_job_that_is_struck_ends_with_the_bits_of_one_left_alone(tmp_path):
  done = subprocess.run(
    [
      sys.executable, str(ROOT / 'scripts' / 'chaos.py'), '--kills=2',
      f'--folder={tmp_path}', '--processes=2',
    ],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True, text=True, timeout=900,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr[-2000:]
  assert '2 blows' in done.stdout and 'the same bits' in done.stdout
