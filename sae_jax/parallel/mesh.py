"""The device mesh: axis names, construction from two numbers, checks.

Rows lie on `data`, latents on `dict`, in JAX's explicit mode: a sharding is
part of an array's type, and every collective is visible in the source. The
gradients of a step are taken inside `shard_map` (manual mode), where an array
is one device's part. `sum_latents` and `mean_rows` are right in both modes and
without a mesh: a model is written once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from sae_jax.errors import UserError

DATA = 'data'
DICT = 'dict'
MEMBER = 'member'  # of a mesh that several SAEs are spread over


def make_mesh(
  data: int,
  dict_: int,
  devices: Sequence[Any] | None = None,
  member: int = 1,
) -> Mesh:
  """A mesh [data, dict] of the first data * dict devices (of all there are),
  with member > 1 of [member, data, dict].

  Raises UserError when a size is not positive or there are too few devices.
  """
  if data < 1 or dict_ < 1:
    raise UserError(
      f'config.mesh: data={data}, dict={dict_}: both must be at least 1'
    )
  devices = jax.devices() if devices is None else devices
  shape = (data, dict_) if member == 1 else (member, data, dict_)
  names = (DATA, DICT) if member == 1 else (MEMBER, DATA, DICT)
  size = math.prod(shape)
  if size > len(devices):
    raise UserError(
      f'config.mesh: {" x ".join(map(str, shape))} = {size} devices asked for, '
      f'{len(devices)} {devices[0].platform} device(s) present: lower '
      f'config.mesh.{" or config.mesh.".join(names)}'
    )
  # jax.make_mesh refuses shapes such as 8 x 8 on a torus of 4 x 4 x 4.
  array = mesh_utils.create_device_mesh(
    shape, devices[:size], allow_split_physical_axes=True
  )
  return Mesh(array, names, axis_types=(AxisType.Explicit,) * len(names))


def spec(*axes: str | None) -> P | None:
  """P(*axes) under a mesh, None (wherever the data is) without one."""
  return None if jax.sharding.get_abstract_mesh().empty else P(*axes)


def rows_spec(x: jax.Array) -> P | None:
  """The spec of x with its last dimension whole: where its rows lie."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes:
    return None
  axes = tuple(jax.typeof(x).sharding.spec)  # may be shorter than ndim
  axes = (axes + (None,) * x.ndim)[: x.ndim - 1]
  return P(*axes, None)


def on_each_device(f: Callable, out_specs: Any) -> Callable:
  """shard_map over `data` and `dict`: f of each device's part of the arrays.

  Also within a shard_map over `member`: there JAX 0.10 asks for in_specs.
  """

  def call(*arrays):
    specs = jax.tree.map(lambda a: P(*jax.typeof(a).sharding.spec), arrays)
    return jax.shard_map(
      f, in_specs=specs, out_specs=out_specs, axis_names={DATA, DICT}
    )(*arrays)

  return call


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': what the code under trace is compiled for."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


def manual(axis: str) -> bool:
  """Whether code runs inside a shard_map over that axis of the mesh."""
  return axis in jax.sharding.get_abstract_mesh().manual_axes


def sum_latents(x: jax.Array) -> jax.Array:
  """The sum over the dictionary of x, a sum over this device's latents."""
  return jax.lax.psum(x, DICT) if manual(DICT) else x


def mean_rows(x: jax.Array) -> jax.Array:
  """The mean over all rows of the batch of x [B@data, ...]."""
  mean = x.mean(0)
  return jax.lax.pmean(mean, DATA) if DATA in varying(mean) else mean


def varying(x: Any) -> frozenset[str]:
  """The axes along which x has values of each device's own, in manual mode."""
  a = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
  kind = a.manual_axis_type
  return frozenset() if kind is None else kind.varying


def vary(x: jax.Array, *axes: str) -> jax.Array:
  """x as a value of each device of its own along the axes, in manual mode.

  Its gradient then stays what each device found: no sum is taken.
  """
  missing = tuple(a for a in axes if manual(a) and a not in varying(x))
  return jax.lax.pcast(x, missing, to='varying') if missing else x


def zeros(like: Any) -> jax.Array:
  """Of that shape and type, on the same axes each device's own."""
  return vary(jnp.zeros(like.shape, like.dtype), *varying(like))


def vary_like(*arrays: Any) -> tuple[str, ...]:
  """The axes along which at least one of the arrays varies."""
  return tuple(sorted(frozenset().union(*map(varying, arrays))))


def split_latents(tree: Any, over_data: bool) -> Any:
  """The same arrays, those [F@dict, ...] split over `data` as well, or, with
  over_data False, gathered again from it. Nothing to do without a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree
  return jax.reshard(tree, latent_specs(tree, over_data))


def latent_specs(tree: Any, over_data: bool) -> Any:
  """The specs that `split_latents` gives to the arrays of a tree."""

  def one(a):
    axes = tuple(jax.typeof(a).sharding.spec)
    if axes and axes[0] in (DICT, (DICT, DATA)):
      axes = ((DICT, DATA) if over_data else DICT, *axes[1:])
    return P(*axes)

  return jax.tree.map(one, tree)
