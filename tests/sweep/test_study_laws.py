"""From the tables of a study to laws.json, on studies whose laws are known."""

import json

import numpy as np
import pytest
from absl import flags
from programs import program

from sae_jax.errors import UserError
from sae_jax.scaling import envelope
from sae_jax.sweep import laws_text, report, slices, tables
from sae_jax.sweep import study as study_folder
from sae_jax.sweep.advice import Settings, rounded
from sae_jax.sweep.study_laws import study_laws
from sae_jax.sweep.tables import Mark, Point

D, BATCH = 64, 1024
WIDTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
# L(N, R) = E + A N^-a + B R^-b: the best N is C^(b / (a + b)) up to a factor.
E, A, ALPHA, B, BETA = 0.1, 2.0, 0.35, 800.0, 0.7


def loss_of(n, rows, k=32.0):
  return (E + A * n**-ALPHA + B * rows**-BETA) * (32 / k) ** 0.2


def point(n, k=32.0, seed=0, rows=2**25, loss=None, **kw):
  fvu = loss_of(n, rows, k) if loss is None else loss
  is_ = dict(
    point=f'{n}-{k}-{seed}-{rows}-{kw.get("lr")}-{kw.get("stage")}',
    state='done', reason='', stage='grid', changes='{}', activation='topk',
    d_in=D, latents=n, k=k, l0_coef=0.0, lr=1e-3, seed=seed, batch_rows=BATCH,
    rows=rows, rows_done=rows, fvu=fvu, l0=k, mse=0.5 * fvu, dead_share=0.0,
    delta_loss=None, delta_loss_se=None, loss_recovered=None,
    flops=12.0 * D * n * rows, flops_executed=2.0 * D * n * rows,
    seconds=1e-9 * n * rows, device_hours=1.0, members=1, folder='nowhere',
  )  # fmt: skip
  return Point(**(is_ | kw))


def marks_of(p, count=40):
  """The curve of a point: exactly the law, times what its loss is off it."""
  off = p.fvu / loss_of(p.latents, p.rows, p.k)
  return [
    Mark(
      p.point, int(r / BATCH), int(r), 12.0 * D * p.latents * int(r),
      2.0 * D * p.latents * int(r), 1e-9 * p.latents * r,
      off * loss_of(p.latents, int(r), p.k), p.k, 1.0,
    )
    for r in np.geomspace(2**14, p.rows, count)
  ]  # fmt: skip


def study(ks=(32.0,), widths=WIDTHS, noise=0.0, seeds=1, **kw):
  rng, points, marks = np.random.default_rng(0), [], []
  for k in ks:
    for n in widths:
      for seed in range(seeds):
        p = point(n, k, seed, **kw)
        p = p._replace(fvu=p.fvu * np.exp(noise * rng.standard_normal()))
        points.append(p)
        marks += marks_of(p)
  return points, marks


def fits_of(found):
  return {fit['name']: fit for fit in found['fits']}


def found_of(points, marks, **kw):
  return study_laws(points, marks, Settings(**({'resamples': 100} | kw)))


def test_a_study_without_noise_gives_its_laws():
  points, marks = study(ks=(16.0, 32.0, 64.0))
  found = found_of(points, marks)
  fits = fits_of(found)
  converged = fits['L(N)|k=32']['params']
  at_the_end = E + B * (2**25) ** -BETA
  assert converged['E']['value'] == pytest.approx(at_the_end, rel=1e-6)
  assert converged['A']['value'] == pytest.approx(A, rel=1e-6)
  assert converged['alpha']['value'] == pytest.approx(ALPHA, rel=1e-6)
  best = fits['N_opt(C)|k=32']['params']['p']['value']
  assert best == pytest.approx(BETA / (ALPHA + BETA), abs=0.02)
  rows = fits['rows_opt(C)|k=32']['params']['p']['value']
  assert rows == pytest.approx(ALPHA / (ALPHA + BETA), abs=0.02)
  compute = fits['L(C)|k=32']['params']
  assert compute['E']['value'] == pytest.approx(E, rel=0.05)
  slope = ALPHA * BETA / (ALPHA + BETA)
  assert compute['alpha']['value'] == pytest.approx(slope, rel=0.05)
  joint = fits['L(N, K)|topk']
  assert joint['params']['eta']['value'] == pytest.approx(-0.2, abs=1e-4)
  assert joint['exponent']['value'] == pytest.approx(ALPHA, rel=1e-4)
  assert set(joint['curves']) == {'16', '32', '64'}
  assert {f['verdict'] for f in found['fits']} == {'ok'}


