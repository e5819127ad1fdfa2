"""What a compiled program sends between devices: kind, size, axis, times."""

import re
from typing import Any, NamedTuple

import numpy as np

from sae_jax.parallel import hlo
from sae_jax.parallel.groups import replica_groups
from sae_jax.parallel.hlo import Instruction, Program

KINDS = (
  'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all',
  'collective-permute',
)  # fmt: skip


class Collective(NamedTuple):
  """One collective instruction of one device.

  Sizes are of the whole array, which an all-reduce sums, an all-gather ends
  with and a reduce-scatter starts from: by a ring a device then sends
  2 (n-1)/n of an all-reduce's bytes, (n-1)/n of the other two's.
  """

  kind: str
  axis: str  # mesh axes along which it moves data, such as 'data+dict'
  group: int  # devices that take part together
  elements: int
  bytes: int
  times: int | None  # None: inside a loop whose trip count is unknown
  source: str  # the JAX operation it comes from


def collectives(text: str, mesh: Any) -> list[Collective]:
  """Those of `compiled.as_text()`; mesh: the (abstract) mesh it ran under.

  An asynchronous one counts once, where it starts. Of a conditional's
  branches the one that moves the most bytes counts. Groups of one device
  move nothing and are left out.
  """
  program = hlo.parse(text)

  def take(computation: str, i: Instruction) -> Collective | None:
    kind = i.opcode.removesuffix('-start')
    if kind not in KINDS or _continues(program, computation, i):
      return None
    axis, group = _axis(i.attributes, mesh)
    if group < 2:
      return None
    kind, elements, size = _payload(program, computation, i, kind)
    source = re.search(r'op_name="([^"]*)"', i.attributes)
    return Collective(
      kind, axis, group, elements, size, 1, source[1] if source else ''
    )

  cost = lambda items: sum(c.bytes * (times or 1) for c, times in items)
  found = hlo.fold(program, take, cost)
  return [c._replace(times=times) for c, times in found]


def summary(
  text: str, mesh: Any
) -> dict[tuple[str, str], tuple[int, int, int]]:
  """{(axis, kind): (instructions run, elements, bytes)} of one device.

  Sums over all runs of `collectives`. Raises ValueError for one inside a loop
  whose trip count the text does not tell.
  """
  total: dict = {}
  for c in collectives(text, mesh):
    if c.times is None:
      raise ValueError(
        f'{c.kind} over {c.axis} ({c.source}) is in a loop of unknown length'
      )
    runs, elements, size = total.get((c.axis, c.kind), (0, 0, 0))
    total[c.axis, c.kind] = (
      runs + c.times,
      elements + c.times * c.elements,
      size + c.times * c.bytes,
    )
  return total


def _continues(program: Program, computation: str, i: Instruction) -> bool:
  """Whether this is a later piece of a collective that was counted before.

  The TPU compiler writes an asynchronous collective into every fusion it
  overlaps with; all have its chain_id, and the first the start.
  """
  return 'chain_id=' in i.attributes and not any(
    'AsyncCollectiveStart' in other.attributes
    for other in program.computations[computation].values()
  )


def _payload(
  program: Program, computation: str, i: Instruction, kind: str
) -> tuple[str, int, int]:
  """(kind, elements, bytes) of the whole array, see Collective."""
  here = program.computations[computation]
  before = [a for name in i.operands for a in hlo.arrays(here[name].type)]
  after = hlo.arrays(i.type)
  if kind == 'all-gather':  # a start's type holds the operands as well
    whole = after[len(before) :] if i.opcode.endswith('-start') else after
    whole = whole[: len(before)]
  else:
    whole = before
  if kind == 'all-reduce' and computation.startswith('all-reduce-scatter'):
    kind = 'reduce-scatter'  # the TPU compiler's all-reduce of which a slice
  return kind, sum(n for n, _ in whole), sum(size for _, size in whole)


def _axis(attributes: str, mesh: Any) -> tuple[str, int]:
  """The axes along which devices of a group differ, and the group's size."""
  shape, names = tuple(mesh.axis_sizes), mesh.axis_names
  groups = replica_groups(attributes, int(np.prod(shape)))
  # Programs number devices by their place in the mesh.
  place = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), 1)
  differ = np.zeros(len(shape), bool)
  for group in groups:
    differ |= (place[group] != place[group[0]]).any(0)
  axis = '+'.join(n for n, d in zip(names, differ, strict=True) if d)
  return axis, max(len(set(g)) for g in groups)
