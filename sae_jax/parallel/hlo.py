"""Reads the text of compiled programs: what runs, and how many times.

`compiled.as_text()` of the CPU and TPU compilers; text in, plain data out.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

_LINE = re.compile(r'^\s+(ROOT )?%([\w.\-]+) = (.*)$')
_HEAD = re.compile(r'^(ENTRY )?%([\w.\-]+) \(.*\{$')
_NAME = re.compile(r'%([\w.\-]+)')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,<=]*)\]')
_COMPARE = {
  'LT': lambda a, b: a < b, 'LE': lambda a, b: a <= b,
  'GT': lambda a, b: a > b, 'GE': lambda a, b: a >= b,
  'NE': lambda a, b: a != b,
}  # fmt: skip
# What gives its operand's value, or hands it on later.
_SAME = ('copy', 'bitcast', 'convert', 'reshape', 'copy-start', 'copy-done')


class Instruction(NamedTuple):
  """One line: name = type opcode(operands), attributes."""

  name: str
  type: str
  opcode: str
  args: str  # between the parentheses, as written
  attributes: str  # behind them
  root: bool  # the value of its computation

  @property
  def operands(self) -> list[str]:
    return _NAME.findall(self.args)

  def called(self, *keys: str) -> list[str]:
    """The computations named by attributes such as `calls` or `body`."""
    found = []
    for key in keys:
      for text in re.findall(
        rf'\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)', self.attributes
      ):
        found += _NAME.findall(text)
    return found


class Program(NamedTuple):
  """{computation: {instruction's name: instruction}} and where it starts."""

  computations: dict[str, dict[str, Instruction]]
  entry: str

  def root(self, computation: str) -> Instruction:
    return next(i for i in self.computations[computation].values() if i.root)


def parse(text: str) -> Program:
  """The instructions of `compiled.as_text()`; ValueError without an entry."""
  computations, entry, current = {}, None, {}
  for line in text.splitlines():
    if head := _HEAD.match(line):
      current = computations[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif found := _LINE.match(line):
      instruction = _instruction(found[2], found[3], bool(found[1]))
      current[instruction.name] = instruction
  if entry is None:
    raise ValueError('not the text of a compiled program: no ENTRY in it')
  return Program(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction:
  end = _closing(text, 0) if text[0] == '(' else text.index(' ')
  type_, rest = text[:end], text[end:].lstrip()
  start = rest.index('(')
  end = _closing(rest, start)
  args = rest[start + 1 : end - 1]
  return Instruction(name, type_, rest[:start], args, rest[end:], root)


def _closing(text: str, start: int) -> int:
  """The position behind the bracket that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] in '({[') - (text[i] in ')}]')
    if not depth:
      return i + 1
  raise ValueError(f'brackets do not close in {text[:80]!r}')


def arrays(type_: str) -> list[tuple[int, int]]:
  """(elements, bytes) of each array of a type, tuples flattened.

  Bytes are those of the elements, without the padding of a layout's tiles.
  """
  found = []
  for dtype, shape in _ARRAY.findall(re.sub(r'\{[^{}]*\}', '', type_)):
    elements = math.prod(int(n.strip('<=')) for n in shape.split(',') if n)
    bits = 8 if dtype == 'pred' else int(re.findall(r'\d+', dtype)[0])
    found.append((elements, -(-elements * bits // 8)))
  return found


def fold(
  program: Program,
  take: Callable[[str, Instruction], Any],
  cost: Callable[[list], float],
) -> list[tuple[Any, int | None]]:
  """[(what `take(computation, instruction)` made, times it runs)].

  take: None leaves an instruction out, but not those of the computations it
  calls. Bodies of loops count trip count times, None where that is unknown;
  of a conditional's branches the one with the largest cost(items) counts.
  """
  return _fold(program, program.entry, [], take, cost)


def _fold(program, computation, known, take, cost):
  items = []
  for i in program.computations[computation].values():
    item = take(computation, i)
    if item is not None:
      items.append((item, 1))
    if i.opcode == 'while':
      items += _loop(program, computation, i, known, take, cost)
    elif i.opcode == 'conditional':
      branches = i.called(
        'branch_computations', 'true_computation', 'false_computation'
      )
      inner = [_fold(program, b, [], take, cost) for b in branches]
      items += max(inner, key=cost)
    else:
      for name in _calls(i):
        items += _fold(program, name, [], take, cost)
  return items


def _calls(i: Instruction) -> list[str]:
  """The computations that an instruction runs once."""
  match i.opcode:
    case 'fusion' | 'async-start':  # async-done names the same computation
      return i.called('calls')
    case 'call':
      return i.called('to_apply', 'calls')
  return []


def _loop(program, computation, i, known, take, cost):
  start, body = _initial(program, computation, i, known), i.called('body')[0]
  trips = trip_count(program, computation, i, known)
  fixed = [
    value if _carried(program, body, j) == (j, 0) else None
    for j, value in enumerate(start)
  ]
  inner = _fold(program, body, fixed, take, cost)
  times = lambda t: None if None in (t, trips) else t * trips
  return [(item, times(t)) for item, t in inner]


def trip_count(
  program: Program, computation: str, i: Instruction, known: Any = ()
) -> int | None:
  """How often the body of a `while` runs; None where the text cannot say.

  By the compiler's own note, else from a condition that compares a counter,
  which the body moves by a constant, with a constant. known: the integers in
  the tuple that is the computation's parameter, None for the others.
  """
  if note := re.search(r'known_trip_count":\{"n":"(\d+)"', i.attributes):
    return int(note[1])
  start, (body,) = _initial(program, computation, i, known), i.called('body')
  test = program.root(i.called('condition')[0])
  found = _compare(program, i.called('condition')[0], test, _Carry())
  if found is None:
    return None
  direction, left, right = found
  values = []
  for side in (left, right):
    if isinstance(side, int):
      values.append((side, 0))
      continue
    j, offset = side
    moved = _carried(program, body, j)
    if j >= len(start) or start[j] is None or moved is None or moved[0] != j:
      return None
    values.append((start[j] + offset, moved[1]))
  return _count(direction, *values)


def _count(direction, left, right) -> int | None:
  """Steps until the comparison of two linear counters fails."""
  (a, da), (b, db) = left, right
  if not _COMPARE[direction](a, b):
    return 0
  gap, step = b - a, da - db
  if not step or gap * step < 0 or (direction == 'NE' and gap % step):
    return None
  steps = -(-abs(gap) // abs(step))
  return steps + (direction in ('LE', 'GE') and gap % step == 0)


class _Carry:
  """Stands for a loop's tuple: element j is the pair (j, what was added)."""

  def __getitem__(self, j: int) -> tuple[int, int]:
    return j, 0


def _carried(program, body, j) -> Any:
  """What element j of a loop's tuple is after the body, in terms of before."""
  root = program.root(body)
  if root.opcode != 'tuple':
    return None
  return _value(program, body, root.operands[j], [_Carry()])


def _initial(program, computation, i, known) -> list[int | None]:
  """The integers a loop starts with, None for everything else."""
  tuple_ = program.computations[computation].get(i.operands[0])
  if tuple_ is None or tuple_.opcode != 'tuple':
    return []
  found = [
    _value(program, computation, name, [list(known)])
    for name in tuple_.operands
  ]
  return [v if isinstance(v, int) else None for v in found]


def _compare(program, computation, i, parameters) -> Any:
  """(direction, left, right) of a condition's root, through fusions."""
  values = parameters if isinstance(parameters, list) else [parameters]
  if i.opcode in ('fusion', 'call'):
    inner = i.called('calls', 'to_apply')[0]
    values = [_value(program, computation, n, values) for n in i.operands]
    return _compare(program, inner, program.root(inner), values)
  if i.opcode in _SAME:
    root = program.computations[computation][i.operands[0]]
    return _compare(program, computation, root, values)
  direction = re.search(r'direction=(\w+)', i.attributes)
  if i.opcode != 'compare' or not direction or direction[1] not in _COMPARE:
    return None
  sides = [_value(program, computation, n, values) for n in i.operands]
  return None if None in sides else (direction[1], *sides)


def _value(program, computation, name, parameters) -> Any:
  """An integer, a pair (j, offset) of a loop's tuple, or None."""
  i = program.computations[computation][name]
  value = lambda n: _value(program, computation, n, parameters)
  match i.opcode:
    case 'constant' if re.fullmatch(r'-?\d+', i.args):
      return int(i.args)
    case 'parameter':
      return _element(parameters, int(i.args))
    case 'get-tuple-element':
      index = re.search(r'index=(\d+)', i.attributes)
      return _element(value(i.operands[0]), int(index[1]) if index else 0)
    case 'add' | 'subtract':
      left, right = map(value, i.operands)
      return _sum(left, right, 1 if i.opcode == 'add' else -1)
    case 'fusion' | 'call':
      inner = i.called('calls', 'to_apply')[0]
      root = program.root(inner)
      return _value(program, inner, root.name, [value(n) for n in i.operands])
    case opcode if opcode in _SAME:
      return value(i.operands[0])
  return None


def _element(values: Any, j: int) -> Any:
  if isinstance(values, _Carry):
    return values[j]
  return values[j] if isinstance(values, list) and j < len(values) else None


def _sum(left: Any, right: Any, sign: int) -> Any:
  if isinstance(left, int) and isinstance(right, int):
    return left + sign * right
  if isinstance(left, tuple) and isinstance(right, int):
    return left[0], left[1] + sign * right
  if isinstance(left, int) and isinstance(right, tuple) and sign == 1:
    return right[0], right[1] + left
  return None
