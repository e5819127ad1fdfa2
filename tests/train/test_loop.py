"""The whole job: it learns, resumes to the bit, and loads again."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from train_runs import (
  ROOT,
  SITE,
  command,
  config_of,
  overrides,
  planted_rows,
  run,
)

import sae_jax
from sae_jax.parallel.mesh import make_mesh
from sae_jax.store import reader
from sae_jax.store.create import write_arrays
from sae_jax.train import checkpoints, loop, state
from sae_jax.train import run as runs


def _metrics(workdir):
  """The lines of metrics.jsonl without the timings."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  keep = lambda k: not k.startswith('perf/')
  return [
    {k: v for k, v in json.loads(line).items() if keep(k)} for line in lines
  ]


def train(workdir, store, **more):
  """A run of topk.py:demo in this process."""
  loop.train(config_of('topk.py:demo', *overrides(store, **more)), str(workdir))


def _state(workdir):
  """Every array of the last checkpoint: SAE, optimiser, counters."""
  config = runs.read_config(workdir)
  with jax.set_mesh(make_mesh(1, 1)):
    step, abstract = (
      checkpoints.find_step(workdir),
      state.abstract_state(config),
    )
    found, meta = checkpoints.restore(workdir, step, abstract)
  assert meta['position'] == config.train.rows
  return jax.device_get(jax.tree.leaves(found))


@pytest.mark.smoke
@pytest.mark.parametrize('name', ['jumprelu', 'topk', 'batchtopk'])
def test_killed_at_random_it_ends_as_if_never_stopped(tmp_path, store, name):
  """SIGKILL, wherever it happens to be; then to the end."""
  flags = overrides(store)
  config = f'{name}.py:demo'
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  done = run(whole, config, *flags)
  assert done.returncode == 0, done.stderr
  env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': '8'}
  log = killed / 'metrics.jsonl'
  lines = lambda: len(log.read_bytes().splitlines()) if log.exists() else 0
  rng = np.random.default_rng()  # any moment must do
  saved = lambda: bool(checkpoints.kept_steps(killed))
  kills = 3 if name == 'jumprelu' else 1
  for n, target in enumerate(sorted(rng.integers(14, 40, kills))):
    child = subprocess.Popen(
      command(killed, config, *flags),
      env=env,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    # On a slow disk all may fall before the first save is written; the last
    # one must not, or nothing would be resumed.
    while child.poll() is None:
      if lines() >= target and (n < kills - 1 or saved()):
        break
      time.sleep(0.003)
    time.sleep(rng.uniform(0, 0.02))
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=60)
  done = run(killed, config, *flags)
  assert done.returncode == 0, done.stderr
  assert 'going on from step' in done.stderr
  assert _metrics(killed) == _metrics(whole)
  for a, b in zip(_state(killed), _state(whole), strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_same_run_on_every_mesh(tmp_path, store):
  """Same batches, same trajectory to tolerance, and a restart elsewhere."""
  flags = overrides(store)
  for mesh in ((1, 1), (2, 4)):
    more = [f'--config.mesh.data={mesh[0]}', f'--config.mesh.dict={mesh[1]}']
    done = run(tmp_path / f'{mesh[0]}', 'topk.py:demo', *flags, *more)
    assert done.returncode == 0, done.stderr
  one, eight = _metrics(tmp_path / '1'), _metrics(tmp_path / '2')
  assert len(one) == len(eight) == 40 + 5
  for a, b in zip(one, eight, strict=True):
    assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
  with jax.set_mesh(make_mesh(1, 8)):
    s = sae_jax.load(tmp_path / '2')
    assert {len(x.data) for x in s.W_dec.addressable_shards} == {8}


@pytest.mark.parametrize(
  'number, code',
  [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)],
)
def test_signals_save_and_the_next_start_goes_on(tmp_path, store, number, code):
  flags = overrides(store, **{'train.rows': 32_000, 'train.save_rows': 64_000})
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  # A shell's background jobs, and so their children, ignore SIGINT: undo it.
  heed = (
    'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); '
    'os.execv(sys.argv[1], sys.argv[1:])'
  )
  child = subprocess.Popen(
    [sys.executable, '-c', heed, *command(tmp_path, 'topk.py:demo', *flags)],
    env=env,
    stderr=subprocess.PIPE,
    text=True,
  )
  log = tmp_path / 'metrics.jsonl'
  while not log.exists() or len(log.read_bytes().splitlines()) < 5:
    assert child.poll() is None
    time.sleep(0.002)
  child.send_signal(number)
  _, stderr = child.communicate(timeout=60)
  assert child.returncode == code, stderr
  step = checkpoints.find_step(tmp_path)
  assert 0 < step < 500 and f'saved at step {step}' in stderr
  done = run(tmp_path, 'topk.py:demo', *flags)
  assert done.returncode == 0 and f'going on from step {step}' in done.stderr
  steps = [line['step'] for line in _metrics(tmp_path) if 'train/l0' in line]
  assert steps == list(range(1, 501))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['jumprelu', 'topk', 'batchtopk'])
