"""The sparse autoencoder: a frozen pytree of arrays with one-line methods.

Raw units (the model's activations) outside, normalised units inside; letters
and layout as in docs/design.md: one latent is one row of W_enc and of W_dec.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sae_jax.models.activations import Activation
from sae_jax.models.products import product
from sae_jax.parallel.mesh import DICT, rows_spec, spec, sum_latents


class Norm(struct.PyTreeNode):
  """n(x) = (x - mean) / scale, so that E|n|^2 = 1 over the training rows."""

  mean: jax.Array  # [D], raw units; zero where a recipe does not centre
  scale: jax.Array  # [], raw units

  def __call__(self, x: jax.Array) -> jax.Array:
    return (x.astype(self.mean.dtype) - self.mean) / self.scale

  def undo(self, n: jax.Array) -> jax.Array:
    return n * self.scale + self.mean


def identity_norm(width: int, dtype=jnp.float32) -> Norm:
  """The Norm that changes nothing."""
  return Norm(jnp.zeros(width, dtype), jnp.ones((), dtype))


class SAE(struct.PyTreeNode):
  """f = scale_in * act(W_enc n(x) + b), x_hat = mean + scale (W_dec f + b_dec).

  With `pre_bias` the encoder sees n - b_dec (Gemma Scope, TopK), computed as
  n W_enc + (b_enc - b_dec W_enc): no gradient of shape [B, D] is ever needed.
  """

  W_enc: jax.Array  # [F@dict, D]
  b_enc: jax.Array  # [F@dict]
  W_dec: jax.Array  # [F@dict, E]
  b_dec: jax.Array  # [E]
  act: Activation
  norm_in: Norm
  norm_out: Norm
  pre_bias: bool = struct.field(pytree_node=False)

  def pre(self, n: jax.Array, dtype=None) -> jax.Array:
    """Pre-activations [..., F] of normalised rows [..., D].

    dtype: that of the product's factors, see `products.product`.
    """
    bias = self.b_enc
    if self.pre_bias:
      bias = bias - product('d,fd->f', self.b_dec, self.W_enc)
    return product('...d,fd->...f', n, self.W_enc, dtype) + bias

  def reconstruct(self, f: jax.Array) -> jax.Array:
    """Normalised reconstruction [..., E] of normalised latents [..., F]."""
    return self.contributions(f)[0] + self.b_dec

  def contributions(self, *codes: jax.Array, dtype=None) -> list[jax.Array]:
    """f W_dec [..., E], without the bias, of each f [..., F] of `codes`.

    Costs one all-reduce over `dict` of all of them together.
    """
    parts = [
      product('...f,fe->...e', f, self.W_dec, dtype, rows_spec(f))
      for f in codes
    ]
    return list(sum_latents(jnp.stack(parts)))

  def encode(self, x: Any) -> jax.Array:
    """Latents [..., F] of rows x [..., D]; raw units both. See `as_array`."""
    return self.norm_in.scale * self.act(self.pre(self.norm_in(as_array(x))))

  def decode(self, f: Any) -> jax.Array:
    """Reconstruction [..., E] of latents f [..., F]; raw units both."""
    f = as_array(f) / self.norm_in.scale
    return self.norm_out.undo(self.reconstruct(f))

  def fold(self) -> 'SAE':
    """The same encode and decode with identity normalisers and no pre-bias.

    b_enc' = s (b_enc - [b_dec W_enc]) - mean W_enc, theta' = s theta,
    b_dec' = mean_out + s_out b_dec, W_dec' = W_dec s_out / s (Gemma Scope,
    arXiv 2408.05147, section 3; docs/math.md).
    """
    scale, mean = self.norm_in.scale, self.norm_in.mean
    bias = self.b_enc * scale
    if self.pre_bias:
      mean = mean + scale * self.b_dec
    return self.replace(
      b_enc=bias - jnp.einsum('d,fd->f', mean, self.W_enc, precision='highest'),
      W_dec=self.W_dec * (self.norm_out.scale / scale),
      b_dec=self.norm_out.undo(self.b_dec),
      act=self.act.scale(scale),
      norm_in=identity_norm(mean.shape[0], mean.dtype),
      norm_out=identity_norm(self.b_dec.shape[0], self.b_dec.dtype),
      pre_bias=False,
    )


def as_array(x: Any) -> jax.Array:
  """An array of JAX's, of any other or of a torch tensor, which comes through
  this host's memory in float32; no gradient goes back to it."""
  if hasattr(x, 'detach'):  # numpy knows neither its bfloat16 nor its devices
    x = x.detach().cpu().float().numpy()
  return jnp.asarray(x)


def init(
  key: jax.Array,
  *,
  latents: int,
  act: Activation,
  norm_in: Norm,
  norm_out: Norm | None = None,
  pre_bias: bool = True,
  encoder_norm: float = 1.0,
  dtype=jnp.float32,
) -> SAE:
  """A fresh autoencoder: unit-norm random W_dec, zero biases, and W_enc = W_dec
  times `encoder_norm`.

  He-uniform rows scaled to unit norm (arXiv 2408.05147, section 3); the
  dictionary is born sharded over `dict` when called under a mesh.
  """
  norm_out = norm_in if norm_out is None else norm_out
  width = norm_in.mean.shape[0]
  W = jax.random.uniform(
    key, (latents, width), dtype, -1.0, 1.0, out_sharding=spec(DICT, None)
  )
  W = unit_rows(W)
  return SAE(
    W_enc=W * encoder_norm,
    b_enc=jnp.zeros_like(W[:, 0]),
    W_dec=W,
    b_dec=jnp.zeros(width, dtype),
    act=act,
    norm_in=norm_in,
    norm_out=norm_out,
    pre_bias=pre_bias,
  )


def unit_rows(W: jax.Array) -> jax.Array:
  """W [F@dict, E] with every row scaled to unit norm."""
  return W / jnp.maximum(jnp.linalg.norm(W, axis=-1, keepdims=True), 1e-12)
