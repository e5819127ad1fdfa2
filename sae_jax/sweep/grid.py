"""The points of a study: a base config, and what each changes in it."""

import copy
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.models.objectives import L0Penalty
from sae_jax.sweep.search import Ask, Found, Halving, Search, TargetL0
from sae_jax.train.config import validate
from sae_jax.train.keys import flatten, set_keys
from sae_jax.train.run import trajectory


class Spec(NamedTuple):
  """One SAE to train."""

  id: str  # hash of its config
  stage: str  # 'grid', or 'trial': a run that finds a value for another
  changes: dict[str, Any]  # the dotted keys in which it differs from the base
  k: float | None  # active latents aimed at
  config: Config  # of a plain run


class Entry(NamedTuple):
  """What sweep() yields: changes, some of which may be to be found."""

  id: str
  changes: dict[str, Any]


# Keys that say how sparse a point is to be: none of their values is best.
_SPARSITY = ('loss.l0_coef', 'loss.target_l0', 'act.k')
# Keys that came after studies had been made, with their defaults: part of an id
# only where they have another value, so that ids stay what they were.
LATER: dict[str, Any] = {'store.max_norm': 0.0}
# Figures of a point that has ended ({} for one that failed), None before.
Results = Callable[[str], Mapping[str, float] | None]


def load_sweep(path: str, given: Iterable[str] = ()) -> list[dict[str, Any]]:
  """What sweep() of a config file, 'configs/scaling.py:demo', yields.

  given: keys set on the command line. Raises UserError for a file without
  sweep(), an empty grid, and a key that both set.
  """
  file, _, arg = path.partition(':')
  spec = importlib.util.spec_from_file_location('study_config', file)
  if spec is None or spec.loader is None:
    raise UserError(f'--config={path}: {file} is not a Python file')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not callable(getattr(module, 'sweep', None)):
    raise UserError(
      f'--config={path}: {file} has no sweep(): take configs/scaling.py:demo '
      'for a pattern'
    )
  args = (arg,) if arg else ()
  try:
    inspect.signature(module.sweep).bind(*args)
  except TypeError as error:
    raise UserError(f'--config={path}: sweep() of {file}: {error}') from None
  found: list[dict[str, Any]] = list(module.sweep(*args) or [])
  if not found:
    raise UserError(f'--config={path}: sweep() yields no points: nothing to do')
  for key in given:
    if any(key in changes for changes in found):
      raise UserError(
        f'--config.{key}: sweep() of {file} sets it for each point: change it '
        'there'
      )
  return found


def entries(base: Config, sweep: Iterable[Mapping[str, Any]]) -> list[Entry]:
  """Checked. Raises UserError, naming the point and the reason, for a key that
  does not exist, values that cannot work, and a point that is there twice."""
  found: dict[str, Entry] = {}
  for changes in sweep:
    what = f'sweep(): point ({in_words(changes)})'
    if not isinstance(changes, Mapping):
      raise UserError(f'sweep(): {changes!r} is not a dict of dotted keys')
    try:
      config = _checked(base, changes, what)
    except (TypeError, ValueError, OverflowError) as error:
      raise UserError(f'{what}: {error}') from None
    id = id_of(config, {k: repr(v) for k, v in _searches(changes).items()})
    if id in found:
      raise UserError(f'{what} {_twice(base, found[id].changes, config)}')
    found[id] = Entry(id, dict(changes))
  return list(found.values())


def _twice(base: Config, changes: Mapping[str, Any], config: Config) -> str:
  other = flatten(_merged(base, _started(changes), 'sweep()').to_dict())
  keys = [k for k, v in flatten(config.to_dict()).items() if v != other[k]]
  if not keys:
    return 'is there twice: sweep() must yield it once'
  return (
    f'differs from ({in_words(changes)}) in nothing but {", ".join(keys)}, '
    'which does not change what a point ends with: leave one of them out'
  )


def _checked(base: Config, changes: Mapping[str, Any], what: str) -> Config:
  """The config that searches begin from; all values that they may take are
  valid, too."""
  _merged(base, _plain(changes), what)
  for key, search in _searches(changes).items():
    if isinstance(search, Halving) and key in _SPARSITY:
      raise UserError(
        f'{what}: {key}: Halving would take the one that is least sparse: use '
        'loss.l0_coef=TargetL0(...), or a point for each'
      )
    search.check(f'{what}: {key}')
  kinds = [_started(changes)]
  for key, search in _searches(changes).items():
    kinds += [_started(changes) | {key: value} for value in search.ends]
  for kind in kinds:
    found = _merged(base, kind, what)
    if found.mesh.member != 1:
      raise UserError(
        f'{what}: config.mesh.member={found.mesh.member}: not in a study, '
        'which chooses the members itself: take config.mesh.data and dict'
      )
    try:
      validate(found)
    except UserError as error:
      raise UserError(f'{what}: {error}') from None
    for key, least in (('eval_rows', 1), ('keep', 2)):
      if found.train[key] < least:
        raise UserError(
          f'{what}: config.train.{key}={found.train[key]}: a study needs '
          f'{least} or more'
        )
  return _merged(base, kinds[0], what)


def resolve(
  base: Config, entry: Entry, results: Results
) -> Spec | list[Spec] | str:
  """The point, or the trials that must end before, or why there is none."""
  known = _started(entry.changes)
  for key, search in _searches(entry.changes).items():
    found = _run(base, known, key, search, results)
    if not isinstance(found, Found):
      return found[0]
    if found.failure:
      return f'{key}: {found.failure}'
    known[key] = found.value
  config = _merged(base, known, 'sweep()')
  return Spec(entry.id, 'grid', known, _aim(config, entry.changes), config)