def test_the_envelope_is_the_least_loss_there_is():
  _, marks = study()
  best = envelope.optima(_curves_of(marks))
  for o in best:
    n = np.geomspace(64, 2**20, 20_000)
    loss = loss_of(n, o.flops / (12 * D * n))
    at = np.argmin(loss)
    if o.edge:
      continue
    assert o.loss == pytest.approx(loss[at], rel=2e-3)
    assert o.latents == pytest.approx(n[at], rel=0.1)
    assert o.rows == pytest.approx(o.flops / (12 * D * o.latents), rel=0.02)
  assert sum(not o.edge for o in best) >= 4


def _curves_of(marks):
  points = {m.point: [] for m in marks}
  for m in marks:
    points[m.point].append(m)
  curves = [
    envelope.curve(
      int(name.split('-')[0]), [m.flops for m in of], [m.fvu for m in of],
      [m.rows for m in of], [m.seconds for m in of],
    )
    for name, of in points.items()
  ]  # fmt: skip
  return [c for c in curves if c]


def test_shaken_curves_move_their_optima():
  _, marks = study()
  curves = _curves_of(marks)
  best = envelope.thinned(envelope.optima(curves), curves)
  still = envelope.shaken(curves, best, np.zeros(3), 0)
  for change in still.values():
    np.testing.assert_allclose(change, 0, atol=1e-9)
  moved = envelope.shaken(curves, best, np.full(4000, 0.01), 0)
  assert moved['loss'].shape == (4000, len(best))
  assert 0.003 < moved['loss'].std() < 0.012
  assert moved['latents'].std() > 5 * moved['loss'].std()  # it is flat there
  seeds = [c._replace(seed=seed) for c in curves for seed in range(4)]
  four = envelope.shaken(seeds, best, np.full(4000, 0.01), 0)
  half = four['loss'].std() / moved['loss'].std()
  assert half == pytest.approx(0.5, abs=0.06)
  again = curves * 4  # the same runs: no less noise, and no more optima
  same = envelope.shaken(again, best, np.full(4000, 0.01), 0)
  np.testing.assert_allclose(same['loss'], moved['loss'], atol=1e-9)
  assert envelope.thinned(envelope.optima(again), again) == best
  # Neighbours share curves: their changes are correlated.
  assert np.corrcoef(moved['loss'][:, :2].T)[0, 1] > 0.3


def test_shorter_runs_of_a_seed_are_no_other_runs():
  points, marks = study(noise=0.02)
  again = [
    point(p.latents, rows=r, loss=p.fvu / loss_of(p.latents, p.rows)
          * loss_of(p.latents, r))
    for p in points
    for r in (2**23, 2**24)
  ]  # fmt: skip
  more = [m for p in again for m in marks_of(p)]
  one, other = (
    fits_of(found_of(points + a, marks + b, resamples=400))
    for a, b in (([], []), (again, more))
  )
  width = lambda fit: fit['exponent']['high'] - fit['exponent']['low']
  for name in ('N_opt(C)|k=32', 'L(C)|k=32'):
    assert len(one[name]['points']) == len(other[name]['points'])
    assert width(other[name]) == pytest.approx(width(one[name]), rel=0.1)


def test_an_envelope_of_unknown_noise_is_undetermined():
  few = study(widths=WIDTHS[2:5], noise=0.01)
  more = study(widths=WIDTHS[3:], ks=(64.0,))
  found = fits_of(found_of(*map(sum, zip(few, more, strict=True), ([], []))))
  assert found['L(N)|k=32']['verdict'] == 'too few points'
  for name in ('N_opt(C)', 'rows_opt(C)', 'L(C)'):
    fit = found[f'{name}|k=32']
    assert fit['verdict'] == 'undetermined'
    assert 'the noise of single runs is not known' in fit['why']
    assert 'not known' not in found[f'{name}|k=64']['why']
  spread = lambda fit: fit['exponent']['high'] - fit['exponent']['low']
  seeds = [
    point(512, k=64.0, seed=s, loss=1 + 0.002 * (s % 2)) for s in range(12)
  ]
  points = few[0] + more[0] + [p._replace(rows=2**14) for p in seeds]
  told = fits_of(found_of(points, few[1] + more[1]))['N_opt(C)|k=32']
  assert 'not known' not in told['why']
  assert spread(told) > 1.5 * spread(found['N_opt(C)|k=32'])


