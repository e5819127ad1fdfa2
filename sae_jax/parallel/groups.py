"""Which devices take part together in a collective of a program's text."""

import re

import numpy as np

_LISTS = re.compile(
  r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}'
)
_IOTA = re.compile(r'replica_groups=\[([\d,]+)\]<=(\S+?)(?:, |$)')
_MESH = re.compile(
  r'replica_groups=mesh\[([^]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}'
)


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
  """Groups of devices, by their place in the program's mesh.

  Reads {{0,1},{2,3}}, [2,4]<=[4,2]T(1,0) and mesh['x'=2,'y'=4] {'x'}; no
  groups at all mean all `devices`. ValueError for any other notation.
  """
  if found := _LISTS.search(attributes):
    inner = re.findall(r'\{([\d, ]*)\}', found[1])
    return [_numbers(g) for g in inner if g]
  if found := _IOTA.search(attributes):
    return _iota(found[2]).reshape(_numbers(found[1])).tolist()
  if found := _MESH.search(attributes):
    return _along(*found.groups())
  if 'replica_groups={}' in attributes or 'replica_groups' not in attributes:
    return [list(range(devices))]
  raise ValueError(f'replica groups in an unknown notation: {attributes[:200]}')


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]


def _iota(text: str) -> np.ndarray:
  """[2,4]T(1,0): 0 to 7 as an array [2, 4], transposed; or [8]."""
  shape, *order = [_numbers(n) for n in re.findall(r'[\[(]([\d,]+)[])]', text)]
  ids = np.arange(np.prod(shape)).reshape(shape)
  return ids.transpose(order[0]) if order else ids


def _along(axes: str, ids: str | None, moved: str) -> list[list[int]]:
  """Groups along axes of a mesh: 'a'=2,'b'=4 and 'a','b':(2)2.

  'b':(2)2 is the part of axis b of size 2 behind a part of size 2; ids are
  the mesh's devices where they are not in order.
  """
  shape, moving = [], []
  parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", moved)
  for name, size in re.findall(r"'(\w+)'=(\d+)", axes):
    cuts = [(int(a), int(b)) for n, a, b in parts if n == name and a]
    if cuts:
      ((before, part),) = cuts
      shape += [before, part, int(size) // (before * part)]
      moving += [False, True, False]
    else:
      shape.append(int(size))
      moving.append(any(n == name for n, _, _ in parts))
  if ids is None:
    devices = np.arange(np.prod(shape))
  else:
    devices = _iota(ids) if '[' in ids else np.array(_numbers(ids))
  order = sorted(range(len(shape)), key=lambda j: moving[j])  # stable
  group = int(np.prod([n for n, m in zip(shape, moving, strict=True) if m]))
  return devices.reshape(shape).transpose(order).reshape(-1, group).tolist()