def test_planted_atoms_are_recovered(tmp_path, name):
  """At least 90% of the planted atoms have a latent with cosine > 0.9."""
  rows, atoms = planted_rows(200_000, d=32, atoms=64, active=4)
  store = tmp_path / 'store'
  write_arrays(store, {SITE: rows}, rows_per_shard=8192, rows_per_block=128)
  # After as many rows as the others BatchTopK has the smaller error and 80% of
  # the atoms: its spare latents, which rarely die, still code sums of atoms.
  n = 4_500_000 if name == 'batchtopk' else 1_500_000
  more = {
    'sae.d_in': 32, 'sae.latents': 128, 'train.rows': n,
    'train.batch_rows': 1024, 'train.log_rows': 100_000,
    'train.save_rows': n, 'train.eval_rows': 500_000,
    'train.eval_size': 4096, 'loss.dead_rows': 50_000, 'loss.aux_k': 16,
    'loss.l0_coef': 0.02, 'optim.lr': 3e-3, 'act.theta': 0.3,
    'act.bandwidth': 0.2,
  }  # fmt: skip
  done = run(tmp_path / 'run', f'{name}.py:demo', *overrides(store, **more))
  assert done.returncode == 0, done.stderr
  s = sae_jax.load(tmp_path / 'run')
  cosine = np.abs(atoms @ np.asarray(s.W_dec).T).max(axis=1)
  last = _metrics(tmp_path / 'run')[-1]
  print(f'{name}: {(cosine > 0.9).mean():.3f} recovered, {last}')
  assert (cosine > 0.9).mean() >= 0.9
  assert last['eval/fvu'] < 0.2
  if name == 'batchtopk':  # by the saved threshold, on rows it has not seen
    assert last['eval/l0'] == pytest.approx(4, rel=0.1)
    held_out = planted_rows(4096, d=32, atoms=64, active=4, seed=7)[0]
    l0 = (np.asarray(s.encode(held_out)) != 0).sum(1).mean()
    assert l0 == pytest.approx(4, rel=0.1)


def test_load_gives_raw_units_and_the_newest_checkpoint(tmp_path, store):
  train(tmp_path, store, **{'optim.ema': 0.9})
  s = sae_jax.load(tmp_path)
  x = planted_rows(256, seed=5)[0]
  f = s.encode(x)
  assert f.shape == (256, 64) and (np.asarray(f) != 0).sum(1).max() <= 4
  error = ((x - s.decode(f)) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
  assert error < 0.8
  parts = {'ema': state.abstract_state(runs.read_config(tmp_path)).ema}
  ema = checkpoints.restore(tmp_path, 40, parts)[0]['ema']
  np.testing.assert_array_equal(s.W_enc, ema.W_enc)
  early = sae_jax.load(tmp_path, step=30)
  assert not np.array_equal(early.W_dec, s.W_dec)


def test_only_the_last_checkpoints_are_kept(tmp_path, store):
  train(tmp_path, store, **{'train.keep_rows': 20 * 64, 'train.keep': 1})
  kept = {p.name for p in (tmp_path / 'checkpoints').iterdir()}
  assert {name for name in kept if name.isdigit()} == {'20', '40'}


def test_a_loss_that_is_not_finite_stops_and_is_never_saved(tmp_path, store):
  """float32 overflows within steps at this rate; what is saved is finite.

  Going back and around the rows does not help, and so it stops.
  """
  flags = overrides(
    store, **{'optim.lr': 1e30, 'optim.warmup_rows': 0, 'train.save_rows': 64}
  )
  done = run(tmp_path, 'jumprelu.py:demo', *flags)
  assert done.returncode == 2, done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith('error: ') and 'optim.lr' in last
  assert 'again, after going back to step 1 ' in last
  for x in jax.tree.leaves(sae_jax.load(tmp_path)):
    assert np.isfinite(x).all()


@pytest.mark.parametrize('center', [True, False])
def test_the_normaliser_comes_from_the_store(tmp_path, store, center):
  """Unit mean squared norm over the first training shard, centred or not."""
  train(tmp_path, store, **{'train.rows': 64, 'sae.center': center})
  norm = sae_jax.load(tmp_path).norm_in
  rows = np.concatenate(
    [rows for rows, _ in reader.shard_blocks(store, SITE, range(2, 3))]
  )
  mean = rows.mean(0) if center else np.zeros(16)
  np.testing.assert_allclose(norm.mean, mean, rtol=1e-5)
  squared = ((rows - mean) ** 2).sum(1).mean()
  assert norm.scale == pytest.approx(np.sqrt(squared), rel=1e-5)


def test_tensorboard_shows_every_logged_step_of_a_resumed_run(tmp_path, store):
  """Read back with TensorBoard's own file format; x is rows."""
  event_pb2 = pytest.importorskip('tensorboardX.proto.event_pb2')
  train(tmp_path, store, **{'train.rows': 20 * 64})
  train(tmp_path, store, **{'train.resume': True})
  rows = []
  for file in sorted((tmp_path / 'tensorboard').iterdir()):
    for raw in _records(file.read_bytes()):
      event = event_pb2.Event.FromString(raw)
      if event.HasField('session_log'):  # readers drop what lies beyond
        rows = [r for r in rows if r < event.step]
      rows += [event.step for v in event.summary.value if v.tag == 'train/loss']
  assert rows == list(range(64, 2561, 64))


def _records(data):
  """The records of a TFRecord file: length, its crc, bytes, their crc."""
  at = 0
  while at < len(data):
    size = int.from_bytes(data[at : at + 8], 'little')
    yield data[at + 12 : at + 12 + size]
    at += 16 + size