def test_computes_whose_best_width_is_an_edge_are_left_out_of_n_opt():
  points, marks = study(widths=WIDTHS[3:])
  found = found_of(points, marks)
  [lines] = found['envelopes']
  assert any(lines['edge']) and not all(lines['edge'])
  fit = fits_of(found)['N_opt(C)|k=32']
  for p in fit['points']:
    assert not lines['edge'][lines['flops'].index(p['x'])]
  assert len(fit['points']) == 5
  assert f'at {sum(lines["edge"])} of' in fit['warnings'][0]


def test_one_k_never_meets_another_in_an_envelope():
  points, marks = study(ks=(16.0, 64.0))
  both = found_of(points, marks)['envelopes']
  for k, one in zip((16.0, 64.0), both, strict=True):
    [alone] = found_of(*study(ks=(k,)))['envelopes']
    assert one == alone and one['slice'] == {'activation': 'topk', 'k': k}


def test_executed_flops_are_another_axis():
  points, marks = study()
  one, other = (
    found_of(points, marks, flops=f)['envelopes'][0]['flops']
    for f in ('published', 'executed')
  )
  np.testing.assert_allclose(one, np.multiply(other, 6))


def test_with_decay_only_ends_of_runs_count():
  points, marks = study()
  fits = fits_of(found_of(points, marks, decayed=True))
  assert fits['L(C)|k=32']['verdict'] == 'too few points'
  longer = [
    point(n, rows=2**r) for n in WIDTHS for r in (15, 17, 19, 21, 23, 25)
  ]
  spoilt = [m._replace(fvu=5.0) for p in longer for m in marks_of(p)]
  fit = fits_of(found_of(longer, spoilt, decayed=True))['N_opt(C)|k=32']
  expected = BETA / (ALPHA + BETA)
  assert fit['params']['p']['value'] == pytest.approx(expected, abs=0.05)


def test_time_to_target():
  points, marks = study()
  found = found_of(points, marks)['time_to_target']
  by = {(line['target'], line['latents']): line for line in found}
  target = sorted({line['target'] for line in found})[1]
  assert by[target, 512]['flops'] is None and by[target, 512]['seconds'] is None
  n = 32768
  rows = ((target - E - A * n**-ALPHA) / B) ** (-1 / BETA)
  assert by[target, n]['flops'] == pytest.approx(12 * D * n * rows, rel=0.02)
  assert by[target, n]['seconds'] == pytest.approx(1e-9 * n * rows, rel=0.05)


def test_what_has_not_converged_is_said():
  quick = fits_of(found_of(*study()))['L(N)|k=32']
  assert not quick['warnings']
  fell = {c['latents']: c['fall'] for c in quick['convergence']}
  half = 1 - loss_of(512, 2**25) / loss_of(512, 2**24)
  assert fell[512] == pytest.approx(half, rel=0.05)
  short = fits_of(found_of(*study(rows=2**18)))['L(N)|k=32']
  assert 'not converged: over the last doubling' in short['warnings'][0]
  points, _ = study()
  blind = fits_of(found_of(points, []))['L(N)|k=32']
  assert 'convergence is not known' in blind['warnings'][0]


def test_short_runs_do_not_say_that_long_ones_fall():
  points, marks = study(rows=2**26)
  short, more = study(rows=2**18)
  fit = lambda points: fits_of(found_of(points, marks + more))['L(N)|k=32']
  both = fit(points + short)
  assert not both['warnings'] and {p['x'] for p in both['points']} == set(
    WIDTHS
  )
  at_the_end = E + B * (2**26) ** -BETA
  assert both['params']['E']['value'] == pytest.approx(at_the_end, rel=1e-6)
  # One long run is missing: the others are fitted, not all the short ones.
  lacking = fit([p for p in points if p.latents != 1024] + short)
  assert lacking['params']['E']['value'] == pytest.approx(at_the_end, rel=1e-6)
  assert [p['x'] for p in lacking['points']] == [512, *WIDTHS[2:]]
  assert '1 of 7 widths still fell' in lacking['warnings'][0]
  assert 'which most widths have; 1 has not' in lacking['warnings'][1]


