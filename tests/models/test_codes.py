"""Every product on a sparse code against its dense twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.models import activations, candidates, codes, sae
from sae_jax.models.sae import Norm
from sae_jax.parallel import select

pytestmark = pytest.mark.smoke

B, D, F, K = 37, 24, 160, 5
rng = np.random.default_rng(0)
W = jnp.asarray(rng.normal(size=(F, D)), jnp.float32)
g = jnp.asarray(rng.normal(size=(B, D)), jnp.float32)


def _sae(act):
  norm = Norm(jnp.zeros(D), jnp.ones(()))
  s = sae.init(jax.random.key(1), latents=F, act=act, norm_in=norm)
  return s.replace(W_dec=W, b_dec=jnp.asarray(rng.normal(size=D), jnp.float32))


def _rows():
  n = jnp.asarray(rng.normal(size=(B, D)), jnp.float32)
  s = _sae(activations.TopK(K))
  mask = select.top_k_mask(s.pre(n), K)
  return candidates.top_k(s, n, K)[0], jnp.where(mask, s.pre(n), 0), mask


def _flat(budget=40):
  n = jnp.asarray(rng.normal(size=(B, D)), jnp.float32)
  s = _sae(activations.TopK(K))
  z = s.pre(n)
  floor = jnp.asarray(rng.uniform(0.5, 1.5, F), jnp.float32)
  code, over = candidates.above(s, n, floor, budget)
  assert not over and code.count == (z > floor).sum()
  return code, jnp.where(z > floor, z, 0), z > floor


def _dense(code, values):
  row = (
    jnp.repeat(jnp.arange(B), K) if isinstance(code, codes.Rows) else code.row
  )
  f = jnp.zeros((B, F))
  return f.at[row, code.index.reshape(-1)].set(values.reshape(-1), mode='drop')


@pytest.mark.parametrize('make', [_rows, _flat])
def test_code_and_products_equal_the_dense_ones(make):
  code, f, mask = make()
  np.testing.assert_array_equal(_dense(code, code.z), f)
  out, back = jax.vjp(lambda f, W: codes.decode(code, f, W, B), code.z, W)
  expected, dense_back = jax.vjp(lambda f, W: f @ W, f, W)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  (df, dW), (df_all, dW_all) = back(g), dense_back(g)
  np.testing.assert_allclose(
    _dense(code, df), jnp.where(mask, df_all, 0), rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(dW, dW_all, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('make', [_rows, _flat])
def test_entries_are_sorted_and_complete(make):
  code, f, _ = make()
  e = codes.entries(code, code.z, 2 * code.z, F)
  assert np.all(np.diff(e.latent) >= 0)
  found = jnp.zeros((B, F)).at[e.row, e.latent].add(e.f, mode='drop')
  np.testing.assert_array_equal(found, f)
  np.testing.assert_allclose(
    codes.gradient(e, F, g, 'dz'), 2 * f.T @ g, rtol=1e-5, atol=1e-5
  )


def test_a_list_that_is_too_short_says_so():
  n = jnp.asarray(rng.normal(size=(B, D)), jnp.float32)
  s = _sae(activations.TopK(K))
  floor = jnp.zeros(F)
  assert candidates.above(s, n, floor, 40)[1]
  assert not candidates.above(s, n, floor, F)[1]
  assert candidates.above(s, n.at[3, 3].set(jnp.nan), floor + 9, 1)[1]


@pytest.mark.parametrize('rows', [4, B])
def test_the_largest_of_chunks(monkeypatch, rows):
  """Each chunk's list holds what is above a floor of its own, half full at
  least; with room for all it holds all positive ones."""
  monkeypatch.setattr(candidates, 'chunk_rows', lambda *_: rows)
  n = jnp.asarray(rng.normal(size=(B, D)), jnp.float32)
  n *= jnp.linspace(0.1, 3, B)[:, None]  # chunks differ
  s = _sae(activations.TopK(K))
  z = np.asarray(s.pre(n))
  code, _, highest, over = candidates.largest(s, n, 6)
  count = int(code.count)
  row, z_found = (np.asarray(a)[:count] for a in (code.row, code.z))
  assert not over and z_found.min() > 0
  floors = []
  for first in range(0, B, rows):
    here = z_found[(row >= first) & (row < first + rows)]
    of_chunk = np.sort(z[first : first + rows], None)[::-1]
    full = min(rows, B - first) * 6
    assert full // 2 <= len(here) <= rows * 6
    np.testing.assert_array_equal(np.sort(here)[::-1], of_chunk[: len(here)])
    floors.append((of_chunk[len(here)], of_chunk[len(here) - 1]))
  assert max(low for low, _ in floors) <= highest < max(up for _, up in floors)
  code, _, highest, over = candidates.largest(s, n, F)
  assert not over and highest == 0 and code.count == (z > 0).sum()


@pytest.mark.parametrize('k', [1, 2, 3, 40])
def test_top_k_orders_ties_by_index(k):
  z = jnp.asarray(rng.integers(-2, 3, (B, F)), jnp.float32)
  expected = np.argsort(-np.asarray(z), 1, kind='stable')[:, :k]
  np.testing.assert_array_equal(select.top_k(z, k), expected)


@pytest.mark.parametrize('top', [3, 2**12, 2**31 - 2])
def test_order_is_a_stable_argsort(top):
  x = rng.integers(0, top + 1, 1000, endpoint=False).astype(np.int32)
  x[::3] = x[0]
  order = jax.jit(lambda x: codes._order(x, top))(jnp.asarray(x))
  np.testing.assert_array_equal(order, np.argsort(x, kind='stable'))
