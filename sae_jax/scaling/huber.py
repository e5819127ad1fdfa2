"""Least Huber loss within bounds, for many starts or resamples at once."""

from collections.abc import Callable

import numpy as np

# (theta [S, p], z [n, d]) -> values [S, n] and their derivative [S, n, p]
Value = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def descend(
  value_of: Value,
  theta: np.ndarray,
  z: np.ndarray,
  target: np.ndarray,
  delta: np.ndarray | float,
  bounds: tuple[np.ndarray, np.ndarray],
  tolerance: float = 1e-10,
) -> tuple[np.ndarray, np.ndarray]:
  """Levenberg and Marquardt's method within bounds, for all [S, p] at once.

  theta [S, p], z [n, d], target [n] or [S, n], delta () or [S, 1]. A
  fit ends with a step that gains less than `tolerance` of its cost. Returns
  theta and the costs [S]. S small problems cost about as much as one.
  """
  low, high = bounds
  theta = np.clip(theta, low, high)
  target = np.broadcast_to(target, (len(theta), len(z)))
  delta = np.broadcast_to(delta, (len(theta), 1))
  costs, damping = np.full(len(theta), np.inf), np.full(len(theta), 1e-2)
  live, trial = np.arange(len(theta)), theta.copy()
  gradient = np.zeros_like(theta)
  hessian = np.zeros((*theta.shape, theta.shape[1]))
  for _ in range(60):
    value, jacobian = value_of(trial[live], z)
    error, bound = value - target[live], delta[live]
    cost = _huber(error, bound)
    gain = costs[live] - cost
    better = gain > 0
    settled = better & (gain <= tolerance * cost) | (damping[live] > 1e7)
    now = live[better]
    theta[now], costs[now] = trial[now], cost[better]
    weight = np.minimum(1, bound / np.maximum(abs(error), 1e-300))
    weighted = jacobian * weight[..., None]
    hessian[now] = (weighted.swapaxes(1, 2) @ jacobian)[better]
    gradient[now] = np.einsum('snp,sn->sp', weighted, error)[better]
    damping[live] *= np.where(better, 0.2, 5.0)
    live = live[~settled]
    if not len(live):
      break
    step = _step(
      theta[live], gradient[live], hessian[live], damping[live], bounds
    )
    trial[live] = np.clip(theta[live] + step, low, high)
  return theta, costs


def _huber(error: np.ndarray, delta: np.ndarray) -> np.ndarray:
  size = abs(error)
  inside = np.minimum(size, delta)
  return (inside * (size - inside / 2)).sum(-1)


def _step(theta, gradient, hessian, damping, bounds):
  """The damped Newton step; what a bound holds stays."""
  low, high = bounds
  held = (theta <= low) & (gradient > 0) | (theta >= high) & (gradient < 0)
  free = ~held
  hessian = hessian * free[:, :, None] * free[:, None, :]
  diagonal = np.einsum('spp->sp', hessian)
  largest = diagonal.max(-1, keepdims=True)
  extra = damping[:, None] * diagonal + 1e-13 * largest + held + 1e-300
  hessian = hessian + extra[..., None] * np.eye(theta.shape[1])
  step = np.linalg.solve(hessian, -(gradient * free)[..., None])[..., 0]
  return np.clip(step, -2, 2)