def ahead(base: Config, entry: Entry, results: Results) -> list[Config]:
  """What else there is to train at most, when the trials that `resolve` asks
  for have ended: more trials, and the point, each at the values that searches
  begin from."""
  known, later, waits = _started(entry.changes), [], False
  for key, search in _searches(entry.changes).items():
    taken = 0
    if not waits:
      found = _run(base, known, key, search, results)
      if isinstance(found, Found):
        known[key] = found.value
        continue
      taken, waits = len(found[0]) + found[1], True
    trials = search.most(_merged(base, known, 'sweep()').train.rows)
    later += [known | {'train.rows': rows} for rows in trials[taken:]]
  return [_merged(base, x, 'sweep()') for x in [*later, known]]


def _run(
  base: Config,
  known: Mapping[str, Any],
  key: str,
  search: Search,
  results: Results,
) -> Found | tuple[list[Spec], int]:
  """The end of a search; or the trials that must end before, and how many
  have."""
  rows = _merged(base, known, 'sweep()').train.rows
  seen: dict[tuple[float, int], float | None] = {}
  while isinstance(asked := search.next(seen, rows), Ask):
    specs = {
      v: _trial(base, dict(known) | {key: v, 'train.rows': asked.rows})
      for v in asked.values
    }
    ended = {v: results(spec.id) for v, spec in specs.items()}
    left = [specs[v] for v, figures in ended.items() if figures is None]
    if left:
      return left, len(seen) + len(specs) - len(left)
    for v, figures in ended.items():
      seen[v, asked.rows] = _figure(search, specs[v].config, figures)
  return asked


def _figure(
  search: Search, config: Config, figures: Mapping[str, float] | None
) -> float | None:
  """What a search wants to know of a trial; None where it failed."""
  if not figures:
    return None
  if isinstance(search, TargetL0):
    return figures['l0']
  if config.act.name != 'jumprelu':
    return figures['fvu']
  mse, l0 = figures['mse'], figures['l0']
  if mse is None or l0 is None:  # not finite
    return None
  c = config.loss
  # Of numbers, not arrays: this program does not hold the devices.
  penalty: Any = L0Penalty(c.l0_coef, c.target_l0, quadratic=c.target_l0 > 0)
  return mse + penalty.of(l0, 1.0)


def begun(base: Config, entry: Entry) -> Spec:
  """A point whose values are yet to be found, with those that searches begin
  from."""
  known = _started(entry.changes)
  config = _merged(base, known, 'sweep()')
  return Spec(entry.id, 'grid', known, _aim(config, entry.changes), config)


def in_words(changes: Mapping[str, Any]) -> str:
  """'sae.latents=512, act.k=16'."""
  if not isinstance(changes, Mapping):
    return repr(changes)
  show = lambda v: f'{v:g}' if isinstance(v, float) else str(v)
  return ', '.join(f'{k}={show(v)}' for k, v in changes.items())


def read_spec(record: Mapping[str, Any], base: Config) -> Spec:
  """The point of a `record_of`."""
  config = _merged(base, record['changes'] | record['resolved'], 'point')
  return Spec(
    record['id'], record['stage'], record['changes'], record['k'], config
  )


def id_of(config: Config, more: Mapping[str, str] = {}) -> str:  # noqa: B006
  """Hash of all that decides what a run ends with, and of `more`."""
  flat = trajectory(config.to_dict())
  what = {k: v for k, v in flat.items() if k not in LATER or v != LATER[k]}
  text = json.dumps(what | dict(more), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def record_of(spec: Spec, base: Config) -> dict[str, Any]:
  """What says all of a point in JSON, beside the base: the changes, and the
  keys that followed them because they refer to others."""
  was, is_ = trajectory(base.to_dict()), trajectory(spec.config.to_dict())
  resolved = {k: v for k, v in is_.items() if v != was[k]}
  record = {k: v for k, v in spec._asdict().items() if k != 'config'}
  return record | {'resolved': resolved}


def _trial(base: Config, changes: dict[str, Any]) -> Spec:
  config = _merged(base, changes, 'sweep()')
  return Spec(id_of(config), 'trial', changes, _aim(config, changes), config)


def _searches(changes: Mapping[str, Any]) -> dict[str, Search]:
  return {k: v for k, v in changes.items() if isinstance(v, TargetL0 | Halving)}


def _plain(changes: Mapping[str, Any]) -> dict[str, Any]:
  """Without the values that are to be found."""
  searches = _searches(changes)
  return {k: v for k, v in changes.items() if k not in searches}


def _started(changes: Mapping[str, Any]) -> dict[str, Any]:
  """With the values that searches begin from."""
  return dict(changes) | {k: s.start for k, s in _searches(changes).items()}


def _merged(base: Config, changes: Mapping[str, Any], what: str) -> Config:
  if base.members:
    raise UserError('config.members: a study makes its own: leave them out')
  if 'members' in changes or not all(isinstance(k, str) for k in changes):
    raise UserError(f'{what}: keys must be dotted keys of the config')
  config = copy.deepcopy(base)
  set_keys(config, changes, what)
  # References to keys that were changed are values from here on.
  return config.copy_and_resolve_references()


def _aim(config: Config, changes: Mapping[str, Any]) -> float | None:
  """The L0 that a point is to have."""
  if config.act.name != 'jumprelu':
    return float(config.act.k)
  for search in changes.values():
    if isinstance(search, TargetL0):
      return float(search.l0)
  return float(config.loss.target_l0) or None
