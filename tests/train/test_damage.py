"""Checkpoints whose bytes changed, or that do not fit: never used."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_runs import overrides, run

import sae_jax
from sae_jax.models.sae import Norm
from sae_jax.parallel.mesh import P as Spec
from sae_jax.parallel.mesh import make_mesh
from sae_jax.train import checkpoints, integrity
from sae_jax.train import run as runs
from sae_jax.train.checkpoints import Checkpoints
from sae_jax.train.config import base_config
from sae_jax.train.state import abstract_state, init_state

D, F = 16, 64


def small_config(**more):
  config = base_config()
  config.sae.d_in, config.sae.latents = D, F
  config.optim.ema = 0.9
  config.update_from_flattened_dict(more)
  return config


def make_state(config, seed=0):
  norm = Norm(jnp.full(config.sae.d_in, 0.5), jnp.float32(2))
  config = config.copy_and_resolve_references()
  config.seed = seed
  return jax.jit(lambda norm: init_state(config, norm))(norm)


def write(folder, config, steps=(1, 2)):
  """Checkpoints of different states under `steps`; {step: its leaves}."""
  wrote = {}
  with Checkpoints(folder, 9, 0) as manager:
    for step in steps:
      state = make_state(config, step)
      manager.save(step, state, {'position': step, 'config': {}, 'store': ''})
      wrote[step] = jax.device_get(jax.tree.leaves(state))
  runs.write_config(folder, config)
  return wrote


def same(tree, leaves):
  got = jax.device_get(jax.tree.leaves(tree))
  return all(np.array_equal(a, b) for a, b in zip(got, leaves, strict=True))


def damages(raw, rng):
  """Everything that is done to a file's bytes; None removes it."""
  yield None
  for cut in (0, len(raw) // 2, len(raw) - 1):
    yield raw[:cut]
  for at in {0, len(raw) - 1, *rng.integers(0, len(raw), 6).tolist()}:
    flipped = bytearray(raw)
    flipped[at] ^= 1 << int(rng.integers(8))
    yield bytes(flipped)


def test_no_byte_can_change_unnoticed(tmp_path):
  """Every file: some bytes flipped, cut off, removed. Then the step before is
  used, or, where the byte means nothing, the very values that were saved."""
  config, rng = small_config(), np.random.default_rng(0)
  with jax.set_mesh(make_mesh(1, 2)):
    wrote = write(tmp_path, config)
    abstract = abstract_state(config)
    newest = tmp_path / 'checkpoints' / '2'
    files = sorted(p for p in newest.rglob('*') if p.is_file())
    noticed = set()
    for file in files:
      raw = file.read_bytes()
      for changed in damages(raw, rng):
        file.unlink() if changed is None else file.write_bytes(changed)
        step, state, record, damaged = checkpoints.newest(tmp_path, abstract)
        assert same(state, wrote[step]), (file, changed)
        assert record['position'] == step and set(damaged) == {1, 2} - {step, 1}
        if damaged:
          noticed.add(file.relative_to(newest).parts[0])
      file.write_bytes(raw)
    assert checkpoints.newest(tmp_path, abstract)[0] == 2
    assert noticed >= {'meta', 'state'}
    assert len(files) > 8


def test_bytes_that_the_libraries_take_for_good(tmp_path, monkeypatch):
  """Of flips in the arrays' own file, most decompress: the sums see them."""
  config, wrong = small_config(), 0
  wrote = write(tmp_path, config, [1])
  data = max(
    (tmp_path / 'checkpoints/1/state/ocdbt.process_0/d').iterdir(),
    key=lambda p: p.stat().st_size,
  )
  raw, abstract = data.read_bytes(), abstract_state(config)
  for at in range(50, len(raw), len(raw) // 40):
    flipped = bytearray(raw)
    flipped[at] ^= 4
    data.write_bytes(flipped)
    with monkeypatch.context() as patch:
      patch.setattr(integrity, 'differing', lambda *_: [])
      try:
        wrong += not same(checkpoints.restore(tmp_path, 1, abstract)[0],
                          wrote[1])  # fmt: skip
      except integrity.Damaged:
        continue
    try:
      assert same(checkpoints.restore(tmp_path, 1, abstract)[0], wrote[1])
    except integrity.Damaged as error:
      assert 'not the values' in str(error)
  assert wrong > 5


def test_sums_are_those_of_any_mesh_and_see_one_bit():
  rng = np.random.default_rng(0)
  leaves = {
    'a': rng.normal(size=(16, 24)).astype(np.float32),
    'b': rng.integers(0, 9, 16).astype(np.int32),
    'c': rng.random(16) < 0.5,
    'd': np.float32(3),
    'e': rng.normal(size=(2, 16, 7)).astype(jnp.bfloat16),
  }
  specs = dict(
    a=Spec('dict'), b=Spec('dict'), c=Spec(), d=Spec(), e=Spec(None, 'dict')
  )
  expected = np.asarray(integrity.sums(leaves))
  for mesh in ((1, 1), (1, 8), (2, 4)):
    with jax.set_mesh(make_mesh(*mesh)):
      placed = {k: jax.device_put(v, specs[k]) for k, v in leaves.items()}
      np.testing.assert_array_equal(integrity.sums(placed), expected)
  with jax.set_mesh(make_mesh(1, 8)):  # the last axis sharded, too
    wide = jax.device_put(leaves['a'], Spec(None, 'dict'))
    assert integrity.sums({'a': wide})[0] == expected[0]
  for i, name in enumerate(leaves):
    changed = leaves[name].copy().reshape(-1)
    changed.view(np.uint8)[-1] ^= 1
    found = integrity.sums(leaves | {name: changed.reshape(leaves[name].shape)})
    assert (np.asarray(found) != expected).tolist() == [
      i == j for j in range(5)
    ]
  rows = leaves['a'][::-1].copy()  # the same words in other places
  assert integrity.sums({'a': rows})[0] != expected[0]


def test_a_run_goes_on_from_the_step_before(tmp_path, store):
  """One line says so, the damaged files stay, the same parameters come out."""
  flags = overrides(store)
  whole, hurt = tmp_path / 'whole', tmp_path / 'hurt'
  assert run(whole, 'jumprelu.py:demo', *flags).returncode == 0
  shutil.copytree(whole, hurt)
  for file in (hurt / 'checkpoints/40/state').rglob('d/*'):
    if file.stat().st_size > 1000:
      file.write_bytes(file.read_bytes()[:-500])
  done = run(hurt, 'jumprelu.py:demo', *flags)
  assert done.returncode == 0, done.stderr
  said = [line for line in done.stderr.splitlines() if 'damaged' in line]
  assert len(said) == 1 and 'Traceback' not in done.stderr, done.stderr
  for words in ('step 40 is damaged', 'damaged-40', 'step 30', '10 steps'):
    assert words in said[0]
  assert checkpoints.kept_steps(hurt) == [30, 40]
  assert (hurt / 'checkpoints/damaged-40/state').is_dir()
  a, b = sae_jax.load(hurt), sae_jax.load(whole)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)
  # A second time, and now nothing is left: one line, nothing touched.
  for step in (30, 40):
    (hurt / f'checkpoints/{step}/meta/record.json').unlink()
  before = sorted((hurt / 'checkpoints').rglob('*'))
  done = run(hurt, 'jumprelu.py:demo', *flags)
  last = done.stderr.strip().splitlines()[-1]
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert last.startswith('error: no checkpoint in') and 'step 40' in last
  assert 'record.json is missing' in last and 'step 30' in last
  assert sorted((hurt / 'checkpoints').rglob('*')) == before


def test_load_takes_the_step_before_with_a_warning(tmp_path, caplog):
  config = small_config()
  write(tmp_path, config)
  record = tmp_path / 'checkpoints/2/meta/record.json'
  record.write_text(record.read_text().replace('position": 2', 'position": 3'))
  with caplog.at_level('WARNING'):
    s = sae_jax.load(tmp_path)
  assert 'step 2' in caplog.text and 'its hash does not match' in caplog.text
  np.testing.assert_array_equal(s.b_enc, make_state(config, 1).sae.b_enc)
  with pytest.raises(sae_jax.UserError, match='hash does not match'):
    sae_jax.load(tmp_path, step=2)
  sae_jax.load(tmp_path, step=1)
  assert checkpoints.oldest_position(tmp_path) == 1
  (tmp_path / 'checkpoints/1/meta/record.json').unlink()
  with pytest.raises(sae_jax.UserError, match='no checkpoint in .* is whole'):
    sae_jax.load(tmp_path)


@pytest.mark.parametrize(
  'more, words',
  [
    (
      {'sae.latents': 128},
      ['sae.W_enc is float32[64,16] there, float32[128,16] here',
       'opt.1.nu.W_dec is float32[64,16] there', 'ema.b_enc is float32[64]',
       'rows_since_fired is int32[64] there, int32[128] here'],
    ),
    ({'sae.d_in': 8}, ['sae.W_dec is float32[64,16] there, float32[64,8]']),
    ({'act.name': 'topk'}, ['is float32[64] there, not here']),
    ({'optim.b1': 0.9}, ['opt.1.mu.W_enc is not there, float32[64,16] here']),
  ],
)  # fmt: skip
def test_another_architecture_is_listed_leaf_by_leaf(tmp_path, more, words):
  config = small_config()
  write(tmp_path, config)
  other = small_config(**more)
  before = sorted((tmp_path / 'checkpoints').rglob('*'))
  with Checkpoints(tmp_path, 2, 0) as manager:
    with pytest.raises(sae_jax.UserError) as error:
      manager.restore_newest(abstract_state(other))
  assert not isinstance(error.value, integrity.Damaged)
  for word in ['step 2', *words]:
    assert word in str(error.value)
  assert '\n' not in str(error.value)
  assert 'norm_in.scale' not in str(error.value)
  assert sorted((tmp_path / 'checkpoints').rglob('*')) == before
  text = json.loads((tmp_path / 'config.json').read_text())
  if 'optim.b1' not in more:  # which no part of the SAE depends on
    runs.write_config(tmp_path, other)
    with pytest.raises(sae_jax.UserError, match='there'):
      sae_jax.load(tmp_path)
    assert text != json.loads((tmp_path / 'config.json').read_text())


def test_a_config_that_was_deleted_is_in_the_checkpoint(tmp_path):
  """No shape tells act.k=4 from act.k=5."""
  config = small_config(**{'act.name': 'topk', 'act.k': 4})
  other = small_config(**{'act.name': 'topk', 'act.k': 5})
  runs.check_restored(tmp_path, config.to_dict(), config)
  with pytest.raises(sae_jax.UserError, match='act.k 4 -> 5'):
    runs.check_restored(tmp_path, config.to_dict(), other)
  runs.write_config(tmp_path, config)  # is compared elsewhere, before
  runs.check_restored(tmp_path, config.to_dict(), other)


def test_a_checkpoint_of_before_touched_was_saved(tmp_path):
  """Its moments are all up to date: as of the optimiser's last update."""
  config = small_config()
  state = make_state(config, 7)
  assert state.touched is not None
  with Checkpoints(tmp_path, 2, 0) as manager:
    record = {'position': 1, 'config': {}, 'store': ''}
    manager.save(1, state.replace(touched=None), record)
  with Checkpoints(tmp_path, 2, 0) as manager:
    _, found, _ = manager.restore_newest(abstract_state(config))
  expected = np.full(len(state.touched), optax.tree.get(state.opt, 'count'))
  np.testing.assert_array_equal(found.touched, expected)
  assert same(found.replace(touched=state.touched), jax.tree.leaves(state))
