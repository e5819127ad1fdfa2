"""Causal grouped-query attention in blocks of queries, and rotary positions.

A block sees the keys up to its own end only, and from its first window on: half
the products of the whole square, and never more than a block's scores in
memory.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.lm.config import LMConfig
from sae_jax.lm.layers import layout, linear, norm, product, softcap

BLOCK = 128  # least queries of a block
BLOCKS = 8  # most blocks: each is compiled by itself

Turn = tuple[jax.Array, jax.Array]  # cos, sin [T, head_dim / 2] float32


def attention(
  p: dict[str, jax.Array], cfg: LMConfig, layer: int, x: jax.Array, turn: Turn
) -> jax.Array:
  """Attention of a layer up to the heads' outputs.

  x [B, T, d] -> [B, T, heads * head_dim]; heads share keys in groups G:
  query head k * G + g reads key-value head k.
  """
  q, k, v = _heads(p, cfg, x)
  if cfg.qk_norm:
    q, k = norm(p['q_norm'], cfg, q), norm(p['k_norm'], cfg, k)
  q = jnp.transpose(_rotate(q, turn, cfg.attention_scale()), (0, 2, 3, 1, 4))
  k = jnp.transpose(_rotate(k, turn)[:, :, :, 0], (0, 2, 1, 3))
  v = jnp.transpose(v[:, :, :, 0], (0, 2, 1, 3))
  B, T, _ = x.shape
  size = max(BLOCK, -(-T // BLOCKS))
  window = cfg.window(layer)
  z = []
  for low in range(0, T, size):
    high = min(low + size, T)
    first = 0 if window is None else max(0, low - window + 1)
    seen = _seen(low, high, first, window)
    keys, values = k[:, :, first:high], v[:, :, first:high]
    z.append(_mix(q[:, :, :, low:high], keys, values, seen, cfg.attn_softcap))
  z = jnp.concatenate(z, axis=3) if len(z) > 1 else z[0]
  z = jnp.transpose(z, (0, 3, 1, 2, 4))
  return z.reshape(B, T, cfg.heads * cfg.head_dim)


def _heads(p, cfg: LMConfig, x: jax.Array):
  """q [B, T, K, G, h] and k, v [B, T, K, 1, h].

  Where a mesh splits the query heads further than there are key-value heads,
  those are repeated until K is a multiple of the parts.
  """
  B, T, _ = x.shape
  K, h = cfg.kv_heads, cfg.head_dim
  q, k, v = (linear(p, name, x) for name in 'qkv')
  k, v = k.reshape(B, T, K, 1, h), v.reshape(B, T, K, 1, h)
  return q.reshape(B, T, K, cfg.heads // K, h), k, v


def _seen(low: int, high: int, first: int, window: int | None) -> np.ndarray:
  """[high - low, high - first]: which keys the queries of a block see."""
  behind = np.arange(low, high)[:, None] - np.arange(first, high)
  return (behind >= 0) & (behind < (window or high))


def _mix(q, k, v, seen, cap: float | None) -> jax.Array:
  """softmax(q k) v: q [B, K, G, t, h], k and v [B, K, s, h] -> as q."""
  scores = softcap(product('bkgth,bksh->bkgts', q, k), cap)
  scores = jnp.where(seen, scores, -jnp.inf)
  top = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - top)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  z = product('bkgts,bksh->bkgth', weights.astype(v.dtype), v)
  return (z / total).astype(v.dtype)


def rotation(cfg: LMConfig, local: bool, T: int) -> Turn:
  """The turns of T positions in a layer with (`local`) or without a window."""
  local = local and cfg.rope_local_base is not None
  base = cfg.rope_local_base if local else cfg.rope_base
  half = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / cfg.head_dim
  frequency = 1.0 / np.float32(base) ** half
  s = cfg.rope_scaling
  if s is not None and not local:
    if s.kind == 'linear':
      frequency = frequency / s.factor
    else:
      # Turns made within the first training length; at most low_freq_factor
      # of them: stretched by the factor, at least high_freq_factor: kept.
      turns = s.original_length * frequency / (2 * np.pi)
      span = s.high_freq_factor - s.low_freq_factor
      keep = np.clip((turns - s.low_freq_factor) / span, 0, 1)
      frequency = frequency * (keep + (1 - keep) / s.factor)
  angle = np.outer(np.arange(T), frequency).astype(np.float32)
  return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: jax.Array, turn: Turn, scale: float = 1.0) -> jax.Array:
  """Turns x [B, T, K, G, h] by position; pairs are (i, i + h/2)."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = (scale * y[:, None, None] for y in turn)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
  return turned.astype(x.dtype)
