"""Planted latents, each firing on one known token."""

import eval_fakes as fakes
import numpy as np
import pytest

from sae_jax.evaluate import contexts
from sae_jax.evaluate import rows as chunking
from sae_jax.evaluate.contexts import choose_latents, top_contexts
from sae_jax.evaluate.held_out import read_held_out
from sae_jax.store import reader

V, T, N = fakes.CFG.vocab, fakes.T, 40


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
  """A store in which latent i fires on token i, more strongly at each one.

  The rows of a sequence are its tokens as one-hot vectors, times a strength
  [N, T] in which no two numbers are equal.
  """
  root = tmp_path_factory.mktemp('planted')
  tokens, keep = fakes.random_tokens(N)
  strength = np.random.default_rng(1).permutation(N * T).reshape(N, T) + 1.0
  rows = np.eye(V, dtype=np.float32)[tokens] * strength[..., None]
  rows = rows[keep].astype(np.float32)
  manifest = fakes.write_store(root, tokens, keep, rows, shard=320)
  return root, read_held_out(root, manifest), strength


def fired_on(held_out):
  """Rows of every token id in the held-out split."""
  return np.bincount(held_out.tokens[held_out.stored], minlength=V)


def find(planted, latents=5, rows=320, each=3):
  root, held_out, _ = planted
  return top_contexts(
    fakes.identity_sae(V),
    lambda: reader.held_out(root, fakes.SITE),
    lambda i: held_out.tokens[i],
    np.concatenate([fired_on(held_out), np.zeros(V, int)]),
    rows=rows,
    width=V,
    latents=latents,
    each=each,
  )


@pytest.mark.parametrize('chunk', [8, 2048])
def test_peaks_are_the_strongest_of_their_sequences(
  monkeypatch, planted, chunk
):
  monkeypatch.setattr(chunking, '_MOST_ROWS', chunk)
  _, held_out, strength = planted
  found = find(planted)
  assert len(found) == 5
  for feature in found:
    is_it = held_out.stored & (held_out.tokens == feature.latent)
    assert feature.fired == is_it.sum()
    assert feature.frequency == is_it.sum() / 320
    at = np.where(is_it, strength[: len(is_it)], 0)
    order = np.argsort(-at.max(1))[: min(3, np.count_nonzero(at.max(1)))]
    assert [c.sequence for c in feature.contexts] == order.tolist()
    assert [c.peak for c in feature.contexts] == at[order].argmax(1).tolist()


def test_windows_hold_tokens_and_their_activations(monkeypatch, planted):
  monkeypatch.setattr(contexts, 'BEFORE', 4)
  monkeypatch.setattr(contexts, 'AFTER', 2)
  _, held_out, strength = planted
  unknown = 0
  for feature in find(planted):
    for c in feature.contexts:
      start, stop = max(0, c.peak - 4), min(T, c.peak + 3)
      assert c.start == start
      ids = held_out.tokens[c.sequence, start:stop]
      np.testing.assert_array_equal(c.ids, ids)
      wanted = strength[c.sequence, start:stop] * (ids == feature.latent)
      wanted = np.where(held_out.stored[c.sequence, start:stop], wanted, np.nan)
      np.testing.assert_array_equal(c.activations, wanted)
      unknown += np.isnan(wanted).sum()
  assert unknown  # position 0 or an EOS was among them


def test_windows_are_whole_when_few_rows_are_searched(planted):
  """Only 32 rows are searched for peaks; their neighbours are found anyway."""
  _, held_out, _ = planted
  for feature in find(planted, rows=32):
    for c in feature.contexts:
      stored = held_out.stored[c.sequence, c.start : c.start + len(c.ids)]
      np.testing.assert_array_equal(np.isnan(c.activations), ~stored)


def test_latents_are_spread_over_the_living():
  fired = np.array([0, 8, 1, 4, 2, 0, 32, 16])
  np.testing.assert_array_equal(choose_latents(fired, 3), [4, 1, 6])
  np.testing.assert_array_equal(choose_latents(fired, 6), [2, 4, 3, 1, 7, 6])
  np.testing.assert_array_equal(choose_latents(fired, 99), [2, 4, 3, 1, 7, 6])
  assert len(choose_latents(np.zeros(4, int), 3)) == 0
  many = np.random.default_rng(0).permutation(4096)
  chosen = many[choose_latents(many, 20)]
  assert len(set(chosen)) == 20
  np.testing.assert_allclose(np.diff(chosen), 4095 / 20, atol=2)


def test_no_latents_no_contexts(planted):
  assert find(planted, latents=0) == []


def test_held_out_positions(planted):
  """Every stored position is marked, and the sequence that goes on in the
  training split is not counted as whole."""
  root, held_out, _ = planted
  tokens, keep = fakes.random_tokens(N)
  ends = keep.sum(1).cumsum()
  assert held_out.rows == held_out.stored.sum() == 320
  assert ends[held_out.whole - 1] <= 320
  assert len(held_out.tokens) == held_out.whole + 1
  whole = slice(held_out.whole)
  np.testing.assert_array_equal(held_out.stored[whole], keep[whole])
  np.testing.assert_array_equal(held_out.tokens[whole], tokens[whole])