def test_ends_alone_are_compared_at_equal_rows():
  points = [
    point(n, seed=seed, rows=r, delta_loss=loss_of(n, r))
    for n, seed, r in [(n, 0, 2**20) for n in WIDTHS] + [(32768, 1, 2**22)]
  ]
  fit = fits_of(found_of(points, [], metric='delta_loss'))['L(N)|k=32']
  assert fit['params']['alpha']['value'] == pytest.approx(ALPHA, rel=1e-6)
  assert 'convergence is not known' in fit['warnings'][0]


def test_the_joint_law_compares_k_at_rows_that_all_have():
  points, marks = study(ks=(16.0,), rows=2**18)
  long, more = study(ks=(32.0,), rows=2**26)
  fit = fits_of(found_of(points + long, marks + more))['L(N, K)|topk']
  assert fit['params'] is None
  assert 'k=16: not converged' in fit['warnings'][0]
  assert 'no number of rows was trained at every k' in fit['warnings'][1]
  short = [point(n, rows=2**18) for n in WIDTHS]
  fits = fits_of(found_of(points + long + short, marks + more))
  assert fits['L(N, K)|topk']['params']['eta']['value'] == pytest.approx(
    -0.2, abs=1e-4
  )
  assert '262,144 rows' in fits['L(N, K)|topk']['warnings'][1]
  assert not fits['L(N)|k=32']['warnings']


def test_seeds_give_the_noise_and_intervals_never_assume_less():
  found = found_of(*study(seeds=4, noise=0.05))
  assert found['seed_noise'] == pytest.approx(0.05, rel=0.35)
  assert len(fits_of(found)['L(N)|k=32']['points']) == 28
  exact, marks = study(widths=WIDTHS[:5])
  noisy = [point(512, seed=s, loss=l) for s, l in ((1, 0.3), (2, 0.33))]
  width = lambda fit: fit['exponent']['high'] - fit['exponent']['low']
  alone = fits_of(found_of(exact, marks))['L(N)|k=32']
  noise = found_of(exact, marks)['seed_noise']
  assert noise is None
  other = [p._replace(changes='{"store.site": "x"}') for p in noisy]
  told = found_of(exact + other, marks)
  assert told['seed_noise'] == pytest.approx(np.log(1.1) / 2**0.5)
  fit = next(f for f in told['fits'] if f['name'] == 'L(N)|k=32')
  assert width(fit) > 100 * width(alone)


def test_what_makes_runs_replicates():
  noise = lambda *points: slices.seed_noise(points, 'fvu')
  a, b = point(512, loss=0.3), point(512, seed=1, loss=0.33)
  assert noise(a, b).scale == pytest.approx(np.log(1.1) / 2**0.5)
  changed = lambda key, v: b._replace(changes=json.dumps({key: v}))
  for key in ('mesh.data', 'train.log_rows', 'train.eval_size', 'train.keep'):
    assert noise(a, changed(key, 2)) == noise(a, b)
  for key in ('train.micro_batches', 'train.compute_dtype', 'optim.b1'):
    assert noise(a, changed(key, 2)) is None
  # A coefficient that was found for an L0 is another for each seed.
  a, b = (
    p._replace(activation='jumprelu', l0_coef=c) for p, c in ((a, 1), (b, 2))
  )
  assert noise(a, b).free == 1
  assert noise(*(p._replace(k=None) for p in (a, b))) is None
  assert noise(*(p._replace(stage='trial') for p in (a, b))) is None
  aimed = json.dumps({'loss.target_l0': 32.0})  # by the loss: c was chosen
  assert noise(*(p._replace(changes=aimed) for p in (a, b))) is None


def test_noise_that_moves_the_optimum_far_is_said():
  for noise, said in ((0.005, ''), (0.1, 'the noise of runs moves points by')):
    fit = fits_of(found_of(*study(noise=noise)))['N_opt(C)|k=32']
    assert said in fit['why'] and fit['verdict'] != ('ok' if said else '')
    assert bool(fit['why']) == bool(said)


