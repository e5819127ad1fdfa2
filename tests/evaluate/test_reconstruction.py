"""Figures of the reconstruction against plain float64 numpy."""

import eval_fakes as fakes
import jax
import numpy as np
import pytest

from sae_jax.errors import UserError
from sae_jax.evaluate import rows as chunking
from sae_jax.evaluate.reconstruction import reconstruction

D, F, N = 12, 40, 501


def offset_rows(n=N, dtype=np.float32):
  """Rows whose mean is far larger than their spread."""
  x = np.random.default_rng(0).normal(size=(n, D)) + 30 * np.arange(D)
  return x.astype(dtype)


def by_formula(sae, x):
  """What the docstring of Reconstruction says, in float64."""
  f = np.asarray(sae.encode(x.astype(np.float32)), np.float64)
  x_hat = np.asarray(sae.decode(f.astype(np.float32)), np.float64)
  x = x.astype(np.float64)
  squares = lambda a: np.sum(a**2, axis=-1)
  dot = np.sum(x * x_hat, axis=-1)
  return {
    'fvu': squares(x - x_hat).sum() / squares(x - x.mean(0)).sum(),
    'mse': squares(x - x_hat).mean(),
    'variance': squares(x - x.mean(0)).mean(),
    'cosine': np.mean(dot / np.sqrt(squares(x) * squares(x_hat))),
    'bias': squares(x_hat).mean() / dot.mean(),
    'l0': np.count_nonzero(f, axis=-1).mean(),
  }, np.count_nonzero(f, axis=0)


@pytest.mark.parametrize('dtype', [np.float32, fakes.bfloat16])
@pytest.mark.parametrize('chunk', [64, 2048])
def test_figures_equal_the_formulas(monkeypatch, dtype, chunk):
  monkeypatch.setattr(chunking, '_MOST_ROWS', chunk)
  sae, x = fakes.random_sae(D, F), offset_rows(dtype=dtype)
  found = reconstruction(sae, fakes.blocks(x), width=D, limit=10**9)
  figures, fired = by_formula(sae, x)
  for name, value in figures.items():
    np.testing.assert_allclose(getattr(found, name), value, 1e-5, err_msg=name)
  np.testing.assert_array_equal(found.fired, fired)
  assert found.rows == N
  assert found.dead_share == np.mean(fired == 0) > 0.1
  np.testing.assert_allclose(found.frequency, fired / N)


@pytest.mark.parametrize('limit', [1, 64, 70, 128, 500])
def test_limit_takes_the_first_rows(monkeypatch, limit):
  monkeypatch.setattr(chunking, '_MOST_ROWS', 64)
  sae, x = fakes.random_sae(D, F), offset_rows()
  found = reconstruction(sae, fakes.blocks(x), width=D, limit=limit)
  assert found.rows == limit
  fired = np.count_nonzero(sae.encode(x[:limit]), axis=0)
  np.testing.assert_array_equal(found.fired, fired)


def test_perfect_and_empty_reconstructions():
  x = offset_rows()
  found = reconstruction(
    fakes.identity_sae(D), fakes.blocks(x), width=D, limit=N
  )
  assert found.fvu == found.mse == 0
  assert found.bias == pytest.approx(1) and found.cosine == pytest.approx(1)
  found = reconstruction(fakes.zero_sae(D), fakes.blocks(x), width=D, limit=N)
  raw = np.square(x.astype(np.float64)).sum(1)
  assert found.mse == pytest.approx(raw.mean()) and found.cosine == 0
  assert np.isnan(found.bias)


def test_latents_of_padding_rows_do_not_count():
  """A latent with a positive bias fires on the zeros that fill a chunk."""
  sae = fakes.identity_sae(D).replace(b_enc=np.full(2 * D, 1e6, np.float32))
  found = reconstruction(sae, fakes.blocks(offset_rows()), width=D, limit=N)
  assert (found.fired == N).all() and found.l0 == 2 * D


def test_wide_dictionaries_get_small_chunks():
  assert chunking.chunk_rows(4096) == 2048
  assert chunking.chunk_rows(2**20) == 32
  assert chunking.chunk_rows(2**30) == 1


def test_what_cannot_be_evaluated():
  with pytest.raises(UserError, match='no held-out rows'):
    reconstruction(fakes.zero_sae(D), iter(()), width=D, limit=N)
  broken = jax.tree.map(lambda a: a * np.nan, fakes.identity_sae(D))
  with pytest.raises(UserError, match='not finite'):
    reconstruction(broken, fakes.blocks(offset_rows()), width=D, limit=N)
