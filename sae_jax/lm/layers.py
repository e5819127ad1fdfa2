"""The pieces of a decoder layer that know nothing of their neighbours.

Under an explicit mesh the rows of a tensor stay where the tokens are; its last
axis follows the weights (`model.specs`). Without a mesh nothing of that exists.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.lm.config import LMConfig

# Sums in float32 whatever the factors are. Besides being exact it is what the
# compiler has a fast bfloat16 kernel for on CPUs with AMX: 1650 GFLOP/s on two
# cores against 250 with a bfloat16 result (jax 0.10.2).
product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def layout(x: jax.Array) -> tuple[Any, ...] | None:
  """The mesh axis of each axis of x; None where there is no mesh."""
  sharding = jax.typeof(x).sharding
  if sharding.mesh.empty:
    return None
  axes = tuple(sharding.spec)  # may be shorter than ndim
  return axes + (None,) * (x.ndim - len(axes))


def rows_whole(x: jax.Array) -> jax.Array:
  """x [..., width] with all of its last axis on every device."""
  axes = layout(x)
  if axes is None or axes[-1] is None:
    return x
  return jax.reshard(x, jax.P(*axes[:-1], None))


def lookup(embed: jax.Array, tokens: jax.Array) -> jax.Array:
  """embed[tokens]; an all-reduce where the vocabulary is split."""
  axes = layout(tokens)
  out = None if axes is None else jax.P(*axes, None)
  return embed.at[tokens].get(mode='clip', out_sharding=out)


def norm(w: jax.Array, cfg: LMConfig, x: jax.Array) -> jax.Array:
  """RMSNorm over the last axis, in float32."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + cfg.norm_eps)
  gain = w.astype(jnp.float32) + (1.0 if cfg.norm_plus_one else 0.0)
  return (y * gain).astype(x.dtype)


def linear(p: dict[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
  """x W, plus the bias where the layer has one.

  The columns of W say where the result's last axis lies; a W whose rows are
  split costs one all-reduce.
  """
  w, axes = p[f'w_{name}'], layout(x)
  out = None if axes is None else jax.P(*axes[:-1], (layout(w) or (None,))[-1])
  y = product('btd,de->bte', x, w.astype(x.dtype), out_sharding=out)
  if f'b_{name}' in p:
    y = y + p[f'b_{name}'].astype(jnp.float32)
  return y.astype(x.dtype)


def mlp(p: dict[str, jax.Array], cfg: LMConfig, x: jax.Array) -> jax.Array:
  """The gated MLP, [B, T, d] -> [B, T, d]."""
  gate = linear(p, 'gate', x)
  if cfg.mlp == 'silu':
    gate = jax.nn.silu(gate)
  else:
    gate = jax.nn.gelu(gate, approximate=True)
  return linear(p, 'down', gate * linear(p, 'up', x))


def unembed(params: dict, cfg: LMConfig, x: jax.Array) -> jax.Array:
  """Logits [B, T, V] float32, split over the vocabulary as its matrix is."""
  x = norm(params['final_norm'], cfg, x)
  spec, w = ('btd,vd->btv', 'embed') if cfg.tied else ('btd,dv->btv', 'unembed')
  return softcap(product(spec, x, params[w].astype(x.dtype)), cfg.final_softcap)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
  return x if cap is None else cap * jnp.tanh(x / cap)
