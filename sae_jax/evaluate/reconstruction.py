"""How well the SAE rebuilds held-out activations, and how often latents fire.

Per-row numbers come from the device in float32; every sum over rows is
float64 on the host, variance in centred form.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.errors import UserError
from sae_jax.evaluate.rows import Blocks, chunk_rows, chunks
from sae_jax.models.sae import SAE


class Reconstruction(NamedTuple):
  """Figures over held-out rows; x and x_hat in the model's units."""

  rows: int
  fvu: float  # sum |x - x_hat|^2 / sum |x - mean of these rows|^2
  mse: float  # mean over rows of |x - x_hat|^2, summed over the width
  variance: float  # mean over rows of |x - mean|^2
  cosine: float  # mean over rows of x . x_hat / (|x| |x_hat|)
  bias: float  # E|x_hat|^2 / E[x . x_hat]; 1 = no shrinkage
  l0: float  # mean active latents of a row
  fired: np.ndarray  # [F] int64: rows in which each latent was active

  @property
  def dead_share(self) -> float:
    """Share of the latents that were active in none of these rows."""
    return float(np.mean(self.fired == 0))

  @property
  def frequency(self) -> np.ndarray:
    """Share of the rows [F] in which each latent was active."""
    return self.fired / self.rows


@jax.jit
def _chunk_numbers(
  sae: SAE, x: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """([5, B] per-row numbers, [F] firings among the first `rows` rows)."""
  x = x.astype(jnp.float32)
  f = sae.encode(x)
  x_hat = sae.decode(f)
  active = (f != 0) & (jnp.arange(len(x)) < rows)[:, None]
  numbers = (
    jnp.square(x - x_hat).sum(-1),
    (x * x_hat).sum(-1),
    jnp.square(x).sum(-1),
    jnp.square(x_hat).sum(-1),
    active.sum(-1).astype(jnp.float32),
  )
  return jnp.stack(numbers), active.sum(0)


def reconstruction(
  sae: SAE,
  blocks: Blocks,
  *,
  width: int,
  limit: int,
) -> Reconstruction:
  """Figures over the first `limit` rows of (rows [n, D], tokens) blocks.

  FVU is against the mean of the same rows (Gemma Scope, arXiv 2408.05147,
  section 4); `bias` is Gated SAEs' gamma (arXiv 2404.16014, eq. 9). Raises
  UserError when there are no rows or a reconstruction is not finite.
  """
  latents = latent_count(sae, width)
  sums = np.zeros(4)  # |error|^2, x . x_hat, |x_hat|^2, L0
  cosine, fired = 0.0, np.zeros(latents, np.int64)
  moments = (0, np.zeros(width), 0.0)
  size = chunk_rows(latents)
  for chunk in chunks(blocks, size=size, limit=limit, label='reconstruction'):
    numbers, counts = _chunk_numbers(sae, chunk.x, np.int32(chunk.rows))
    numbers = np.asarray(numbers, np.float64)[:, : chunk.rows]
    error, dot, x_norm, hat_norm, l0 = numbers
    sums += [error.sum(), dot.sum(), hat_norm.sum(), l0.sum()]
    length = np.sqrt(x_norm * hat_norm)
    cosine += float((dot / np.where(length > 0, length, 1)).sum())
    fired += np.asarray(counts)
    moments = _merge(moments, chunk.x[: chunk.rows].astype(np.float64))
  rows, _, squares = moments
  if not rows:
    raise UserError(
      'the store holds no held-out rows: harvest with held_out_shards >= 1'
    )
  if not np.isfinite(sums).all():
    raise UserError(
      'the SAE gives reconstructions that are not finite: evaluate an '
      'earlier checkpoint'
    )
  return Reconstruction(
    rows=rows,
    fvu=_ratio(sums[0], squares),
    mse=float(sums[0] / rows),
    variance=squares / rows,
    cosine=cosine / rows,
    bias=_ratio(sums[2], sums[1]),
    l0=float(sums[3] / rows),
    fired=fired,
  )


def latent_count(sae: SAE, width: int) -> int:
  """F, found by tracing `encode` on a row of D = width."""
  row = jax.ShapeDtypeStruct((1, width), jnp.float32)
  return jax.eval_shape(sae.encode, row).shape[-1]


def _merge(moments, x: np.ndarray):
  """(rows, mean [D], sum |x - mean|^2) with the float64 rows x [n, D] added.

  Chan's update: nothing is subtracted that is large against the result.
  """
  n_a, mean_a, squares_a = moments
  n_b, mean_b = len(x), x.mean(0)
  n, step = n_a + n_b, mean_b - mean_a
  squares_b = np.square(x - mean_b).sum() + step @ step * n_a * n_b / n
  return n, mean_a + step * (n_b / n), float(squares_a + squares_b)


def _ratio(a: float, b: float) -> float:
  """a / b; not a number (null in the report) where b is zero."""
  return float(a / b) if b else float('nan')
