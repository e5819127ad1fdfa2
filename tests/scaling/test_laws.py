"""The fitter, on points drawn from laws that are known."""

import time

import numpy as np
import pytest
from programs import program
from scipy import stats
from scipy.optimize import least_squares

from sae_jax.errors import UserError
from sae_jax.scaling import envelope, laws
from sae_jax.scaling.forms import IRREDUCIBLE, JOINT, POWER

WIDTHS = np.geomspace(512, 131072, 9)


with program('scripts/law_coverage.py') as coverage:
  pass  # what is tested here takes no flags
PUBLISHED = coverage.GPT4
GPT4_GRID = np.array([
  (2.0**n, k) for n in range(11, 20) for k in (8, 16, 32, 64, 128, 256, 512)
])  # fmt: skip


def _noisy(y, noise, seed=0):
  return y * np.exp(noise * np.random.default_rng(seed).standard_normal(len(y)))


def _values(found):
  return {name: e.value for name, e in laws.parameters(found).items()}


def test_without_noise_laws_come_back():
  found = laws.fit(IRREDUCIBLE, WIDTHS, 0.1 + 3 * WIDTHS**-0.4)
  assert _values(found) == pytest.approx({'E': 0.1, 'A': 3, 'alpha': 0.4})
  found = laws.fit(POWER, WIDTHS, 5 * WIDTHS**0.6)
  assert _values(found) == pytest.approx({'a': 5, 'p': 0.6})
  assert found.rms < 1e-12 and not laws.undetermined(found, 'it')


@pytest.mark.parametrize('floor', [1e-3, 0.02, 0.3, 0.9])
@pytest.mark.parametrize('alpha', [0.05, 0.3, 1.0, 2.0])
def test_any_irreducible_part_and_exponent_is_found(floor, alpha):
  x = np.geomspace(1e12, 1e19, 12)
  y = floor + 0.7 * (x / 1e12) ** -alpha
  found = laws.fit(IRREDUCIBLE, x, y, resamples=10)
  truth = {'E': floor, 'A': 0.7 * 1e12**alpha, 'alpha': alpha}
  assert _values(found) == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize(
  'law, theta, d', [(POWER, 2, 1), (IRREDUCIBLE, 3, 1), (JOINT, 6, 2)]
)
def test_derivatives(law, theta, d):
  rng = np.random.default_rng(0)
  theta, z = rng.standard_normal((4, theta)), rng.standard_normal((5, d))
  value, jacobian = law.value(theta, z)
  for i in range(theta.shape[1]):
    step = 1e-6 * np.eye(theta.shape[1])[i]
    moved = (
      law.value(theta + step, z)[0] - law.value(theta - step, z)[0]
    ) / 2e-6
    np.testing.assert_allclose(jacobian[..., i], moved, atol=1e-8)
  assert value.shape == (4, 5) and jacobian.shape == (4, 5, theta.shape[1])


def test_published_coefficients_of_the_joint_law_come_back():
  log_y = coverage.exact(JOINT, PUBLISHED, GPT4_GRID)
  found = laws.fit(JOINT, GPT4_GRID, np.exp(log_y))
  values = list(_values(found).values())
  np.testing.assert_allclose(values, PUBLISHED, rtol=1e-6)
  far = np.array([[2.0**24, 32.0], [2.0**21, 128.0]])
  exact = np.exp(coverage.exact(JOINT, PUBLISHED, far))
  for is_, true in zip(laws.predict(found, far), exact, strict=True):
    assert is_.value == pytest.approx(true, rel=1e-6)
  found = laws.fit(JOINT, GPT4_GRID, _noisy(np.exp(log_y), 1e-3))
  off = [np.log(is_.value) for is_ in laws.predict(found, GPT4_GRID)] - log_y
  assert abs(off).max() < 2e-3 and np.sqrt(np.mean(off**2)) < 5e-4
  for is_, true in zip(laws.predict(found, far), exact, strict=True):
    assert is_.value == pytest.approx(true, rel=5e-3)
    assert is_.low < true < is_.high


def test_the_least_is_the_least_that_scipy_finds():
  z = (np.log(WIDTHS) - np.log(WIDTHS).mean())[:, None]
  for seed in range(5):
    y = _noisy(0.1 + 3 * WIDTHS**-0.4, 0.05, seed)
    found = laws.fit(IRREDUCIBLE, WIDTHS, y, resamples=2)
    error = IRREDUCIBLE.value(found.theta[None], z)[0][0] - np.log(y)
    delta = 1.75 * np.median(np.sort(abs(error))[3:]) / 0.6745
    off = lambda theta: IRREDUCIBLE.value(theta[None], z)[0][0] - np.log(y)  # noqa: B023
    best = min(
      (
        least_squares(off, start, loss='huber', f_scale=delta, xtol=1e-14)
        for start in IRREDUCIBLE.starts(z, np.log(y))
      ),
      key=lambda r: r.cost,
    )
    np.testing.assert_allclose(found.theta[2], best.x[2], rtol=0.02)


def test_one_bad_point_of_many_does_little():
  y = _noisy(0.1 + 3 * WIDTHS**-0.4, 0.01)
  clean = laws.exponent(laws.fit(IRREDUCIBLE, WIDTHS, y))
  y[3] *= 1.5
  spoilt = laws.exponent(laws.fit(IRREDUCIBLE, WIDTHS, y))
  assert spoilt.value == pytest.approx(clean.value, abs=0.04)


