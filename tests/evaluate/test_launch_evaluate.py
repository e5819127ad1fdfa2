"""launch/evaluate.py as users run it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BAD = {
  'no folder': (['--workdir='], ['workdir']),
  'no run': (['--workdir=/nowhere'], ['/nowhere/config.json', '--workdir']),
  'no checkpoint': (['--workdir={run}_empty'], ['no checkpoint', '_empty']),
  'no store': (['--store_path=/nowhere'], ['store at /nowhere', 'harvest']),
  'no model': (['--model_path=/nowhere'], ["'/nowhere'", '--lm=false']),
  'no GGUF': ([], ['model.gguf', 'not a GGUF']),
  'count': (['--rows=0'], ['--rows=0', 'at least 1']),
  'type': (['--rows=many'], ['rows', 'many']),
  'flag': (['--sequence=3'], ["'sequence'"]),
}


def start(run_dir, *flags):
  workdir = (
    [] if any('workdir' in f for f in flags) else [f'--workdir={run_dir}']
  )
  command = [sys.executable, str(ROOT / 'launch' / 'evaluate.py')]
  return subprocess.Popen(
    [*command, *workdir, *(f.format(run=run_dir) for f in flags)],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_2(run_dir):
  empty = Path(f'{run_dir}_empty')
  shutil.copytree(run_dir, empty, ignore=lambda *_: ['checkpoints'])
  before = sorted(run_dir.iterdir())
  for some in zip(*[iter(BAD)] * 3, strict=True):  # three at a time
    children = {case: start(run_dir, *BAD[case][0]) for case in some}
    for case, child in children.items():
      _, err = child.communicate(timeout=300)
      assert child.returncode == 2, (case, err)
      assert err.startswith('error: ') and err.count('\n') == 1, (case, err)
      for word in BAD[case][1]:
        assert word in err, (case, err)
  assert sorted(run_dir.iterdir()) == before


def test_a_table_and_a_page(run_dir):
  child = start(run_dir, '--lm=false', '--model_path=/nowhere', '--contexts=2')
  out, err = child.communicate(timeout=300)
  assert child.returncode == 0, err
  fvu = json.loads((run_dir / 'evaluation.json').read_text())['figures']['fvu']
  assert f'{fvu:.4f}' in out and f'{run_dir}/report.html' in out
  assert "no file '/nowhere'" in err
