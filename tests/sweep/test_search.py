"""Searches against functions with known answers."""

import numpy as np
import pytest
import studies

from sae_jax.sweep import estimate, grid
from sae_jax.sweep.machine import UNKNOWN
from sae_jax.sweep.search import Ask, Halving, TargetL0

pytestmark = pytest.mark.smoke


def play(search, f, rows):
  """(what it found, trials) when a trial of value v on r rows gives f(v, r)."""
  seen = {}
  while isinstance(asked := search.next(dict(seen), rows), Ask):
    assert asked.values, 'would ask for ever'
    seen |= {(v, asked.rows): f(v, asked.rows) for v in asked.values}
  return asked, seen


@pytest.mark.parametrize('noise', [0, 0.05])
def test_target_l0_is_met(noise):
  rng = np.random.default_rng(0)
  law = lambda v: 3 * v**-0.7  # 32 at 0.0340
  f = lambda v, r: law(v) * np.exp(noise * rng.normal())
  search = TargetL0(32, low=1e-3, high=1, rows=100)
  found, seen = play(search, f, 1000)
  assert abs(np.log(law(found.value) / 32)) < 0.03 + 3 * noise
  assert len(seen) <= search.tries * search.rounds
  assert {r for _, r in seen} == {100}


def test_a_bent_curve_is_met_in_the_last_round():
  law = lambda v, r: 400 / (1 + (v / 0.01) ** 2)
  found, _ = play(TargetL0(32, low=1e-3, high=1), law, 1000)
  assert abs(np.log(law(found.value, 0) / 32)) < 0.05


def test_an_l0_out_of_reach_says_what_there_was():
  found, seen = play(TargetL0(32, low=0.1, high=1), lambda v, r: 3 / v, 10)
  assert np.isnan(found.value) and 'no L0 of 32 between' in found.failure
  assert '30 at 0.1' in found.failure and len(seen) == 3
  found, _ = play(TargetL0(32, low=0.1, high=1), lambda v, r: None, 10)
  assert '(L0 was none)' in found.failure


def test_an_l0_of_zero_is_an_end_of_the_bracket():
  law = lambda v, r: 100 * (1e-3 / v) ** 0.4 if v < 0.5 else 0.0
  found, seen = play(TargetL0(16, low=1e-3, high=1), law, 10)
  assert abs(np.log(law(found.value, 0) / 16)) < 0.05
  assert 0 in seen.values() and not found.failure
  # All is dead at once: nothing between.
  law = lambda v, r: 40.0 if v < 0.03 else 0.0
  found, seen = play(TargetL0(16, low=1e-3, high=1), law, 10)
  assert 'falls from 40 to 0 between' in found.failure and len(seen) == 9
  found, _ = play(TargetL0(16, low=1e-3, high=1), lambda v, r: 0.0, 10)
  assert '0 at 0.001' in found.failure


def test_halving_keeps_the_best_third():
  f = lambda v, r: (np.log(v) - np.log(3)) ** 2 + 1 / r
  found, seen = play(Halving(range(1, 10), rows=10), f, 1000)
  assert found.value == 3
  assert sorted(r for _, r in seen) == Halving(range(1, 10), rows=10).most(1000)
  count = lambda rows: sum(r == rows for _, r in seen)
  assert [count(r) for r in (10, 30, 90)] == [9, 3, 0]


def test_halving_spends_no_more_than_the_point_and_survives_failures():
  f = lambda v, r: None if v == 1 else v
  found, seen = play(Halving((1, 2, 3, 4), rows=10, eta=2), f, 15)
  assert found.value == 2 and {r for _, r in seen} == {10}
  assert Halving((1, 2, 3, 4), rows=10, eta=2).most(15) == [10] * 4
  found, seen = play(Halving((1, 2, 3, 4), rows=10, eta=2), f, 20)
  assert found.value == 2 and sorted(r for _, r in seen) == [10] * 4 + [20] * 2
  assert Halving((1, 2, 3, 4), rows=10, eta=2).most(20) == [10] * 4 + [20] * 2
  found, _ = play(Halving((1, 2), rows=10), lambda v, r: None, 15)
  assert 'failed' in found.failure


def test_a_point_is_resolved_through_its_trials(store):
  config = studies.base(store, **{'act.name': 'jumprelu'})
  changes = {
    'sae.latents': 64,
    'loss.l0_coef': TargetL0(4, low=1e-3, high=1e-1, rows=640),
    'optim.lr': Halving((1e-4, 1e-3, 1e-2), rows=320),
  }
  (entry,) = grid.entries(config, [changes])
  ended = {}
  waves, ahead = [], []
  while isinstance(found := grid.resolve(config, entry, ended.get), list):
    waves.append(found)
    ahead.append(grid.ahead(config, entry, ended.get))
    for spec in found:
      c = spec.config
      assert spec.stage == 'trial' and c.sae.latents == 64
      ended[spec.id] = {
        'l0': 0.1 / c.loss.l0_coef,
        'fvu': abs(np.log(c.optim.lr / 1e-2)),
        'mse': abs(np.log(c.optim.lr / 1e-2)),
      }
  assert [len(w) for w in waves] == [3, 3, 3]
  assert [len(configs) for configs in ahead] == [6 + 3 + 1, 3 + 3 + 1, 1]
  rows = [c.train.rows for c in ahead[0]]
  assert rows == [640] * 6 + [320] * 3 + [1280]
  said = estimate.text([waves[0]], UNKNOWN, ahead[:1], 0)
  total = 12 * 16 * 64 * (9 * 640 + 3 * 320 + 1280)
  assert f'at most {total:.3g} FLOPs' in said and 'no estimate of' in said
  assert '1 points more when' in said and 'at most 9 trials more' in said
  said = estimate.text([waves[0]], UNKNOWN._replace(tflops=1.0), [], 0)
  assert 'at most' not in said and 'about' in said
  assert {s.config.train.rows for s in waves[0]} == {640}
  assert {s.config.optim.lr for s in waves[0]} == {1e-3}  # meanwhile
  assert {s.config.train.rows for s in waves[-1]} == {320}
  assert found.id == entry.id and found.stage == 'grid'
  assert found.config.optim.lr == 1e-2
  assert found.config.loss.l0_coef == pytest.approx(0.025, rel=0.05)
  assert found.config.train.rows == 1280 and found.k == 4


@pytest.mark.parametrize(
  'act, target, best',
  [('topk', 0.0, 1e-2), ('jumprelu', 0.0, 1e-3), ('jumprelu', 6.0, 1e-3)],
)
def test_rates_compare_by_the_loss_they_were_trained_on(
  store, act, target, best
):
  config = studies.base(
    store, **{'act.name': act, 'loss.target_l0': target, 'loss.l0_coef': 0.1}
  )
  changes = {'optim.lr': Halving((1e-3, 1e-2), rows=320)}
  (entry,) = grid.entries(config, [changes])
  trials = grid.resolve(config, entry, lambda id: None)
  assert isinstance(trials, list)
  # The higher rate has the better FVU, with twice the latents.
  gave = {1e-3: (0.4, 8.0), 1e-2: (0.3, 16.0)}
  ended = {}
  for spec in trials:
    error, l0 = gave[spec.config.optim.lr]
    ended[spec.id] = {'fvu': error, 'mse': error, 'l0': l0}
  found = grid.resolve(config, entry, ended.get)
  assert isinstance(found, grid.Spec) and found.config.optim.lr == best
