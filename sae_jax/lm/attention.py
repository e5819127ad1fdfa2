"""Causal grouped-query attention in blocks of queries, and rotary positions.

A block sees the keys up to its own end only, and from its first window on: half
the products of the whole square, and never more than a block's scores in
memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.lm.config import LMConfig
from sae_jax.lm.layers import layout, linear, norm, product, softcap

# Queries worked on at once; and stretches of queries, each with keys of its own
# and compiled by itself: more of them save products (one computes the whole
# square, eight 9/16 of it) and take longer to compile.
BLOCK, STRETCHES = 128, 8
# A key that is not seen. Finite, so that a padded query that sees none has no
# NaN; exp of it is 0 beside any score.
UNSEEN = -1e30

Turn = tuple[jax.Array, jax.Array]  # cos, sin [T, head_dim / 2] float32


def attention(
  p: dict[str, jax.Array], cfg: LMConfig, layer: int, x: jax.Array, turn: Turn
) -> jax.Array:
  """Attention of a layer up to the heads' outputs.

  x [B, T, d] -> [B, T, heads * head_dim], split over heads as w_q is. Heads
  share keys in groups G: query head k * G + g reads key-value head k.
  """
  q, k, v = _heads(p, cfg, x)
  if cfg.qk_norm:
    q, k = norm(p['q_norm'], cfg, q), norm(p['k_norm'], cfg, k)
  q = _rotate(q, turn, cfg.attention_scale())
  q = jnp.transpose(q, (0, 2, 3, 1, 4))  # [B, K, G, T, h]: plain products
  k = jnp.transpose(_rotate(k, turn)[:, :, :, 0], (0, 2, 1, 3))
  v = jnp.transpose(v[:, :, :, 0], (0, 2, 1, 3))
  z = _blocks(q, k, v, cfg.window(layer), cfg.attn_softcap)
  return jnp.transpose(z, (0, 3, 1, 2, 4)).reshape(*x.shape[:2], -1)


def _heads(
  p: dict[str, jax.Array], cfg: LMConfig, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """q [B, T, K, G, h] and k, v [B, T, K, 1, h], split over K as w_q is.

  K is the number of key-value heads; where the query heads are split into more
  parts than those can be, they are repeated until the parts divide K.
  """
  q, k, v = (linear(p, name, x) for name in 'qkv')
  lies, parts, out = layout(q), 1, None
  if lies and lies[-1] is not None:
    parts = jax.typeof(q).sharding.mesh.shape[lies[-1]]
  if lies:
    out = jax.P(*lies, None, None)
  K = math.lcm(cfg.kv_heads, parts)
  shape = (*x.shape[:2], K, cfg.heads // K, cfg.head_dim)

  def split(y: jax.Array) -> jax.Array:
    if K == cfg.kv_heads:
      shape = (*x.shape[:2], K, 1, cfg.head_dim)
      return jnp.reshape(y, shape, out_sharding=out)
    y = y.reshape(*x.shape[:2], cfg.kv_heads, 1, cfg.head_dim)
    return jax.reshard(jnp.repeat(y, K // cfg.kv_heads, axis=2), out)

  return jnp.reshape(q, shape, out_sharding=out), split(k), split(v)


def _blocks(q, k, v, window: int | None, cap: float | None) -> jax.Array:
  """_mix of all queries [B, K, G, T, h] with the keys [B, K, T, h] they see."""
  T = q.shape[3]
  block = min(BLOCK, T)
  q = jnp.pad(q, [(0, 0)] * 3 + [(0, -T % block), (0, 0)])
  stretch = block * -(-T // (block * STRETCHES))
  z = []
  for low in range(0, T, stretch):
    high = min(low + stretch, q.shape[3])
    first = 0 if window is None else max(0, low - window + 1)
    # Keys before the stretch need no mask, unless for a window; its own do.
    keys = [
      (x, k[:, :, x:y], v[:, :, x:y])
      for x, y in ((first, low), (low, high))
      if x < y
    ]

    def mix(start, keys=keys):
      part = jax.lax.dynamic_slice_in_dim(q, start, block, axis=3)
      return _mix(part, start, keys, window, cap)

    if high - low == block:
      z.append(mix(low))
      continue
    many = jax.lax.map(mix, jnp.arange(low, high, block))
    z += [many[i] for i in range(len(many))]
  return jnp.concatenate(z, axis=3)[:, :, :, :T]


def _mix(q, start, keys, window: int | None, cap: float | None) -> jax.Array:
  """Softmax-weighted values of a block of queries, [B, K, G, t, h] as q.

  start: the first query's position. keys: consecutive pieces (position of the
  first, k, v [B, K, s, h]), of which only the last has keys after a query.
  """
  pieces = []
  for at, k, v in keys:
    scores = softcap(product('bkgth,bksh->bkgts', q, k), cap)
    if window is not None or at == keys[-1][0]:
      scores = jnp.where(_seen(scores, start - at, window), scores, UNSEEN)
    pieces.append((scores, jnp.max(scores, axis=-1, keepdims=True), v))
  top = functools.reduce(jnp.maximum, [most for _, most, _ in pieces])
  z, total = jnp.zeros(()), jnp.zeros(())
  for scores, _, v in pieces:
    weights = jnp.exp(scores - top)
    total = total + jnp.sum(weights, axis=-1, keepdims=True)
    z = z + product('bkgts,bksh->bkgth', weights.astype(v.dtype), v)
  # Dividing what comes out is h divisions a query instead of s.
  return (z / total).astype(q.dtype)


def _seen(scores: jax.Array, offset, window: int | None) -> jax.Array:
  """Which of s keys t queries see, [t, s]; query 0 is at key `offset`."""
  at = lambda axis: jax.lax.broadcasted_iota(np.int32, scores.shape[-2:], axis)
  behind = offset + at(0) - at(1)  # how far back the key lies
  seen = behind >= 0
  return seen if window is None else seen & (behind < window)


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
