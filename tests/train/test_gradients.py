"""Micro-batches, rounded products, ZeRO-1, and updates that are left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.models.products import product
from sae_jax.models.sae import Norm
from sae_jax.parallel.mesh import DATA, DICT, make_mesh, spec
from sae_jax.train import state, step
from sae_jax.train.config import base_config

pytestmark = pytest.mark.smoke

D, F, B = 16, 64, 32


def _config(name, **more):
  c = base_config()
  c.sae.d_in, c.sae.latents = D, F
  c.train.batch_rows, c.train.rows, c.optim.lr = B, 20 * B, 1e-2
  c.act.theta, c.act.bandwidth, c.loss.l0_coef = 0.2, 0.3, 1e-2
  c.act.name, c.act.k = name, 4
  c.loss.aux_k, c.loss.dead_rows = 8, B
  c.update_from_flattened_dict(more)
  return c


def _rows(seed, kind=np.float32):
  x = np.random.default_rng(seed).normal(size=(B, D)).astype(kind)
  return x + np.arange(D, dtype=kind) / D


def _start(config):
  norm = Norm(jnp.zeros(D), jnp.float32(np.sqrt(D)))
  return jax.jit(lambda norm: state.init_state(config, norm))(norm)


def _run(config, steps=5, rows=_rows):
  """(final state, metrics of every step)."""
  s, step_fn, history = _start(config), step.make_step(config), []
  for i in range(steps):
    s, metrics = step_fn(s, jax.device_put(rows(i), spec(DATA, None)))
    history.append(jax.device_get(metrics))
  return s, history


def _same(a, b, **tolerance):
  a, b = jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b))
  for x, y in zip(a, b, strict=True):
    np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize('name', ['jumprelu', 'topk'])
def test_parts_of_a_batch_add_up_to_the_batch(name):
  """All that is linear in rows: neither AuxK nor a quadratic penalty."""
  parts = {'train.micro_batches': 4, 'loss.aux_coef': 0.0}
  with jax.set_mesh(make_mesh(2, 4)):
    many = _run(_config(name, **parts))
    one = _run(_config(name, **{'loss.aux_coef': 0.0}))
  _same(many, one, rtol=1e-4, atol=1e-5)
  assert one[1][-1]['train/l0'] > 1


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_every_mesh_takes_the_same_parts(mesh, dtype):
  """AuxK's ratio is taken within a part: parts must have the same rows.

  One step: rounded products of sums that differ in the last bit differ by a
  bfloat16 unit here and there.
  """
  more = {'train.micro_batches': 4, 'train.compute_dtype': dtype}
  config = _config('topk', **more)
  tolerance = (
    dict(rtol=2e-4, atol=2e-5)
    if dtype == 'float32'
    else dict(rtol=2e-2, atol=2e-3)
  )

  def rows(seed):
    return np.round(_rows(seed) * 4) / 4

  found = _run(config, steps=3, rows=rows)
  with jax.set_mesh(make_mesh(1, 1)):
    one = _run(config, steps=3, rows=rows)
  _same(found, one, **tolerance)
  assert one[1][-1]['train/penalty'] > 0


@pytest.mark.parametrize('name', ['jumprelu', 'topk'])
def test_zero1_shards_the_optimiser_and_changes_nothing_else(mesh, name):
  more = {'optim.b1': 0.9, 'optim.ema': 0.9, 'optim.clip_norm': 0.5}
  whole, _ = _run(_config(name, **more))
  split, _ = _run(_config(name, **more, **{'mesh.zero1': True}))
  _same(split, whole, rtol=1e-5, atol=1e-6)
  rows = lambda tree: {
    len(x.addressable_shards[0].data)
    for x in jax.tree.leaves(tree)
    if x.shape[:1] == (F,)
  }
  assert rows((split.opt, split.ema)) == {F // mesh.size}
  assert rows((whole.opt, whole.ema)) == {F // mesh.shape[DICT]}
  assert rows((split.sae,)) == {F // mesh.shape[DICT]}


@pytest.mark.parametrize(
  'equation, shape, other',
  [('...d,fd->...f', (B, D), (F, D)), ('...f,fe->...e', (B, F), (F, D))],
)
def test_rounded_products_are_products_of_rounded_factors(
  equation, shape, other
):
  rng = np.random.default_rng(0)
  x, W = rng.normal(size=shape), rng.normal(size=other)
  x, W = (jnp.array(a, jnp.float32) for a in (x, W))
  y, pull = jax.vjp(lambda x, W: product(equation, x, W, jnp.bfloat16), x, W)
  g = jnp.array(rng.normal(size=y.shape), jnp.float32)
  low = lambda a: np.array(a.astype(jnp.bfloat16), np.float64)
  exact = lambda x, W: jnp.einsum(equation.replace('...', 'b'), x, W)
  with jax.enable_x64(True):
    expected, pull_exact = jax.vjp(exact, low(x), low(W))
    dx, dW = pull_exact(low(g))
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
  for a, b in zip(pull(g), (dx, dW), strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
  assert np.abs(np.asarray(y) - np.asarray(exact(x, W))).max() > 1e-3


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('name', ['jumprelu', 'topk'])
def test_a_batch_that_is_not_finite_changes_nothing_learned(mesh, name, bad):
  config = _config(name, **{'optim.b1': 0.9, 'optim.ema': 0.9})

  def rows(seed):
    x = _rows(seed)
    if seed == 2:
      x[3, 5] = bad
    return x

  before, _ = _run(config, steps=2)
  after, history = _run(config, steps=3, rows=rows)
  assert [h['train/skipped'] for h in history] == [0, 0, 1]
  assert after.step == 3
  for a, b in zip(
    jax.tree.leaves((after.sae, after.opt, after.ema)),
    jax.tree.leaves((before.sae, before.opt, before.ema)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  # The next good batch is learned from.
  x = jax.device_put(_rows(7), spec(DATA, None))
  later, metrics = step.make_step(config)(after, x)
  assert metrics['train/skipped'] == 0
  assert np.any(np.asarray(later.sae.W_dec) != before.sae.W_dec)
