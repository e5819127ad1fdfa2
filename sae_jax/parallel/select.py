"""Exact selection of the largest pre-activations over a sharded dictionary.

What is selected is everything up to a last entry in one order: by value,
largest first, equal values by row, then by latent. Each search below finds
that last entry, so any number of shards selects the same for the same z.

-0 and subnormal numbers count as 0 (hardware differs over them), NaN as
+infinity: it is selected, and the loss shows it. Nothing here has a gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax.parallel.mesh import (
  DATA,
  DICT,
  manual,
  platform,
  vary_like,
  varying,
)

Axes = tuple[str, ...]  # of the mesh; () where a dimension is whole

# Values and indices that a device may gather for a TopK: 8 bytes each, 256 MiB,
# a 64th of the smallest accelerator's memory. 128 shards with 16,384 rows and
# K = 128 would be 2 GiB.
MOST_CANDIDATES = 2**25
MOST_SELECTED = 2**31 - 2  # entries of a batch: counts are int32
_GROUP = 16  # entries whose maximum decides whether to look at them
_LIMB = 12  # bits; a sum of limbs stays below 2^31 up to 2^19 rows or devices


def top_k_mask(z: jax.Array, k: int) -> jax.Array:
  """True at the k largest entries of each row: [..., F@dict] -> same, bool.

  Equal values go to the lower index. Works without a mesh, under one, and
  inside a shard_map over it, where z is the device's part. Over `dict` go each
  shard's min(k, F/n) best values with their indices, or, where these would be
  too many, 32 counts a row (and log2 F more when values tie at the last place).
  """

  def mask(z, rows, latents):
    shards, width = lax.axis_size(latents), z.shape[-1]
    _check(k, width * shards, 'latents')
    candidates = z[..., 0].size * min(k, width) * shards
    few = candidates <= MOST_CANDIDATES
    search = _last_by_candidates if few else _last_by_counts
    value, latent = search(z, k, rows, latents)
    key = _key(z)
    here = _positions(width, latents)
    return (key > value) | (key == value) & (here <= latent)

  return _on_shards(mask, z)


def top_k(z: jax.Array, k: int) -> jax.Array:
  """Indices [..., k] of the k largest entries of each row of z [..., F], which
  is whole: the largest first, of equal ones the lower first."""
  z = _clean(lax.stop_gradient(z))
  groups = z.shape[-1] // _GROUP
  if platform() != 'cpu' or z.shape[-1] % _GROUP or groups < 4 * k:
    return lax.top_k(z, k)[1]
  # The k groups with the largest maxima hold the k largest entries: each group
  # before them, in the order of this module, has an entry before any of theirs.
  # Half the time of lax.top_k on CPUs; TPUs have a top_k of their own.
  z = z.reshape(*z.shape[:-1], groups, _GROUP)
  group = jnp.sort(lax.top_k(z.max(-1), k)[1])
  some = jnp.take_along_axis(z, group[..., None], -2)
  at = lax.top_k(some.reshape(*group.shape[:-1], k * _GROUP), k)[1]
  first = jnp.take_along_axis(group, at // _GROUP, -1) * _GROUP
  return first + at % _GROUP


def best_of_shards(
  z: jax.Array, index: jax.Array, k: int, width: int
) -> jax.Array:
  """True at the k largest of all shards' candidates: [B, n], bool.

  Inside shard_map over `dict`: z [B, n] are this shard's min(k, width) largest
  entries of each row and `index` their places, as from `top_k`, in the shard's
  `width` latents. Same result and collectives as `top_k_mask`.
  """
  z = _clean(lax.stop_gradient(z))
  here = index.astype(jnp.uint32) + _first(width, (DICT,))
  candidates = z.size * lax.axis_size(DICT)
  if candidates <= MOST_CANDIDATES:
    value, latent = _last_of_candidates(z, here, k, (DICT,))
  else:
    rows = (DATA,) if manual(DATA) else ()
    F = width * lax.axis_size(DICT)
    value, latent = _last_by_counts(z, k, rows, (DICT,), here, F)
  key = _key(z)
  return (key > value) | (key == value) & (here <= latent)


def largest_of_list(
  z: jax.Array,
  row: jax.Array,
  latent: jax.Array,
  most: int | jax.Array,
  last: tuple[int, int],
) -> jax.Array:
  """True at the `most` largest entries of all devices' lists z [N], bool.

  Equal values go to the lower row [N], then to the lower latent [N], which are
  uint32 and count over all devices; last: how many rows and latents there are.
  Selects all where there are no more.
  """
  axes = vary_like(z, row, latent)
  count = lambda true: lax.psum(true.sum(), axes)
  key, zero = _key(_clean(lax.stop_gradient(z))), jnp.uint32(0)
  value = _largest(lambda v: count(key >= v) >= most, 32, zero)
  quota = most - count(key > value)
  ties = key == value
  before = lambda r: count(ties & (row < r))
  r = _largest(lambda r: before(r) < quota, last[0].bit_length(), zero)
  rest, line = quota - before(r), ties & (row == r)
  before_in = lambda f: count(line & (latent < f))
  f = _largest(lambda f: before_in(f) < rest, last[1].bit_length(), zero)
  return (key > value) | ties & ((row < r) | (row == r) & (latent <= f))


def batch_top_k_mask(z: jax.Array, k: int) -> jax.Array:
  """True at the k B largest entries of a batch: [B@data, F@dict] -> same, bool.

  Equal values go to the lower row, then to the lower latent; rows are ordered
  over all devices. Where it works: see `top_k_mask`. Over both axes of the
  mesh go 32 counts, and log2 B + log2 F more when values tie at the last place.
  Exact up to 2^43 entries.
  """

  def mask(z, rows, latents):
    B, F = len(z) * lax.axis_size(rows), z.shape[1] * lax.axis_size(latents)
    _check(k, F, 'latents')
    _check(k * B, MOST_SELECTED, 'entries of a batch that can be counted')
    count = lambda in_rows: _total(in_rows, rows + latents)
    key, zero = _key(z), jnp.uint32(0)
    row, latent = _positions(len(z), rows), _positions(z.shape[1], latents)

    reached = lambda v: count((key >= v).sum(1)) >= k * B
    value = _largest(reached, 32, zero)
    quota = k * B - count((key > value).sum(1))  # of those equal to value
    ties = key == value
    of_row = ties.sum(1)

    def last():
      """Row and latent of the quota's last entry."""
      before = lambda r: count(jnp.where(row < r, of_row, 0))
      r = _largest(lambda r: before(r) < quota, B.bit_length(), zero)
      rest, line = quota - before(r), (ties & (row == r)[:, None]).sum(0)
      before_in = lambda f: count(jnp.where(latent < f, line, 0))
      f = _largest(lambda f: before_in(f) < rest, F.bit_length(), zero)
      return r, f

    everything = lambda: (jnp.uint32(B), zero)
    r, f = lax.cond(count(of_row) > quota, last, everything)
    row = row[:, None]
    return (key > value) | ties & ((row < r) | (row == r) & (latent <= f))

  if z.ndim != 2:
    raise ValueError(f'a batch is [B, F], not {z.shape}')
  return _on_shards(mask, z)


