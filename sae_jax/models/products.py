"""The two matrix products of a dictionary, in float32 or lower precision."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sae_jax.parallel.mesh import DICT, vary


def product(
  equation: str,
  x: jax.Array,
  W: jax.Array,
  dtype: jax.typing.DTypeLike | None = None,
  out_sharding: P | None = None,
) -> jax.Array:
  """einsum(equation, x, W) with float32 results.

  dtype None or the arrays' own: in the arrays' precision everywhere (a TPU's
  default would round to bfloat16, a recent GPU's to TF32). Another one, for
  x [B, .] only: both factors and, in the backward pass, the cotangent are
  rounded to it; sums and gradients are float32, and the forward pass keeps
  the rounded x.
  """
  if dtype is None or dtype == x.dtype:
    return jnp.einsum(
      equation, x, W, out_sharding=out_sharding, precision='highest'
    )
  return _rounded(equation.replace('...', 'b'), dtype, vary(x, DICT), W)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded(equation, dtype, x, W):
  return _einsum(equation, x.astype(dtype), W.astype(dtype))


def _forward(equation, dtype, x, W):
  x = x.astype(dtype)
  return _einsum(equation, x, W.astype(dtype)), (x, W)


def _backward(equation, dtype, saved, g):
  x, W = saved
  a, b, c = equation.replace('->', ',').split(',')
  g = g.astype(dtype)
  return (
    _einsum(f'{c},{b}->{a}', g, W.astype(dtype)),
    _einsum(f'{c},{a}->{b}', g, x),
  )


_rounded.defvjp(_forward, _backward)


def _einsum(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
