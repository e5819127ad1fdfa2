"""Exact selection of the largest pre-activations over a sharded dictionary."""

import jax
import jax.numpy as jnp

from sae_jax.parallel.mesh import DICT, manual


def top_k_mask(z: jax.Array, k: int) -> jax.Array:
  """True at the k largest entries of each row: [..., F@dict] -> same, bool.

  Equal values go to the lower index, so any number of shards selects the same
  latents for the same z. Each shard offers its own k best; one all-gather
  over `dict` of B * min(k, F/n) * n values and indices decides.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return _local_mask(z, k, first=0, gather=lambda x: x)

  def select(z):
    return _local_mask(
      z,
      k,
      first=jax.lax.axis_index(DICT) * z.shape[-1],
      # Shards in order of their latents, each with equal values in order of
      # index: a stable top_k of the candidates keeps the lowest indices.
      gather=lambda x: jax.lax.all_gather(x, DICT, axis=x.ndim - 1, tiled=True),
    )

  if manual(DICT):
    return select(z)
  return jax.shard_map(select, out_specs=jax.typeof(z).sharding.spec)(z)


def _local_mask(z, k, first, gather):
  """This shard's part of the mask; `first` is its first latent's index."""
  width = z.shape[-1]
  value, index = jax.lax.top_k(z, min(k, width))
  value, index = gather(value), gather(index + first)
  _, best = jax.lax.top_k(value, k)
  index = jnp.take_along_axis(index, best, axis=-1) - first
  index = jnp.where(index < 0, width, index)  # out of range: dropped below
  flat = index.reshape(-1, k)
  row = jnp.arange(len(flat))[:, None]
  mask = jnp.zeros((len(flat), width), bool)
  return mask.at[row, flat].set(True, mode='drop').reshape(z.shape)
