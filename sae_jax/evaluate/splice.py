"""What the language model loses when the SAE speaks in place of its site.

Only positions the SAE was trained on are replaced, and only predictions made
from such a position are counted.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sae_jax.evaluate.rows import chunk_rows
from sae_jax.lm.config import LMConfig
from sae_jax.lm.model import forward, next_token_loss
from sae_jax.models.sae import SAE

_BATCH_TOKENS = 512  # tokens in one forward pass: 100 MB of logits at V=49152


class Splice(NamedTuple):
  """Cross-entropies in nats, over all counted predictions.

  Standard errors are those of a ratio estimated from whole sequences, which
  are drawn from the held-out split; None with fewer than two sequences.
  """

  sequences: int
  predictions: int
  ce_clean: float  # the model untouched
  ce_splice: float  # the reconstruction in place of the activation
  ce_zero: float  # zeros in place of the activation
  delta_loss: float  # ce_splice - ce_clean
  delta_loss_se: float | None
  loss_recovered: float  # (ce_zero - ce_splice) / (ce_zero - ce_clean)
  loss_recovered_se: float | None


def splice_loss(
  params: dict,
  cfg: LMConfig,
  sae: SAE,
  site: str,
  tokens: np.ndarray,
  trained: np.ndarray,
  *,
  pad: int | None = None,
  latents: int,
  bound: float = math.inf,
) -> Splice:
  """Delta loss and loss recovered at `site` over sequences tokens [n, T].

  trained [n, T] marks the positions whose activations the SAE was trained
  on: they alone are replaced, up to a norm of `bound`. A prediction counts when
  it is made from any of them, and its target, the next token, is not `pad`.
  Other special tokens count as targets: the model was trained to predict
  the end of a text.
  """
  counted = trained[:, :-1] & (tokens[:, 1:] != (-1 if pad is None else pad))
  batch = max(1, min(len(tokens), _BATCH_TOKENS // tokens.shape[1]))
  sums = []  # [3, batch] each: clean, splice, zero
  with tqdm(
    total=len(tokens), desc='language model', unit=' sequences', disable=None
  ) as bar:
    for start in range(0, len(tokens), batch):
      part = slice(start, start + batch)
      fed = [_pad_rows(a[part], batch) for a in (tokens, trained, counted)]
      out = sequence_losses(
        params, sae, *fed, bound, cfg=cfg, site=site, rows=chunk_rows(latents)
      )
      taken = len(tokens[part])
      sums.append(np.asarray(out, np.float64)[:, :taken])
      bar.update(taken)
  return summary(np.concatenate(sums, axis=1), counted.sum(1))


@jax.jit(static_argnames=('cfg', 'site', 'rows'))
def sequence_losses(
  params: dict,
  sae: SAE,
  tokens: jax.Array,
  trained: jax.Array,
  counted: jax.Array,
  bound: float = math.inf,
  *,
  cfg: LMConfig,
  site: str,
  rows: int,
) -> jax.Array:
  """Summed cross-entropy [3, B] of each sequence: clean, spliced, zeroed.

  tokens, trained [B, T]; counted [B, T-1], the predictions that are summed.
  The SAE sees `rows` rows at a time, so that no [B * T, F] array exists.
  """

  def reconstruct(x):
    code = lambda row: sae.decode(sae.encode(row))
    x_hat = jax.lax.map(code, x.reshape(-1, x.shape[-1]), batch_size=rows)
    return x_hat.reshape(x.shape).astype(x.dtype)

  def seen(x):
    norm = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
    return (trained & (norm <= bound))[..., None]

  def loss(replacement=None):
    edits = {}
    if replacement is not None:
      edits = {site: lambda x: jnp.where(seen(x), replacement(x), x)}
    logits = forward(params, cfg, tokens, edits=edits).logits
    assert logits is not None  # forward gives them unless told not to
    nats = next_token_loss(logits, tokens)
    return jnp.where(counted, nats, 0).sum(-1)

  return jnp.stack([loss(), loss(reconstruct), loss(jnp.zeros_like)])


def summary(sums: np.ndarray, counts: np.ndarray) -> Splice:
  """Figures from per-sequence sums [3, n] (nats) and prediction counts [n]."""
  clean, splice, zero = sums
  total = counts.sum()
  delta, delta_se = ratio(splice - clean, counts)
  recovered, recovered_se = ratio(zero - splice, zero - clean)
  return Splice(
    sequences=len(counts),
    predictions=int(total),
    ce_clean=float(clean.sum() / total),
    ce_splice=float(splice.sum() / total),
    ce_zero=float(zero.sum() / total),
    delta_loss=delta,
    delta_loss_se=delta_se,
    loss_recovered=recovered,
    loss_recovered_se=recovered_se,
  )


def ratio(a: np.ndarray, b: np.ndarray) -> tuple[float, float | None]:
  """sum(a) / sum(b) over n sequences and its standard error.

  Linearised: sqrt(n / (n - 1) * sum (a_i - r b_i)^2) / |sum b|, which is the
  standard error of the mean of a_i / b when all b_i are equal.
  """
  n, below = len(a), b.sum()
  if not below:
    return float('nan'), None
  r = a.sum() / below
  if n < 2:
    return float(r), None
  spread = np.sqrt(n / (n - 1) * np.square(a - r * b).sum())
  return float(r), float(spread / abs(below))


def _pad_rows(a: np.ndarray, rows: int) -> np.ndarray:
  """a [n, ...] with zero rows added up to `rows`: one shape, one program."""
  return np.pad(a, [(0, rows - len(a))] + [(0, 0)] * (a.ndim - 1))
