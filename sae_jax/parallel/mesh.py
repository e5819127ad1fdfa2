"""The device mesh: axis names, construction from two numbers, checks.

Rows lie on `data`, latents on `dict`, in JAX's explicit mode: a sharding is
part of an array's type, and every collective is visible in the source.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sae_jax.errors import UserError

DATA = 'data'
DICT = 'dict'


def make_mesh(
  data: int, dict_: int, devices: Sequence[Any] | None = None
) -> Mesh:
  """A mesh [data, dict] of the first data * dict devices (of all there are).

  Raises UserError when a size is not positive or there are too few devices.
  """
  if data < 1 or dict_ < 1:
    raise UserError(
      f'config.mesh: data={data}, dict={dict_}: both must be at least 1'
    )
  devices = jax.devices() if devices is None else devices
  if data * dict_ > len(devices):
    raise UserError(
      f'config.mesh: {data} x {dict_} = {data * dict_} devices asked for, '
      f'{len(devices)} {devices[0].platform} device(s) present: lower '
      'config.mesh.data or config.mesh.dict'
    )
  return jax.make_mesh(
    (data, dict_), (DATA, DICT), devices=devices[: data * dict_]
  )


def check_divides(what: str, size: int, axis: str, parts: int) -> None:
  """Raises UserError unless a mesh axis divides a dimension."""
  if size % parts:
    lower = size // parts * parts
    near = f'{lower} or {lower + parts}' if lower else f'{parts}'
    raise UserError(
      f'{what}={size} is not divisible by config.mesh.{axis}={parts}: '
      f'use {near}, or another mesh'
    )


def spec(*axes: str | None) -> P | None:
  """P(*axes) under a mesh, None (wherever the data is) without one."""
  return None if jax.sharding.get_abstract_mesh().empty else P(*axes)


def rows_spec(x: jax.Array) -> P | None:
  """The spec of x with its last dimension whole: where its rows lie."""
  if jax.sharding.get_abstract_mesh().empty:
    return None
  axes = tuple(jax.typeof(x).sharding.spec)  # may be shorter than ndim
  axes = (axes + (None,) * x.ndim)[: x.ndim - 1]
  return P(*axes, None)