def test_what_is_left_out_is_counted():
  points, marks = study()
  points += [
    point(64, state='failed'), point(65, state='failed'),
    point(66)._replace(fvu=None), point(67, loss=float('nan')),
    point(68, loss=0.0), point(69, state='running'),
  ]  # fmt: skip
  found = found_of(points, marks)
  assert found['left_out'] == (
    '6 of 13 points are left out: 2 failed, 2 have no fvu, 1 has a fvu of 0 or '
    'less, 1 running'
  )
  assert {p['x'] for p in fits_of(found)['L(N)|k=32']['points']} == set(WIDTHS)


def test_learning_rates():
  best = {n: 0.03 * n**-0.4 for n in WIDTHS}
  bowl = lambda f: 0.2 * np.exp(0.1 * np.log(f) ** 2)
  tried = [
    point(n, lr=best[n] * f, loss=bowl(f), stage='trial', rows=2**20)
    for n in WIDTHS
    for f in (0.3, 0.7, 1.5, 4.0)
  ]  # fmt: skip
  points, marks = study(widths=WIDTHS[:5])
  found = found_of(points + tried, marks, budget_flops=1e14)
  fit = fits_of(found)['lr_opt(N)|k=32']
  assert fit['params']['p']['value'] == pytest.approx(-0.4, abs=1e-6)
  assert fit['params']['a']['value'] == pytest.approx(0.03, rel=1e-6)
  assert len(fits_of(found)['L(N)|k=32']['points']) == 5  # trials are not in it
  said = (
    'at 5 of 7 widths learning rates were compared on fewer rows than the '
    'longest runs have (1,048,576 of 33,554,432 at 512 latents)'
  )
  assert fit['warnings'][0].startswith(said)
  [advice] = found['recommendation']
  expected = 0.03 * advice['latents'] ** -0.4
  assert advice['lr'] == pytest.approx(expected, rel=1e-6)