def smallest_positive(f: jax.Array) -> jax.Array:
  """The smallest positive latent [] of a batch f [B@data, F@dict].

  Infinity where there is none. Works where `top_k_mask` does.
  """
  f = lax.stop_gradient(f)
  least = jnp.where(f > 0, f, jnp.inf).min()
  return lax.pmin(least, vary_like(f))


def _on_shards(
  mask: Callable[[jax.Array, Axes, Axes], jax.Array], z: jax.Array
) -> jax.Array:
  """mask(a device's part of z, axes that split rows, axes that split latents).

  A shard_map of its own would break differentiation inside another one.
  """
  z = _clean(lax.stop_gradient(z))
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes:
    inside = lambda axis: (axis,) if axis in varying(z) else ()
    return mask(z, inside(DATA), inside(DICT))
  spec = jax.typeof(z).sharding.spec  # may be shorter than ndim
  axes = [(a,) if isinstance(a, str) else tuple(a or ()) for a in spec]
  axes += [()] * (z.ndim - len(axes))
  rows, latents = sum(axes[:-1], ()), axes[-1]
  return jax.shard_map(lambda z: mask(z, rows, latents), out_specs=spec)(z)


def _last_by_candidates(z, k, rows, latents):
  """(key, latent) [..., 1] of each row's k-th entry, from the shards' best."""
  del rows
  value, index = lax.top_k(z, min(k, z.shape[-1]))
  index = index.astype(jnp.uint32) + _first(z.shape[-1], latents)
  return _last_of_candidates(value, index, k, latents)


