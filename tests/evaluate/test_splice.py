"""Spliced losses against a slow computation, position by position."""

import eval_fakes as fakes
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.evaluate import splice
from sae_jax.evaluate.held_out import spread
from sae_jax.lm.model import forward

pytestmark = pytest.mark.smoke

D, SITE, T = fakes.CFG.d_model, fakes.SITE, fakes.T
N = 9


@pytest.fixture(scope='module')
def lm():
  return fakes.random_lm()


@pytest.fixture(scope='module')
def text():
  return fakes.random_tokens(N)


def run(lm, sae, text, **more):
  tokens, keep = text
  return splice.splice_loss(
    lm, fakes.CFG, sae, SITE, tokens, keep, latents=2 * D, **more
  )


def slow_losses(lm, tokens, keep, replace, pad=None):
  """[n] lists of -log p(next token), with x[b, t] = replace(x[b, t])."""
  seen = forward(lm, fakes.CFG, tokens, sites=(SITE,)).activations[SITE]
  x = np.array(seen)
  for b, t in np.argwhere(keep):
    x[b, t] = replace(x[b, t])
  edits = {SITE: lambda _: jnp.asarray(x)}
  logits = np.asarray(forward(lm, fakes.CFG, tokens, edits=edits).logits)
  losses = [[] for _ in tokens]
  for b, t in np.argwhere(keep):
    if t + 1 < T and tokens[b, t + 1] != pad:
      z = logits[b, t].astype(np.float64)
      losses[b].append(np.log(np.exp(z).sum()) - z[tokens[b, t + 1]])
  return losses


@pytest.mark.parametrize('pad', [None, 5])
@pytest.mark.parametrize('batch', [2 * T, 512])
def test_equals_the_slow_computation(monkeypatch, lm, text, pad, batch):
  monkeypatch.setattr(splice, '_BATCH_TOKENS', batch)
  sae = fakes.random_sae(D, 2 * D)
  found = run(lm, sae, text, pad=pad)
  code = lambda x: np.asarray(sae.decode(sae.encode(x)))
  sums = {}
  for name, replace in [
    ('ce_clean', lambda x: x),
    ('ce_splice', code),
    ('ce_zero', np.zeros_like),
  ]:
    losses = slow_losses(lm, *text, replace, pad)
    flat = np.concatenate(losses)
    np.testing.assert_allclose(getattr(found, name), flat.mean(), 1e-4)
    sums[name] = np.array([sum(a) for a in losses])
  assert found.predictions == len(flat) and found.sequences == N
  clean, spliced, zero = sums.values()
  delta = (spliced - clean).sum() / len(flat)
  np.testing.assert_allclose(found.delta_loss, delta, 1e-3)
  recovered = (zero - spliced).sum() / (zero - clean).sum()
  np.testing.assert_allclose(found.loss_recovered, recovered, 1e-3)


def test_identity_recovers_everything_and_zero_nothing(lm, text):
  found = run(lm, fakes.identity_sae(D), text)
  assert found.delta_loss == 0 and found.loss_recovered == 1
  assert found.delta_loss_se == 0
  found = run(lm, fakes.zero_sae(D), text)
  assert found.ce_splice == found.ce_zero and found.loss_recovered == 0
  assert found.delta_loss == pytest.approx(found.ce_zero - found.ce_clean)
  assert found.ce_zero != pytest.approx(found.ce_clean, rel=1e-3)


def test_untrained_positions_are_never_replaced(lm, text):
  """An SAE that ruins what it touches must not reach position 0 or an EOS."""
  tokens, keep = text
  sums = lambda keep, counted: np.asarray(
    splice.sequence_losses(
      lm, fakes.zero_sae(D), tokens, keep, counted, cfg=fakes.CFG, site=SITE,
      rows=7,
    )
  )  # fmt: skip
  nowhere, everywhere = np.zeros_like(keep), np.ones_like(keep)
  counted = everywhere[:, 1:]
  clean, spliced, zeroed = sums(nowhere, counted)
  np.testing.assert_array_equal(clean, spliced)
  np.testing.assert_array_equal(clean, zeroed)
  # Position 0 counts here, and its prediction changes only if it is replaced:
  # nothing that comes later can reach it.
  first = np.zeros_like(counted)
  first[:, 0] = True
  clean, spliced, zeroed = sums(keep, first)
  np.testing.assert_array_equal(clean, spliced)
  np.testing.assert_array_equal(clean, zeroed)
  assert (sums(everywhere, first)[1] != clean).all()


def test_rows_beyond_the_bound_are_never_replaced(lm, text):
  clean = run(lm, fakes.zero_sae(D), text).ce_clean
  within = run(lm, fakes.zero_sae(D), text, bound=0.0)
  assert within.ce_splice == within.ce_zero == clean
  assert run(lm, fakes.zero_sae(D), text, bound=1e9).ce_splice != clean


def test_only_predictions_from_trained_positions_count(lm, text):
  """Nothing changes when the targets of other positions do."""
  tokens, keep = text
  keep = keep.copy()
  keep[:, 8:] = False
  before = run(lm, fakes.random_sae(D, 2 * D), (tokens, keep))
  changed = tokens.copy()
  changed[:, 9:] = 7
  after = run(lm, fakes.random_sae(D, 2 * D), (changed, keep))
  assert before == after
  assert before.predictions == keep.sum()
  changed[:, 8] = 7  # the target of position 7
  after = run(lm, fakes.random_sae(D, 2 * D), (changed, keep))
  assert before.ce_clean != after.ce_clean


def test_last_batch_is_padded_with_nothing(monkeypatch, lm, text):
  monkeypatch.setattr(splice, '_BATCH_TOKENS', 4 * T)
  few = run(lm, fakes.random_sae(D, 2 * D), text)
  monkeypatch.setattr(splice, '_BATCH_TOKENS', N * T)
  one = run(lm, fakes.random_sae(D, 2 * D), text)
  assert few.predictions == one.predictions
  assert few.delta_loss == pytest.approx(one.delta_loss, rel=1e-4)


def test_standard_error_of_a_ratio():
  rng = np.random.default_rng(0)
  a = rng.normal(3, 1, 1000)
  mean, se = splice.ratio(a, np.full(1000, 4))
  assert mean == pytest.approx(a.mean() / 4)
  assert se == pytest.approx(a.std(ddof=1) / 4 / 1000**0.5)
  # Against the spread of the ratio over many samples of 50 pairs.
  b = rng.uniform(1, 3, (4000, 50))
  a = 0.5 * b + rng.normal(0, 0.2, b.shape)
  many = [splice.ratio(x, y) for x, y in zip(a, b, strict=True)]
  ratios, errors = np.array(many, np.float64).T
  assert errors.mean() == pytest.approx(ratios.std(), rel=0.05)
  assert splice.ratio(np.ones(1), np.ones(1)) == (1.0, None)
  assert np.isnan(splice.ratio(np.ones(2), np.zeros(2))[0])


def test_sequences_are_spread_over_the_split():
  np.testing.assert_array_equal(spread(4, 10), [0, 2, 5, 7])
  np.testing.assert_array_equal(spread(9, 3), [0, 1, 2])
  assert len(spread(3, 0)) == 0