def test_learning_rates_of_the_longest_runs_that_tell():
  tried = [
    point(512, lr=lr, loss=0.2 + abs(np.log(lr / best)), rows=rows)
    for best, rows, lrs in (
      (1e-3, 2**20, (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
      (2e-3, 2**22, (1e-3, 2e-3, 4e-3)),
      (3e-3, 2**23, (1e-3, 2e-3, 3e-3)),
      (3e-3, 2**24, (2e-3, 3e-3)),
    )
    for lr in lrs
  ]
  [(_, lr)], said = slices.best_lrs(tried, 'fvu')
  assert lr == pytest.approx(2e-3)
  assert '(4,194,304 of 16,777,216 at 512 latents)' in said[0]


def test_trials_at_a_coefficient_are_tried_for_every_l0():
  points, marks = study(ks=(16.0, 32.0))
  found = lambda p: p._replace(activation='jumprelu', l0_coef=1 / (p.k or 1))
  bowl = lambda f: 0.2 * np.exp(0.1 * np.log(f) ** 2)
  trials = [
    point(n, k=None, lr=1e-3 * f * at, loss=bowl(f), stage='trial', rows=2**20,
          activation='jumprelu', l0_coef=c, l0=l0)
    for n in WIDTHS[::2]
    for f in (0.5, 1.0, 2.0)
    for c, l0, at in ((0.1, 15.0, 1), (0.01, 33.0, 2))
  ]  # fmt: skip
  fits = fits_of(found_of([found(p) for p in points] + trials, marks))
  for k, at in ((16, 1e-3), (32, 2e-3)):  # by the trials nearest to that L0
    fit = fits[f'lr_opt(N)|k={k}']
    assert [p['y'] for p in fit['points']] == pytest.approx([at] * 4)


def test_an_optimum_at_the_edge_is_no_optimum():
  tried = [
    point(n, lr=lr, loss=0.2 - lr)
    for n in (512, 1024)
    for lr in (0.1, 0.05, 0.01)
  ] + [point(2048, lr=lr) for lr in (0.1, 0.2)]  # fmt: skip
  found, said = slices.best_lrs(tried, 'fvu')
  assert not found and len(said) == 3
  assert (
    'the largest, 0.1: the optimum lies at the edge; try rates above' in said[0]
  )
  assert 'at 2,048 latents 2 learning rates were tried' in said[2]


def test_rates_may_be_tried_at_some_widths_only():
  points, marks = study()
  tried = [
    point(n, lr=lr, loss=1.1 * loss_of(n, 2**25))
    for n in WIDTHS[::2]
    for lr in (5e-4, 2e-3)
  ]
  fit = fits_of(found_of(points + tried, marks))['lr_opt(N)|k=32']
  assert [p['x'] for p in fit['points']] == list(WIDTHS[::2])
  assert not fit['warnings']


def test_each_width_has_its_best_setting_and_longest_runs():
  points, marks = study()
  worse = [
    point(n, lr=5e-3, loss=2 * loss_of(n, 2**25)) for n in WIDTHS
  ] + [point(n, rows=2**16) for n in WIDTHS]  # fmt: skip
  fit = fits_of(found_of(points + worse, marks))['L(N)|k=32']
  assert fit['params']['alpha']['value'] == pytest.approx(ALPHA)
  assert fit['params']['A']['value'] == pytest.approx(A)


def test_runs_of_several_lengths_that_fall_still_are_compared_at_one():
  rows = 2**18
  points, marks = study(rows=rows)
  more, more_marks = study(widths=WIDTHS[:3], rows=4 * rows)
  fit = fits_of(found_of(points + more, marks + more_marks))['L(N)|k=32']
  at_the_end = E + B * rows**-BETA
  assert fit['params']['E']['value'] == pytest.approx(at_the_end, rel=1e-6)
  assert fit['params']['alpha']['value'] == pytest.approx(ALPHA, rel=1e-6)
  assert any('after 262,144 rows are fitted' in w for w in fit['warnings'])


def test_held_out_prediction():
  fit = fits_of(found_of(*study(noise=0.01)))['L(N)|k=32']
  held = fit['held_out']
  assert held['x'] == WIDTHS[-1]
  assert held['measured'] == fit['points'][-1]['y']
  assert held['low'] < held['measured'] < held['high']
  assert held['error'] == pytest.approx(
    held['predicted'] / held['measured'] - 1
  )
  points, marks = study()
  odd = [p._replace(fvu=2 * p.fvu) if p.latents == 32768 else p for p in points]
  held = fits_of(found_of(odd, marks))['L(N)|k=32']['held_out']
  assert held['predicted'] == pytest.approx(held['measured'] / 2)
  # Points of an envelope share runs with their neighbours.
  for name in ('L(C)', 'N_opt(C)', 'rows_opt(C)'):
    assert fits_of(found_of(points, marks))[f'{name}|k=32']['held_out'] is None


def test_recommendation_and_prediction_beyond_the_grid():
  points, marks = study(noise=0.003)
  largest = max(found_of(points, marks)['envelopes'][0]['flops'])
  budget = 30 * largest
  found = found_of(points, marks, predict_latents=65536, budget_flops=budget)
  [one] = found['predictions']
  assert one['beyond'] == 2 and not one['warnings']
  at_the_end = loss_of(65536, 2**25)
  assert one['low'] < at_the_end < one['high']
  assert one['predicted'] == pytest.approx(at_the_end, rel=0.02)
  [advice] = found['recommendation']
  assert advice['beyond'] == pytest.approx(30)
  assert '30x beyond the largest compute measured' in advice['warnings'][0]
  assert advice['latents'] == 2 ** round(np.log2(advice['latents']))
  assert advice['latents_low'] < advice['latents_high']
  used = 12 * D * advice['latents'] * advice['rows']
  assert used == pytest.approx(budget, rel=1e-6)
  n = np.geomspace(512, 2**24, 50_000)
  true = loss_of(n, budget / (12 * D * n))
  assert 0.5 < advice['latents'] / n[np.argmin(true)] < 2
  assert advice['predicted'] == pytest.approx(true.min(), rel=0.1)


def test_advice_has_the_warnings_of_its_laws():
  [one] = found_of(*study(rows=2**18), predict_latents=65536)['predictions']
  assert any('not converged' in warning for warning in one['warnings'])
  found = found_of(*study(widths=WIDTHS[3:]), budget_flops=1e14)
  [edges] = fits_of(found)['N_opt(C)|k=32']['warnings']
  [advice] = found['recommendation']
  assert advice['warnings'].count(edges) == 1


def test_rounding():
  assert rounded(3000, 0) == 4096 and rounded(2800, 0) == 2048
  assert rounded(3000, 768) == 3072 and rounded(100, 768) == 768


def test_too_few_points_are_listed_and_none_at_all_is_an_error():
  points, marks = study(widths=WIDTHS[:4])
  few = [point(n, k=64.0) for n in WIDTHS[:2]]
  fits = fits_of(found_of(points + few, marks))
  fit = fits['L(N)|k=64']
  assert fit['verdict'] == 'too few points' and fit['params'] is None
  assert fit['why'] == (
    'too few points: 2 of 4 needed (3 parameters and one to judge by)'
  )
  with pytest.raises(
    UserError, match='no law can be fitted: too few points: 2'
  ):
    found_of(few, [])
  with pytest.raises(UserError, match='no point can be used; 1 of 1 points is'):
    found_of([point(512, state='failed')], [])


@pytest.mark.parametrize(
  ('kw', 'said'),
  [
    ({'metric': 'loss'}, '--metric=loss: give one of fvu, mse, delta_loss'),
    ({'flops': 'all'}, '--flops=all: give one of published, executed'),
    ({'level': 90}, '--level=90: give 0.5 or more, below 1'),
  ],
)
def test_bad_settings(kw, said):
  with pytest.raises(UserError, match=said):
    found_of(*study(), **kw)


def test_an_l0_off_its_target_is_said():
  points, marks = study()
  off = [p._replace(l0=50.0) if p.latents == 512 else p for p in points]
  fit = fits_of(found_of(off, marks))['L(N)|k=32']
  assert any(
    '1 of 7 points are more than 10% off' in w for w in fit['warnings']
  )


def _program(monkeypatch, points, marks, *args):
  monkeypatch.setattr(tables, 'read', lambda _: (points, marks))
  store = {'site': 'layer_9.resid_post', 'path': 'stores/s'}
  monkeypatch.setattr(
    study_folder, 'read_study', lambda _: {'config': {'store': store}}
  )

  def write(folder, *shown):
    (folder / 'study.html').write_text(str(shown[-1]))
    return folder / 'study.html'

  monkeypatch.setattr(report, 'write', write)
  with program('launch/fit_laws.py') as module:
    flags.FLAGS(['fit_laws', *args])
    module.main()


def test_the_program(monkeypatch, tmp_path, capsys):
  points, marks = study(ks=(16.0, 32.0, 64.0), noise=0.01, widths=WIDTHS[:5])
  points += [point(512, state='failed')]
  args = (
    f'--study={tmp_path}', '--predict_latents=65536', '--budget_flops=1e18',
  )  # fmt: skip
  _program(monkeypatch, points, marks, *args)
  printed = capsys.readouterr().out
  found = json.loads((tmp_path / 'laws.json').read_text())
  assert found['format'] == 'sae_jax.laws' and found['version'] == 1
  assert printed.startswith(laws_text.text(found) + '\n\nreport: ')
  assert '1 of 16 points is left out: 1 failed' in printed
  text = (tmp_path / 'laws.json').read_text()
  assert 'NaN' not in text and 'Infinity' not in text
  _program(monkeypatch, points, marks, *args)  # and the same again
  assert (tmp_path / 'laws.json').read_text() == text
  page = (tmp_path / 'study.html').read_text()
  for bad in ('--metric=fuv', '--level=90'):  # they leave what was good
    with pytest.raises(UserError, match=bad):
      _program(monkeypatch, points, marks, *args, bad)
    assert (tmp_path / 'laws.json').read_text() == text
    assert (tmp_path / 'study.html').read_text() == page
  with pytest.raises(UserError, match='no law can be fitted'):
    _program(monkeypatch, points, marks, *args, '--metric=delta_loss')
  shown = "{'metric': 'delta_loss', 'flops': 'published'}"
  assert (tmp_path / 'study.html').read_text() == shown
  assert not (tmp_path / 'laws.json').exists()


def test_decay_is_read_from_the_runs(monkeypatch, tmp_path):
  points, marks = study(ks=(16.0, 32.0))
  points = [p._replace(folder=str(tmp_path / 'run')) for p in points]
  envelope_of = lambda: json.loads((tmp_path / 'laws.json').read_text())[
    'envelopes'
  ][0]['flops']
  for decay_rows, some in ((0, True), (5, False)):
    (tmp_path / 'run').mkdir(exist_ok=True)
    config = {'optim': {'decay_rows': decay_rows}}
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(config))
    _program(monkeypatch, points, marks, f'--study={tmp_path}')
    assert bool(envelope_of()) == some