def _last_of_candidates(value, index, k, latents):
  # Shards in order of their latents, each with equal values in order of
  # index: a stable top_k of the candidates keeps the lowest indices.
  join = lambda x: lax.all_gather(x, latents, axis=x.ndim - 1, tiled=True)
  value, at = lax.top_k(join(value), k)
  index = jnp.take_along_axis(join(index), at[..., -1:], axis=-1)
  return _key(value[..., -1:]), index


def _last_by_counts(z, k, rows, latents, here=None, F=0):
  """(key, latent) [..., 1] of each row's k-th entry, by bisection.

  here: the entries' latents, of F in all; of z [..., F] by default.
  """
  count = lambda true: lax.psum(true.sum(-1, keepdims=True), latents)
  if here is None:
    here = _positions(z.shape[-1], latents)
    F = z.shape[-1] * lax.axis_size(latents)
  key = _key(z)
  zero = jnp.zeros_like(key[..., :1])
  value = _largest(lambda v: count(key >= v) >= k, 32, zero)
  quota = k - count(key > value)  # of those equal to value
  ties = key == value

  def last():
    before = lambda f: count(ties & (here < f))
    return _largest(lambda f: before(f) < quota, F.bit_length(), zero)

  # One answer for all devices: they must take the same branch.
  crowded = lax.psum((count(ties) > quota).sum(), rows) > 0
  return value, lax.cond(crowded, last, lambda: zero + jnp.uint32(F))


def _largest(holds: Callable, bits: int, zero: jax.Array) -> jax.Array:
  """The largest uint32 below 2^bits of which `holds` is true, bit by bit.

  holds(x) is true from 0 up to there; one x for each entry of `zero`.
  """

  def with_bit(i, x):
    more = x | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
    return jnp.where(holds(more), more, x)

  return lax.fori_loop(0, bits, with_bit, zero)


def _total(counts: jax.Array, axes: Axes) -> jax.Array:
  """The sum [] of counts [n] int32 over all devices, at most 2^31 - 1.

  A batch has more entries than int32 counts: two limbs are summed.
  """
  low, high = counts & (2**_LIMB - 1), counts >> _LIMB
  for add in (jnp.sum, lambda x: lax.psum(x, axes)):
    low, high = add(low), add(high)
    low, high = low & (2**_LIMB - 1), high + (low >> _LIMB)
  small = high < 2 ** (31 - _LIMB)
  return jnp.where(small, (high << _LIMB) | low, 2**31 - 1)


def _first(n: int, axes: Axes) -> jax.Array:
  """Index uint32 of this device's first entry, each device having n."""
  return jnp.uint32(n) * lax.axis_index(axes).astype(jnp.uint32)


def _positions(n: int, axes: Axes) -> jax.Array:
  """Indices [n] uint32, among all devices', of this device's n entries."""
  return _first(n, axes) + jnp.arange(n, dtype=jnp.uint32)


def _clean(z: jax.Array) -> jax.Array:
  """z as float32 (lax.top_k is slow on bfloat16), one zero, no NaN."""
  z = z.astype(jnp.float32)
  z = jnp.where(jnp.abs(z) < jnp.finfo(jnp.float32).tiny, 0, z)
  return jnp.where(jnp.isnan(z), jnp.inf, z)


def _key(z: jax.Array) -> jax.Array:
  """uint32 in the order of clean float32: 2^31 plus or minus the magnitude's
  bits, which are in the order of the magnitudes."""
  bits = lax.bitcast_convert_type(z, jnp.uint32)
  size, middle = bits & 0x7FFFFFFF, jnp.uint32(2**31)
  return jnp.where(bits == size, middle + size, middle - size)


def _check(k: int, most: int, what: str) -> None:
  if not 1 <= k <= most:
    raise ValueError(f'{k} to select of {most} {what}')
