"""What a checkpoint must hold: names, shapes and sums of the bits of leaves.

No file system knows what an array was; these sums are made of the arrays on
the devices and compared with what comes back, on whatever mesh.
"""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from sae_jax.errors import UserError

_ODD = 0x9E3779B1  # odd, near 2^32 / golden ratio: its multiples spread well
_PIECES = 16  # XLA on CPU writes [F, D / 16] temporaries instead of [F, D]


class Damaged(UserError):
  """A checkpoint that is not, byte for byte, what was saved."""


def named(tree: Any) -> dict[str, Any]:
  """{'sae.W_enc': leaf, ..}: the leaves by the names they have on disk."""
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='.')
  return {name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def shapes(leaves: dict[str, Any]) -> dict[str, str]:
  """{'sae.W_enc': 'float32[4096,576]', ..} of arrays or abstract ones."""
  return {
    name: f'{x.dtype}[{",".join(map(str, x.shape))}]'
    for name, x in leaves.items()
  }


def check_shapes(there: dict[str, str], here: dict[str, str], what: str):
  """UserError that lists every leaf in which the two differ; one line."""
  differ = [
    f'{name} is {there.get(name, "not")} there, {here.get(name, "not")} here'
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]
  if differ:
    raise UserError(
      f'{what} does not fit the config ({"; ".join(differ)}): give the config '
      'it was made with, or take another --workdir'
    )


@jax.jit
def sums(leaves: dict[str, jax.Array]) -> jax.Array:
  """One sum a leaf, in the order of their sorted names: [leaves] uint32.

  The same on every mesh. A single word that differs always changes its sum;
  anything else goes unnoticed once in 2^32 times. Reads the leaves once.
  """
  return jnp.stack([_sum(leaves[name]) for name in sorted(leaves)])


def differing(leaves: dict[str, jax.Array], expected: dict[str, int]) -> list:
  """The names of the leaves whose sums are not the expected ones."""
  found = np.asarray(jax.device_get(sums(leaves))).tolist()
  names = sorted(leaves)
  return [n for n, s in zip(names, found, strict=True) if s != expected[n]]


def _sum(x: jax.Array) -> jax.Array:
  """Sum mod 2^32 of the mixed words of an array: [] uint32."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if not x.ndim:
    return _mixed_sum(x[None], 0).sum(dtype=jnp.uint32)
  whole = jax.sharding.get_abstract_mesh().empty or (
    jax.typeof(x).sharding.spec[-1] is None
  )
  pieces = math.gcd(x.shape[-1], _PIECES) if whole and x.ndim > 1 else 1
  if pieces == 1:
    return _mixed_sum(x, 0).sum(dtype=jnp.uint32)
  width = x.shape[-1] // pieces
  piece = lambda i: _mixed_sum(
    jax.lax.dynamic_slice_in_dim(x, i * width, width, -1), i * width
  )
  more = lambda i, total: total + piece(i)
  return jax.lax.fori_loop(1, pieces, more, piece(0)).sum(dtype=jnp.uint32)


def _mixed_sum(x: jax.Array, first: Any) -> jax.Array:
  """Sums over the last axis of the words, each mixed with its indices; that
  of the last axis counts from `first`."""
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}')
  h = bits.astype(jnp.uint32)
  mesh = not jax.sharding.get_abstract_mesh().empty
  for axis in range(x.ndim):
    at = jax.lax.broadcasted_iota(
      jnp.uint32, x.shape, axis,
      out_sharding=jax.typeof(x).sharding if mesh else None,
    )  # fmt: skip
    if axis == x.ndim - 1:
      at = at + jnp.asarray(first, jnp.uint32)
    h = h ^ (at * jnp.uint32(pow(_ODD, axis + 1, 2**32)))
  # The finaliser of MurmurHash3 (public domain): a bijection of 32-bit words,
  # after which every bit of the word has a say in every bit of the sum.
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return (h ^ (h >> 16)).sum(-1, dtype=jnp.uint32)


def seal(record: dict[str, Any]) -> str:
  """The record as JSON text with a hash of its content."""
  record = json.loads(json.dumps(record))  # tuples become lists once
  return json.dumps(record | {'xxh3': _hash(record)}, indent=1) + '\n'


def unseal(text: str) -> dict[str, Any]:
  """What was sealed; ValueError when the text is not what `seal` made."""
  record = json.loads(text)
  if not isinstance(record, dict) or 'xxh3' not in record:
    raise ValueError('no hash in it')
  if record.pop('xxh3') != _hash(record):
    raise ValueError('its hash does not match')
  return record


def _hash(record: dict[str, Any]) -> str:
  return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())
