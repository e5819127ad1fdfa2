"""FLOPs and HBM bytes of a compiled program, loops times their trip counts.

`compiled.cost_analysis()` counts the body of a loop once, so that a step of m
micro-batches would seem m times cheaper than it is. These are read from the
text, instruction by instruction, where a matrix product's FLOPs follow from
its shapes and its bytes are what its kernel reads and writes.
"""

import math
import re
from typing import NamedTuple

from sae_jax.parallel import hlo
from sae_jax.parallel.hlo import Instruction, Program

# What moves no data of its own: names, or work counted elsewhere.
_FREE = (
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
  'conditional', 'call', 'after-all', 'partition-id', 'copy-done', 'iota',
  'async-start', 'async-done', 'async-update', 'opt-barrier',
)  # fmt: skip
_ARRAY = re.compile(r'\b(?:pred|[a-z]+\d+\w*)\[[\d,]*\](?:\{[^{}]*\})?')


class Kernel(NamedTuple):
  """One instruction that runs as a kernel of its own, run once."""

  flops: int  # of its matrix products
  bytes: int  # read from and written to HBM


def kernels(text: str) -> list[tuple[Kernel, int]]:
  """[(kernel, times it runs)]; ValueError for a loop of unknown length."""
  program = hlo.parse(text)
  fused = {
    name
    for instructions in program.computations.values()
    for i in instructions.values()
    if i.opcode == 'fusion'
    for name in i.called('calls')
  }

  def take(computation: str, i: Instruction) -> Kernel | None:
    if computation in fused or i.opcode in _FREE or i.opcode.endswith('-done'):
      return None
    return Kernel(
      _flops(program, computation, i), _bytes(program, computation, i)
    )

  cost = lambda items: sum(k.bytes * (times or 1) for k, times in items)
  found = []
  for kernel, times in hlo.fold(program, take, cost):
    if times is None:
      raise ValueError('a loop of unknown length: its work cannot be counted')
    found.append((kernel, times))
  return found


def _flops(program: Program, computation: str, i: Instruction) -> int:
  if i.opcode == 'fusion':
    (inner,) = i.called('calls')
    body = program.computations[inner].values()
    return sum(_flops(program, inner, other) for other in body)
  if i.opcode not in ('dot', 'convolution'):
    return 0
  here = program.computations[computation]
  out = hlo.arrays(i.type)[0][0]
  left, right = (_shape(here[name].type) for name in i.operands[:2])
  if i.opcode == 'dot':
    axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.attributes)
    contracted = [left[int(n)] for n in axes[1].split(',')] if axes else []
    return 2 * out * math.prod(contracted)
  # Products of matrices on a TPU: dim_labels=bf_io->bf and permutations.
  labels = re.search(r'dim_labels=\w+_(\w+)->', i.attributes)
  outputs = right[labels[1].index('o')] if labels else 1
  return 2 * out * math.prod(right) // max(outputs, 1)


def _shape(type_: str) -> list[int]:
  dimensions = re.search(r'\[([\d,]*)\]', type_)
  assert dimensions
  return [int(n) for n in dimensions[1].split(',') if n]


def _hbm(type_: str) -> int:
  """Bytes of a type's arrays outside of a core's own memory (S(1), ...)."""
  arrays = _ARRAY.findall(type_)
  return sum(hlo.arrays(a)[0][1] for a in arrays if 'S(' not in a)


def _bytes(program: Program, computation: str, i: Instruction) -> int:
  here = program.computations[computation]
  if i.opcode in ('slice', 'dynamic-slice', 'gather'):
    return 2 * _hbm(i.type)
  if i.opcode == 'dynamic-update-slice':
    return 2 * _hbm(here[i.operands[1]].type)
  if i.opcode.endswith('-start'):  # its type holds the operands again
    return 2 * sum(_hbm(here[name].type) for name in i.operands)
  read = [_hbm(here[name].type) for name in i.operands]
  wrote = _hbm(i.type)
  if i.opcode == 'fusion':
    (inner,) = i.called('calls')
    body = program.computations[inner]
    root = program.root(inner)
    for other in body.values():
      if other.opcode == 'parameter':
        part = _part(body, other.name)
        n = int(other.args)
        read[n] = read[n] if part is None else min(read[n], part)
    if root.opcode == 'dynamic-update-slice':  # in place
      wrote = _hbm(body[root.operands[1]].type)
  return sum(read) + wrote


def _part(body: dict[str, Instruction], name: str) -> int | None:
  """Bytes that a fusion reads of a parameter it only takes slices of."""
  users = [i for i in body.values() if name in i.operands]
  total = 0
  for i in users:
    if i.opcode in ('slice', 'dynamic-slice', 'gather'):
      total += hlo.arrays(i.type)[0][1]
    elif i.opcode == 'dynamic-update-slice' and i.operands[0] == name:
      total += hlo.arrays(body[i.operands[1]].type)[0][1]
    elif i.opcode == 'bitcast':
      part = _part(body, i.name)
      if part is None:
        return None
      total += part
    else:
      return None
  return total