def test_intervals_of_a_line_are_those_of_students_t():
  x = WIDTHS[::2]  # five points, three of them free: 2.35 s, not 1.64 s
  errors = 0.05 * np.array([1, -1, 0.1, -1, 1])  # which Huber leaves alone
  y = 5 * x**0.6 * np.exp(errors)
  found = laws.fit(POWER, x, y, resamples=4000)
  line = stats.linregress(np.log(x), np.log(y))
  half = stats.t.ppf(0.95, len(y) - 2) * line.stderr
  is_ = laws.exponent(found)
  assert is_.value == pytest.approx(line.slope, abs=0.01 * line.stderr)
  assert (is_.high - is_.low) / 2 == pytest.approx(half, rel=0.1)


def test_the_noise_of_few_points_is_hubers():
  """One of five residuals beyond delta, two parameters: K = 1.1, m = 0.8."""
  errors = np.array([0.1, -0.1, 0.1, -0.1, 5])
  psi = 4 * 0.1**2 + 0.2**2
  expected = 1.1 * np.sqrt(psi / 3) / 0.8
  assert laws._scale(errors, 0.2, 2) == pytest.approx(expected)


def test_the_same_seed_gives_the_same_intervals():
  y = _noisy(0.1 + 3 * WIDTHS**-0.4, 0.03)
  one, other = (laws.fit(IRREDUCIBLE, WIDTHS, y, seed=7) for _ in range(2))
  np.testing.assert_array_equal(one.draws, other.draws)
  assert laws.parameters(one) == laws.parameters(other)


def test_intervals_widen_with_level_noise_and_distance():
  y = _noisy(0.1 + 3 * WIDTHS**-0.4, 0.01)
  width = lambda e: np.log(e.high / e.low)
  at = np.array([2.0**17, 2.0**24])
  narrow = laws.predict(laws.fit(IRREDUCIBLE, WIDTHS, y, level=0.5), at)
  found = laws.fit(IRREDUCIBLE, WIDTHS, y)
  wide, single = laws.predict(found, at), laws.predict(found, at, measured=True)
  told = laws.predict(laws.fit(IRREDUCIBLE, WIDTHS, y, noise=0.1), at)
  assert width(narrow[0]) < width(wide[0]) < width(wide[1])
  assert width(wide[0]) < width(single[0])
  assert width(told[0]) > 3 * width(wide[0])


def test_a_grid_that_cannot_tell_says_so():
  x = np.geomspace(512, 4096, 5)
  found = laws.fit(IRREDUCIBLE, x, _noisy(0.1 + 3 * x**-0.4, 0.1))
  said = laws.undetermined(found, 'the range of latents')
  assert said.startswith(
    'the grid does not determine the exponent (90% interval'
  )
  assert 'widen the range of latents (now 512 to 4,096)' in said
  flat = laws.fit(POWER, x, _noisy(np.ones(5), 0.1))
  assert 'does not determine the exponent' in laws.undetermined(flat, 'it')
  assert laws.exponent(flat).low < 0 < laws.exponent(flat).high


def test_an_unknown_irreducible_part_is_said():
  x = np.geomspace(512, 131072, 30)
  found = laws.fit(IRREDUCIBLE, x, _noisy(0.1 + x**-0.08, 0.01))
  is_ = laws.exponent(found)
  assert is_.high < 3 * is_.low  # the exponent is known, roughly
  said = laws.undetermined(found, 'it')
  assert 'does not determine the irreducible loss' in said


@pytest.mark.parametrize(
  ('law', 'x', 'said'),
  [
    (IRREDUCIBLE, [512, 1024, 2048], '3 of 4 needed .3 parameters and one to'),
    (POWER, [512, 1024], '2 of 3 needed'),
    (IRREDUCIBLE, [512, 512, 1024, 1024], '2 different x, 3 needed'),
    (JOINT, [(n, 32) for n in range(1, 9)], '1 k with 3 different n, 2'),
    (
      JOINT,
      [(n, k) for n in (1, 2) for k in (1, 2, 3, 4)],
      '0 k with 3 different n',
    ),
  ],
)
def test_too_few_points(law, x, said):
  with pytest.raises(UserError, match=said):
    laws.fit(law, np.array(x, float), np.linspace(2, 1, len(x)))


def test_a_vertex():
  x = np.array([0.0, 1.0, 3.0])
  at, least = envelope.vertex(x, 2 * (x - 1.2) ** 2 + 0.5)
  assert (at, least) == pytest.approx((1.2, 0.5))


# The number of 30 draws that 85% coverage falls below once in 1000 times.
_LEAST = int(stats.binom.ppf(0.001, 30, 0.85))


@pytest.mark.parametrize('case', coverage.CASES)
@pytest.mark.slow
def test_intervals_hold_the_truth(case):
  line = coverage.measure(case, 0.03, 30, 0.9, seed=1)
  for name, covered in line['covered'].items():
    assert covered * 30 >= _LEAST, (name, covered)
  assert line['median_error'] < 0.5


def test_intervals_of_few_draws_hold_the_truth():
  began = time.process_time()
  line = coverage.measure('L(N), 12 points', 0.03, 12, 0.9, seed=1)
  assert line['covered']['exponent'] * 12 >= stats.binom.ppf(0.001, 12, 0.85)
  assert time.process_time() - began < 60
