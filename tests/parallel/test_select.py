"""Selection over any mesh equals a stable sort on one host, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sae_jax.parallel import select
from sae_jax.parallel.mesh import DATA, DICT, spec
from sae_jax.parallel.select import (
  batch_top_k_mask,
  smallest_positive,
  top_k_mask,
)

pytestmark = pytest.mark.smoke

B, F = 16, 64
INF, NAN, TINY = np.inf, np.nan, np.float32(1e-45)


def _top_k(z, k):
  """The k largest of each row; equal values by lower index."""
  order = np.argsort(-z, axis=-1, kind='stable')[..., :k]
  mask = np.zeros(z.shape, bool)
  np.put_along_axis(mask, order, True, axis=-1)
  return mask


def _batch_top_k(z, k):
  """The k B largest of a batch; equal values by lower row, then latent."""
  return _top_k(z.reshape(-1), k * len(z)).reshape(z.shape)


@pytest.fixture(params=['candidates', 'counts', 'batch'])
def rule(request, monkeypatch):
  """(what is tested, its reference): top_k_mask by both searches, and batch."""
  if request.param == 'batch':
    return batch_top_k_mask, _batch_top_k
  most = 0 if request.param == 'counts' else B * F * 8
  monkeypatch.setattr(select, 'MOST_CANDIDATES', most)
  return top_k_mask, _top_k


def _ties(seed, shape=(B, F)):
  """Few different values, so that the last place is shared by many."""
  rng = np.random.default_rng(seed)
  return rng.integers(-3, 4, shape).astype(np.float32)


def _place(z):
  return jax.device_put(z, spec(*[None] * (z.ndim - 2), DATA, DICT))


def _jit(function, k):
  return jax.jit(lambda z: function(z, k))


@pytest.mark.parametrize('k', [1, 8, 63])
def test_equals_a_stable_sort_with_many_ties(mesh, rule, k):
  found, expected = rule
  z = _place(_ties(k))
  mask = _jit(found, k)(z)
  assert jax.typeof(mask).sharding.spec == jax.typeof(z).sharding.spec
  np.testing.assert_array_equal(mask, expected(np.asarray(z), k))


def test_equals_a_stable_sort_without_ties(mesh, rule):
  """Numbers of all magnitudes and both signs, and neighbouring ones."""
  found, expected = rule
  rng = np.random.default_rng(0)
  z = rng.normal(size=(B, F)) * 10.0 ** rng.integers(-37, 37, (B, F))
  z = z.astype(np.float32)
  z[:, ::2] = 1 + (rng.permutation(B * F // 2) + 1).reshape(B, -1) * 2.0**-23
  for k in (2, 20):
    np.testing.assert_array_equal(_jit(found, k)(_place(z)), expected(z, k))


def test_infinities_zeros_and_bfloat16(mesh, rule):
  """-inf fills up what is missing, +inf comes first, +0 and -0 are equal."""
  found, expected = rule
  z = np.full((B, F), -INF, np.float32)
  z[:, 40], z[3, 5], z[::2, 7], z[:, 11], z[:, 9] = 1, INF, -0.0, 0.0, -2
  for k in (1, 3, 9):
    np.testing.assert_array_equal(_jit(found, k)(_place(z)), expected(z, k))
  z = np.random.default_rng(1).normal(size=(B, F)).astype(jnp.bfloat16)
  mask = _jit(found, 5)(_place(z))
  np.testing.assert_array_equal(mask, expected(z.astype(np.float32), 5))


def test_nan_is_selected_first_and_subnormals_are_zero(mesh, rule):
  found, expected = rule
  z, clean = _ties(3), _ties(3)
  z[:, 50], clean[:, 50] = -np.float32(NAN), INF
  z[4, 20:30], clean[4, 20:30] = NAN, INF
  z[6, ::3], clean[6, ::3] = TINY, 0
  z[7, ::3], clean[7, ::3] = -TINY, 0
  for k in (1, 6, 30):  # fewer than the NaNs of a row, more, among the zeros
    np.testing.assert_array_equal(_jit(found, k)(_place(z)), expected(clean, k))


def test_inside_a_shard_map_with_gradients(mesh, rule):
  """Manual mode, differentiated inside, and inside a branch."""
  found, expected = rule
  z, k = _ties(5), 4
  c = np.random.default_rng(0).normal(size=z.shape).astype(np.float32)

  def local(z, c):
    def loss(z):
      f = jnp.where(found(z, k), jax.nn.relu(z), 0)
      return jax.lax.psum((f * c).sum(), (DATA, DICT)), smallest_positive(f)

    grad = lambda: jax.grad(loss, has_aux=True)(z)
    negative = jax.lax.psum((z < 0).sum(), (DATA, DICT))
    return jax.lax.cond(negative > 0, grad, lambda: (z, jnp.float32(0)))

  grad, least = jax.jit(jax.shard_map(local, out_specs=(P(DATA, DICT), P())))(
    _place(z), _place(c)
  )
  mask = expected(z, k)
  np.testing.assert_array_equal(grad, c * (mask & (z > 0)))
  assert least == z[mask & (z > 0)].min()


def test_gradients_and_stacked_saes_under_a_mesh(mesh, rule):
  """vmap over a leading axis that is whole on every device, then grad."""
  found, expected = rule
  z, k = _ties(7, (3, B, F)), 5

  def loss(z):
    f = jax.vmap(lambda z: jnp.where(found(z, k), z * z, 0))(z)
    return f.sum() / 2

  grad = jax.jit(jax.grad(loss))(_place(z))
  mask = np.stack([expected(z[i], k) for i in range(3)])
  np.testing.assert_array_equal(grad, z * mask)


def test_stacked_saes_inside_a_shard_map(mesh, rule):
  found, expected = rule
  z, k = _ties(8, (3, B, F)), 5
  where = P(None, DATA, DICT)
  member = lambda z: jax.grad(lambda z: jnp.where(found(z, k), z, 0).sum())(z)
  grad = jax.jit(jax.shard_map(jax.vmap(member), out_specs=where))(_place(z))
  mask = np.stack([expected(z[i], k) for i in range(3)])
  np.testing.assert_array_equal(grad, mask)


def test_without_a_mesh_and_stacked(rule):
  found, expected = rule
  z = _ties(4, (2, B, F))
  mask = jax.vmap(lambda z: found(z, 4))(jnp.array(z))
  np.testing.assert_array_equal(mask, np.stack([expected(m, 4) for m in z]))


def test_rows_in_more_dimensions(mesh):
  z = _ties(6, (2, B, F))
  np.testing.assert_array_equal(_jit(top_k_mask, 4)(_place(z)), _top_k(z, 4))


def test_rows_that_are_whole_on_every_device(mesh, rule):
  found, expected = rule
  z = _ties(9)
  mask = _jit(found, 5)(jax.device_put(z, spec(None, DICT)))
  np.testing.assert_array_equal(mask, expected(z, 5))


@pytest.mark.parametrize('rows', [1, 5, 3000])
def test_counts_beyond_32_bits(rows):
  """_total is exact below 2^31 and saturates above."""
  rng = np.random.default_rng(rows)
  for most in (2, 5000, 2**17, 2**25, 2**31 - 1):
    counts = rng.integers(most, size=rows)
    exact = min(counts.sum(), 2**31 - 1)
    assert select._total(jnp.array(counts, jnp.int32), ()) == exact
  assert select._total(jnp.full(2**17, 2**25, jnp.int32), ()) == 2**31 - 1
  exact = jnp.array([2**30, 2**30 - 2, 1], jnp.int32)
  assert select._total(exact, ()) == 2**31 - 1
  assert select._total(exact - jnp.array([0, 0, 1]), ()) == 2**31 - 2
  assert select._total(exact + jnp.array([0, 0, 1]), ()) == 2**31 - 1
  for most in (2**13 - 1, 2**24 - 1):  # as many rows as the limbs allow
    assert select._total(jnp.full(2**19, most), ()) == 2**31 - 1


def test_counts_beyond_32_bits_over_devices(mesh):
  each = np.full(8, 2**30 + 4097, np.int32)
  total = lambda x: select._total(x, (DATA, DICT))
  placed = jax.device_put(each, P((DATA, DICT)))
  found = jax.shard_map(total, out_specs=P())(placed)
  assert found == 2**31 - 1
  small = jax.device_put(each >> 4, P((DATA, DICT)))
  assert jax.shard_map(total, out_specs=P())(small) == (each[0] >> 4) * 8


def test_searches_differ_by_size_alone(monkeypatch):
  """The rule of the constant: rows x best of a shard x shards."""
  called = []
  for name in ('_last_by_candidates', '_last_by_counts'):
    original = getattr(select, name)
    monkeypatch.setattr(
      select,
      name,
      lambda *a, name=name, original=original: (
        called.append(name) or original(*a)
      ),
    )
  z = jnp.array(_ties(0))
  monkeypatch.setattr(select, 'MOST_CANDIDATES', B * 4)
  top_k_mask(z, 4), top_k_mask(z, 5)
  assert called == ['_last_by_candidates', '_last_by_counts']


def test_what_cannot_be_selected():
  z = jnp.zeros((2, 4))
  for wrong in (0, 5):
    with pytest.raises(ValueError, match='to select of 4'):
      top_k_mask(z, wrong)
    with pytest.raises(ValueError, match='to select of 4'):
      batch_top_k_mask(z, wrong)
  with pytest.raises(ValueError, match='a batch is'):
    batch_top_k_mask(z[0], 1)
  with pytest.raises(ValueError, match='counted'):
    jax.eval_shape(
      lambda z: batch_top_k_mask(z, 2**15),
      jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32),
    )


def test_smallest_positive(mesh):
  z = _ties(2)
  z[z > 0] += 0.5
  assert smallest_positive(_place(z)) == 1.5
  assert smallest_positive(_place(-np.abs(z))) == INF
