"""A mesh 1x8 holds an eighth of everything on each device, in all phases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_runs import start_children

from sae_jax.models.sae import Norm
from sae_jax.parallel.mesh import DATA, make_mesh
from sae_jax.parallel.mesh import P as Spec
from sae_jax.train import checkpoints, integrity, orbax_io
from sae_jax.train.checkpoints import Checkpoints
from sae_jax.train.config import base_config
from sae_jax.train.state import abstract_state, init_state
from sae_jax.train.step import make_step

D, F, B = 32, 2048, 64
PARTS = ['jumprelu', 'topk']


def small_config(name='jumprelu'):
  config = base_config()
  config.sae.d_in, config.sae.latents, config.act.name = D, F, name
  config.optim.ema, config.optim.b1, config.train.batch_rows = 0.9, 0.9, B
  return config


def start(config):
  norm = Norm(jnp.full(D, 0.5), jnp.float32(2))
  return jax.jit(lambda norm: init_state(config, norm))(norm)


def check_shards(state):
  """Every leaf with latents has eight parts; the rest is small."""
  split = 0
  for name, x in integrity.named(state).items():
    parts = {s.device: s.data.nbytes for s in x.addressable_shards}
    assert len(parts) == 8, name
    if F in x.shape:
      split += x.nbytes
      assert set(parts.values()) == {x.nbytes // 8}, (name, parts)
    else:
      assert x.nbytes <= 4 * D, name
  # Two matrices, their two moments and running mean, biases and counters.
  assert split >= 4 * (8 * F * D + 5 * F)


@pytest.mark.parametrize('name', PARTS)
def test_an_eighth_from_the_first_allocation_to_the_restore(tmp_path, name):
  config = small_config(name)
  with jax.set_mesh(make_mesh(1, 8)):
    state = start(config)
    check_shards(state)
    with Checkpoints(tmp_path, 1, 0) as manager:
      manager.save(0, state, {'position': 0})
    x = jax.device_put(np.ones((B, D), np.float32), Spec(DATA, None))
    check_shards(make_step(config)(state, x)[0])
    _, restored, _, _ = checkpoints.newest(tmp_path, abstract_state(config))
    check_shards(restored)


@pytest.mark.parametrize('name', PARTS)
def test_an_eighth_in_what_the_compiler_allocates(name):
  """Arguments of the compiled step and of the compiled initialisation."""
  config, taken = small_config(name), {}
  for parts in (1, 8):
    with jax.set_mesh(make_mesh(1, parts)):
      x = jax.device_put(np.ones((B, D), np.float32), Spec(DATA, None))
      step = make_step(config).lower(abstract_state(config), x).compile()
      norm = Norm(jnp.zeros(D), jnp.float32(1))
      first = jax.jit(lambda norm: init_state(config, norm)).lower(norm)
      taken[parts] = (
        step.memory_analysis().argument_size_in_bytes - x.nbytes,
        step.memory_analysis().output_size_in_bytes,
        first.compile().memory_analysis().output_size_in_bytes,
      )
  small = 64 * 64  # leaves of D or one number, aligned
  for whole, eighth in zip(taken[1], taken[8], strict=True):
    assert whole > 4 * 8 * F * D
    assert abs(eighth - whole / 8) < small, taken


def test_sums_take_a_sixteenth_of_room(tmp_path):
  """The sums of a matrix do not write its like."""
  x = jax.ShapeDtypeStruct((4096, 256), jnp.float32)
  compiled = integrity.sums.lower({'a': x, 'b': x}).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 2 * 4096 * 256 * 4 / 8


def incompressible(x):
  noise = np.random.default_rng(x.size).integers(0, 2**30, x.shape, np.int32)
  return jax.device_put(noise.view(x.dtype), x.sharding)


CHILD = """
import sys, jax, jax.numpy as jnp, tensorstore as ts
coordinator, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(coordinator, 2, process)
from test_state_memory import small_config
from sae_jax.parallel.mesh import make_mesh
from sae_jax.train.checkpoints import Checkpoints
from sae_jax.train.state import abstract_state
def count():
  name = '/tensorstore/kvstore/file/bytes_read'
  return sum(v.get('value', v.get('sum', 0)) for m in
    ts.experimental_collect_matching_metrics(name) for v in m['values'])
with jax.set_mesh(make_mesh(1, 8)), Checkpoints(folder, 9, 0) as manager:
  before = count()
  step, state, record = manager.restore_newest(abstract_state(small_config()))
  print('step', step, 'read', count() - before)
  state = jax.jit(lambda s: s.replace(step=s.step + 7))(state)
  manager.save(2, state, {'position': 7})
"""


@pytest.mark.slow
@pytest.mark.parametrize('written_on', [1, 8])
def test_two_processes_read_half_each_and_agree(
  tmp_path, monkeypatch, written_on
):
  """The newest checkpoint is damaged where one of them alone would see it
  first; what they write together one process reads."""
  config = small_config()
  monkeypatch.setattr(orbax_io, '_PIECE', 2**14)
  with jax.set_mesh(make_mesh(1, written_on)):
    state = jax.tree.map(incompressible, start(config))
    with Checkpoints(tmp_path, 9, 0) as manager:
      for step in (1, 2):
        manager.save(step, state, {'position': step})
  (tmp_path / 'checkpoints/2/meta/record.json').write_text('{}')
  children = start_children(CHILD, tmp_path, devices=4)
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  for child in children:
    out, err = child.communicate(timeout=200)
    assert child.returncode == 0, err
    _, step, _, read = out.split()[-4:]
    assert int(step) == 1
    assert 0.4 * size < int(read) < 0.6 * size, (read, size)
  assert (tmp_path / 'checkpoints/damaged-2').is_dir()
  assert checkpoints.kept_steps(tmp_path) == [1, 2]
  step, found, record, damaged = checkpoints.newest(
    tmp_path, abstract_state(config)
  )
  assert (step, damaged, record['position']) == (2, {}, 7)
  assert int(found.step) == 7 + int(state.step)
  np.testing.assert_array_equal(found.sae.W_enc, state.sae.W_enc)
