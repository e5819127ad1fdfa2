"""Moments in one pass are those of two passes in float64."""

import ml_dtypes
import numpy as np
import pytest

from sae_jax.store import quantise
from sae_jax.store.statistics import merge_next, moments

pytestmark = pytest.mark.smoke


def rows(n=1000, width=300, mean=3.0):
  rng = np.random.default_rng(0)
  x = rng.normal(mean, 1, (n, width))
  x[:, 7] = 0.1  # a column that does not vary
  x[:, 8] *= 1e4
  x[0] += 50  # the first row is no guess of the mean
  return x.astype(np.float32)


def check(found, x, rtol):
  x = x.astype(np.longdouble)
  assert found.n == len(x)
  assert found.max_abs == float(np.abs(x).max())
  np.testing.assert_allclose(found.mean, x.mean(0).astype(float), rtol=1e-14)
  m2 = np.square(x - x.mean(0)).sum(0).astype(float)
  np.testing.assert_allclose(found.m2, m2, rtol=rtol)


@pytest.mark.parametrize('n', [1, 108, 109, 110, 1000])  # pieces of 109 rows
def test_moments_are_numpys(n):
  x = rows()[:n]
  check(moments(x), x, 1e-13)


def test_moments_of_blocks_merge():
  x, found = rows(), None
  for at in range(0, 1000, 64):
    found = merge_next(found, x[at : at + 64])
  check(found, x, 1e-13)


def test_moments_far_from_zero_and_from_the_guess():
  x = rows(mean=1e6)
  check(moments(x), x, 1e-12)
  check(moments(rows(), near=np.full(300, 4.0)), rows(), 1e-12)


def test_a_column_that_does_not_vary_has_no_spread():
  x = rows()[1:]
  assert moments(x).m2[7] == 0
  assert quantise.columns(moments(x))[1][7] == 1


def test_bfloat16_rows():
  x = rows().astype(ml_dtypes.bfloat16)
  check(moments(x), x.astype(np.float32), 1e-13)


def test_not_finite_rows_are_seen():
  for bad in (np.nan, np.inf):
    x = rows()
    x[500, 3] = bad
    with np.errstate(invalid='ignore'):
      m2 = moments(x).m2
    assert not np.isfinite(m2[3]) and np.isfinite(m2[4])


def test_int8_is_the_documented_formula():
  x = rows()
  x[5] = 0
  offset, scale = (
    np.array(v, np.float32) for v in quantise.columns(moments(x))
  )
  x[6] = offset  # a row of nothing but zeros
  steps, row_scale = quantise.encode(x, offset, scale)
  y = (x - offset) / scale
  top = np.abs(y).max(1, keepdims=True) / np.float32(127)
  np.testing.assert_array_equal(row_scale, top)
  wanted = np.rint(y / np.where(top > 0, top, 1))
  np.testing.assert_array_equal(steps, wanted)
  out = np.empty_like(x)
  quantise.decode(steps, row_scale, offset, scale, out)
  wanted = steps.astype(np.float32) * row_scale * scale + offset
  np.testing.assert_array_equal(out, wanted)
  np.testing.assert_array_equal(out[6], offset)
