"""scripts/bench_step.py and what it shares with the other libraries' side."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / 'scripts'
sys.path.insert(0, str(SCRIPTS))
import bench_step  # noqa: E402
import bench_vs_peers  # noqa: E402
import step_clock  # noqa: E402
from step_clock import Rows, Side  # noqa: E402

from sae_jax.parallel.mesh import make_mesh  # noqa: E402
from sae_jax.train.config import base_config  # noqa: E402
from sae_jax.train.state import init_state  # noqa: E402

TINY = ('--d=16', '--latents=128', '--k=4', '--batch=32', '--steps=2')

# Sum and sum of squares of planted_rows(4100, 16).
MOMENTS = (7732.820, 416661.931)


def bench(*options):
  path = os.pathsep.join(
    [str(SCRIPTS.parent), os.environ.get('PYTHONPATH', '')]
  )
  return subprocess.run(
    [sys.executable, SCRIPTS / 'bench_step.py', *TINY, '--skip=1', *options],
    env=os.environ | {'PYTHONPATH': path}, capture_output=True, text=True,
  )  # fmt: skip


def test_planted_rows_are_those_of_earlier_figures():
  rows = step_clock.planted_rows(4100, 16)
  assert rows.dtype == np.float32
  moments = np.float64(rows).sum(), np.square(rows, dtype=np.float64).sum()
  assert np.allclose(moments, MOMENTS, rtol=1e-5)


def test_batches_follow_one_another_and_begin_again():
  a = argparse.Namespace(batch=4)
  rows = Rows(np.arange(10.0)[:, None], 10)
  starts = [int(step_clock.batch(a, rows, i)[0, 0]) for i in range(4)]
  assert starts == [0, 4, 1, 5]  # i * 4 mod 7


def test_held_out_figures(monkeypatch):
  monkeypatch.setattr(step_clock, 'HELD_OUT', 3)
  x = np.float32([[9, 9], [0, 0], [2, 0], [4, 0]])
  half = lambda x: (np.where(x > 0, x, 0), 0.5 * x)
  side = Side(lambda x: x, lambda i, x: None, half)
  fvu, l0 = step_clock.held_out(Rows(x, 1), side, latents=2)
  assert fvu == pytest.approx((1 + 4) / (4 + 4))
  assert l0 == pytest.approx(2 / 3)


def test_one_line_of_json_jumprelu_at_its_l0(tmp_path):
  rows = tmp_path / 'rows.npy'
  np.save(rows, step_clock.planted_rows(32 * 3 + 8192, 16))
  done = bench('--activation=jumprelu', f'--rows={rows}')
  assert not done.returncode, done.stderr
  (line,) = done.stdout.splitlines()
  found = json.loads(line)
  assert 3.5 < found['l0_start'] <= 4
  assert found['steps'] == 3 and found['rows_per_s'] > 0
  assert found['copy_gb_per_s'] > 0 and found['ratio'] > 0
  assert 0 < found['fvu'] < 10


def test_thresholds_are_a_quantile_of_the_whole_batch(monkeypatch):
  monkeypatch.setattr(bench_step, 'AT_ONCE', 5 * 128)  # 5 rows of 32 at once
  config = base_config()
  config.sae.d_in, config.sae.latents, config.act.k = 16, 128, 4
  x = step_clock.planted_rows(32, 16)
  norm = bench_step.norm_of(Rows(x, 32))
  with jax.set_mesh(make_mesh(1, 1)):
    bench_step.calibrated(config, norm, x, 0.1)
    sae = jax.jit(lambda norm: init_state(config, norm).sae)(norm)
    z = np.asarray(sae.pre(sae.norm_in(x)))
  n = np.asarray(norm(x))
  assert np.square(n).sum() / 32 == pytest.approx(1, rel=1e-4)
  assert np.abs(n.mean(0)).max() < 1e-5
  theta = config.act.theta
  assert 4 * 32 - 2 <= (z > theta).sum() <= 4 * 32  # rounding of z
  assert config.act.bandwidth == pytest.approx(0.1 * theta)


def test_a_mistake_in_the_config_is_one_line():
  done = bench('--compute_dtype=int3')
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and "did you mean 'float32'" in line


@pytest.mark.parametrize(
  'option, said',
  [
    ('--threads=99999', '--threads=99999: this process may use 1 to'),
    ('--rows=nothing.npy', '--rows=nothing.npy: there is no such file'),
    ('--rows=wide.npy', 'its shape is (9000, 3), not [n, --d=16]'),
    ('--rows=short.npy', '8200 rows, a batch and the 8192 held out are 8224'),
    ('--batch=0', '--batch=0: must be at least 1'),
  ],
)
def test_mistakes(option, said, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  np.save('wide.npy', np.zeros((9000, 3), np.float32))
  np.save('short.npy', np.zeros((8200, 16), np.float32))
  monkeypatch.setattr(sys, 'argv', ['bench_step.py', *TINY, option])
  with pytest.raises(SystemExit, match='2'):
    step_clock.begin(step_clock.options(''))
  assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_peer_that_fails_is_a_line_of_the_table():
  of = lambda **more: {'work': 'w', 'against': 'sparsify', 'pair': 0} | more
  figures = {'step_ms': 10.0, 'fvu': 0.5, 'l0': 4.0, 'peak_mib': 512}
  ours = of(mkl=False, peer='sae_jax', version='1', **figures)
  theirs = {'peer': 'sparsify', 'version': '9', 'torch': '2', **figures}
  slower = of(mkl=False) | theirs | {'step_ms': 25.0}
  with pytest.raises(MemoryError) as caught, step_clock.during('step 3'):
    raise MemoryError
  (note,) = caught.value.__notes__
  ended = f'Traceback\nRuntimeError: no room\n  stack\n{note}\n'
  why = bench_vs_peers.reason(1, ended)
  failed = of(mkl=True, peer='sparsify', failed=why)
  lines = bench_vs_peers.table([ours, slower, ours | {'mkl': True}, failed])
  assert lines[2].startswith('| w | sparsify 9 | 2 | 10 | 25 | 2.50 | - | - |')
  (line,) = lines[3:]
  said = 'sparsify: exit code 1: RuntimeError: no room (during step 3, at most'
  assert line.startswith(f'| w | {said} ')


def test_a_process_that_cannot_have_its_memory_is_recorded():
  command = [
    sys.executable, SCRIPTS / 'peer_step.py', '--peer=saelens',
    '--memory_limit_gib=0.2', '--d=64', '--batch=2000000', '--steps=1',
  ]  # fmt: skip
  found = bench_vs_peers.result(command, {}, timeout=60)
  assert found['peer'] == 'saelens' and 'MemoryError' in found['failed']


def test_rows_that_are_not_there_are_refused_before_any_environment(tmp_path):
  done = subprocess.run(
    [sys.executable, bench_vs_peers.__file__, '--rows=/nowhere.npy',
     f'--peers={tmp_path / "peers"}'],
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith('error: --rows=/nowhere.npy')
  assert not (tmp_path / 'peers').exists()
