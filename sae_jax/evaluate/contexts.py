"""Where chosen latents fire: their highest-activating contexts.

Works from the store alone: rows carry their sequence and position, so that
neither the language model nor its weights are needed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from sae_jax.evaluate.reconstruction import latent_count
from sae_jax.evaluate.rows import Blocks, chunk_rows, chunks
from sae_jax.models.sae import SAE

BEFORE, AFTER = 16, 8  # tokens shown on either side of the peak


class Context(NamedTuple):
  """A stretch of one sequence around a latent's highest activation there."""

  sequence: int
  start: int  # position of the first token shown
  peak: int  # position of the highest activation
  ids: np.ndarray  # [w] token ids
  activations: np.ndarray  # [w] float32; nan where no row is stored


class LatentContexts(NamedTuple):
  """A latent's top contexts, best first, all of different sequences."""

  latent: int
  fired: int  # rows in which it was active
  frequency: float  # the same as a share of the rows
  contexts: list[Context]


class _Hit(NamedTuple):
  """Activation at one token; sorts as strongest first, then in text order."""

  minus_value: float
  sequence: int
  position: int


def choose_latents(fired: np.ndarray, n: int) -> np.ndarray:
  """n latents at even quantiles of log frequency, rarest first.

  fired [F]: rows in which each was active; latents with none are left out,
  so fewer than n may come back. Quantiles of log frequency are those of the
  counts, the logarithm being monotone.
  """
  order = np.argsort(fired, kind='stable')
  alive = order[fired[order] > 0]
  n = min(n, len(alive))
  return alive[((np.arange(n) + 0.5) / max(n, 1) * len(alive)).astype(int)]


def top_contexts(
  sae: SAE,
  read: Callable[[], Blocks],
  sequence_ids: Callable[[int], np.ndarray],
  fired: np.ndarray,
  *,
  rows: int,
  width: int,
  latents: int,
  each: int = 5,
) -> list[LatentContexts]:
  """The `each` best contexts of `latents` latents spread over frequencies.

  read() iterates over (rows [n, D], tokens [n, 3]) blocks from the start; it
  is called twice: to find the peaks among the first `rows` rows, then to
  gather the rows around them. sequence_ids(i) are the token ids [T] of
  sequence i. fired [F] counts firings over those `rows`.
  """
  chosen = choose_latents(fired, latents)
  size = chunk_rows(latent_count(sae, width))
  tops: list[list[_Hit]] = [[] for _ in chosen]
  for chunk in chunks(read(), size=size, limit=rows, label='features'):
    f = np.asarray(_activations(sae, chunk.x, chosen))[: chunk.rows]
    tops = [
      _merge(top, f[:, j], chunk.tokens, each) for j, top in enumerate(tops)
    ]
  windows = [[_window(hit, sequence_ids) for hit in top] for top in tops]
  _fill(sae, read(), windows, chosen, size)
  return [
    LatentContexts(
      int(latent), int(fired[latent]), float(fired[latent] / rows), contexts
    )
    for latent, contexts in zip(chosen, windows, strict=True)
  ]


@jax.jit
def _activations(sae: SAE, x: jax.Array, chosen: jax.Array) -> jax.Array:
  """f[:, chosen] [B, N] of rows x [B, D]."""
  return sae.encode(x.astype(np.float32))[:, chosen]


def _merge(
  top: list[_Hit], f: np.ndarray, tokens: np.ndarray, each: int
) -> list[_Hit]:
  """The best `each` sequences of a running list and one more chunk's f [n]."""
  full = len(top) == each
  rows = np.flatnonzero(f >= -top[-1].minus_value if full else f)
  hits = [
    _Hit(-float(f[r]), int(tokens[r, 0]), int(tokens[r, 1])) for r in rows
  ]
  best: dict[int, _Hit] = {}
  for hit in sorted(top + hits):
    best.setdefault(hit.sequence, hit)
  return list(best.values())[:each]


def _window(hit: _Hit, sequence_ids: Callable[[int], np.ndarray]) -> Context:
  """The tokens around a hit, activations still unknown."""
  ids = sequence_ids(hit.sequence)
  start = max(0, hit.position - BEFORE)
  ids = np.asarray(ids[start : hit.position + AFTER + 1])
  unknown = np.full(len(ids), np.nan, np.float32)
  return Context(hit.sequence, start, hit.position, ids, unknown)


def _fill(
  sae: SAE,
  blocks: Blocks,
  windows: list[list[Context]],
  chosen: np.ndarray,
  size: int,
) -> None:
  """Writes the activations of every stored row of the windows, in place."""
  wanted: dict[tuple[int, int], list[tuple[int, Context]]] = {}
  for j, contexts in enumerate(windows):
    for c in contexts:
      for position in range(c.start, c.start + len(c.ids)):
        wanted.setdefault((c.sequence, position), []).append((j, c))
  found = _gather(blocks, {sequence for sequence, _ in wanted}, set(wanted))
  gathered = chunks(found, size=size, limit=len(wanted), label='contexts')
  for chunk in gathered:
    f = np.asarray(_activations(sae, chunk.x, chosen))
    for i, (sequence, position, _) in enumerate(chunk.tokens[: chunk.rows]):
      for j, c in wanted[int(sequence), int(position)]:
        c.activations[position - c.start] = f[i, j]


def _gather(
  blocks: Blocks, sequences: set[int], places: set[tuple[int, int]]
) -> Blocks:
  """Only the rows at the wanted (sequence, position) places."""
  near = np.array(sorted(sequences))
  for rows, tokens in blocks:
    likely = np.flatnonzero(np.isin(tokens[:, 0], near))
    keep = [
      i for i in likely if (int(tokens[i, 0]), int(tokens[i, 1])) in places
    ]
    if keep:
      yield rows[keep], tokens[keep]
