"""From tensors in files to parameters in their shards, piece by piece.

A device's shard is read from the file as that slice alone: neither the model
nor a whole sharded matrix is ever in a host's memory. With several processes
each reads the slices of its own devices.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from sae_jax.errors import UserError
from sae_jax.lm import model
from sae_jax.lm.config import LMConfig
from sae_jax.lm.tokens import Words

Index = tuple[slice, ...]


class Stored(NamedTuple):
  """A tensor of a file: matrices [out, in], the embedding [vocab, width]."""

  shape: tuple[int, ...]
  read: Callable[[Index], np.ndarray]  # a slice of that shape, any float dtype


class Opened(NamedTuple):
  """A model's files, described; weights and tokenizer are still to be read."""

  cfg: LMConfig
  ids: dict[str, int | None]  # 'bos', 'eos', 'pad'
  words: Callable[[], Words]
  params: Callable[[jax.typing.DTypeLike], model.Params]


def load(
  cfg: LMConfig,
  files: Mapping[str, Stored],
  name: Callable[[str, int], str],
  dtype: jax.typing.DTypeLike,
  where: str,
  harmless: Callable[[str], bool] = lambda name: False,
) -> model.Params:
  """The params of cfg, each in its shard of the current mesh.

  files: every tensor there is. name(ours, layer): what a leaf of
  `model.shapes` is called there (layer -1 outside the layers). dtype is that
  of matrices; gains and biases are float32. harmless: tensors that may be
  left over. Without a mesh all goes to the default device.

  Raises UserError, before anything is read, for a tensor that is missing, has
  another shape or no place in the model, and for a mesh that does not divide.
  """
  left = dict(files)

  def take(path, shape):
    ours = path[-1].key
    theirs = name(ours, path[1].idx if len(path) > 1 else -1)
    if theirs not in left:
      raise UserError(f'{where} lacks the tensor {theirs}')
    leaf = _Leaf(left.pop(theirs), turn=ours != 'embed' and len(shape) > 1)
    if leaf.shape() != shape:
      raise UserError(
        f'{where}: tensor {theirs} has shape {leaf.shape()}, not {shape}'
      )
    return leaf

  # Checks all names and shapes first: a big model takes long to read
  tree = jax.tree_util.tree_map_with_path(
    take, model.shapes(cfg), is_leaf=lambda x: isinstance(x, tuple)
  )
  extra = sorted(x for x in left if not harmless(x))
  if extra:
    raise UserError(
      f'{where} has tensors this model has no place for: {", ".join(extra[:3])}'
    )
  is_leaf = lambda x: isinstance(x, _Leaf)
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return jax.tree.map(lambda x: _whole(x, dtype), tree, is_leaf=is_leaf)
  shardings = jax.tree.map(
    lambda x, spec: _sharding(x, mesh, spec, where),
    tree,
    model.specs(cfg),
    is_leaf=is_leaf,
  )
  return jax.tree.map(
    lambda x, sharding: _sharded(x, sharding, dtype),
    tree,
    shardings,
    is_leaf=is_leaf,
  )


class _Leaf(NamedTuple):
  """A tensor as stored, to be transposed where `turn`.

  That is done by the devices: numpy turns bfloat16 at 0.1 GB a second.
  """

  stored: Stored
  turn: bool

  def shape(self) -> tuple[int, ...]:
    return self.stored.shape[::-1] if self.turn else self.stored.shape


def _sharding(leaf: _Leaf, mesh: Mesh, spec: P, where: str) -> NamedSharding:
  """Of the tensor as stored, such that the leaf is laid out by spec."""
  axes = (*spec, *[None] * (len(leaf.shape()) - len(spec)))
  sharding = NamedSharding(mesh, P(*(axes[::-1] if leaf.turn else axes)))
  try:
    sharding.shard_shape(leaf.stored.shape)
  except ValueError as error:
    raise UserError(
      f'{where}: a matrix {list(leaf.shape())} cannot be split as {spec} over '
      f'the mesh {dict(mesh.shape)}: lower config.mesh.dict'
    ) from error
  return sharding


def _cast(stored: Stored, index: Index, dtype) -> np.ndarray:
  """A slice as an array of its own, matrices in dtype, vectors in float32."""
  dtype = jnp.dtype(dtype if len(index) > 1 else jnp.float32)
  return np.array(stored.read(index), dtype, order='C')


def _whole(leaf: _Leaf, dtype) -> jax.Array:
  everything = (slice(None),) * len(leaf.stored.shape)
  x = jax.device_put(_cast(leaf.stored, everything, dtype))
  return x.T if leaf.turn else x


def _sharded(leaf: _Leaf, sharding: NamedSharding, dtype) -> jax.Array:
  """Reads every slice that some device of this process needs, once."""
  shape, devices_of = leaf.stored.shape, {}
  places = sharding.addressable_devices_indices_map(shape)
  for device, index in places.items():
    devices_of.setdefault(str(index), (index, []))[1].append(device)
  shards = []
  for index, devices in devices_of.values():
    part = _cast(leaf.stored, index, dtype)
    shards += [jax.device_put(part, SingleDeviceSharding(x)) for x in devices]
  x = jax.make_array_from_single_device_arrays(shape, sharding, shards)
  return x.T if leaf.turn else x
