"""launch/harvest.py: bad input ends with one line and exit code 2."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(*arguments):
  return subprocess.run(
    [sys.executable, 'launch/harvest.py', *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=None,
  )


def test_bad_input(tmp_path):
  text = tmp_path / 'text'
  text.mkdir()
  (text / 'a.txt').write_bytes(b'good text\xff')
  store = tmp_path / 'store'
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'notes').write_text('mine')
  base = [
    '--config=configs/harvest.py:tiny',
    f'--config.store.path={store}',
    f'--config.text.path={text}',
  ]
  cases = [
    ([*base], f'{text}/a.txt: not UTF-8 at byte 9'),
    ([*base, '--config.harvest.row=5'], 'rows'),
    ([*base, '--config.harvest.rows=many'], 'many'),
    ([*base, '--config.store.dtype=int7'], 'did you mean'),
    ([*base, '--config.harvest.rows=5'], 'need at least'),
    (['--config=configs/harvest.py:huge'], 'use smollm2, tiny'),
    ([], '--config'),
    (
      [*base, f'--config.text.path={__file__}', '--config.model.path=/no.gguf'],
      '/no.gguf',
    ),
  ]
  with ThreadPoolExecutor(2) as pool:
    results = list(pool.map(lambda case: launch(*case[0]), cases))
  for (_, wanted), result in zip(cases, results, strict=True):
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith('error: ') and wanted in lines[-1], lines
    assert len(lines) == 1, lines
    assert 'Traceback' not in result.stderr + result.stdout
  assert not store.exists()
