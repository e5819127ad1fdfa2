"""Whether the rows of a store are its model's: some of them, computed again.

The other checks, which need no model, are store/verify.py's.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.harvest.again import (
  devices_for,
  find_subject,
  from_harvest,
  origin,
  stored_config,
)
from sae_jax.harvest.job import (
  batch,
  batches_needed,
  make_forward,
  model_mesh,
  share_of,
)
from sae_jax.harvest.planning import Forward
from sae_jax.lm.subject import Subject
from sae_jax.store import quantise, verify
from sae_jax.store.checks import MANIFEST, Check, Problem, View, look, progress
from sae_jax.store.files import MEND, column_codes
from sae_jax.store.manifest import (
  TOKENS,
  Manifest,
  Site,
  bin_path,
  layout,
  planned_parts,
  scale_part,
  site_part,
)
from sae_jax.store.order import shard_order
from sae_jax.store.sequences import Sequences

# What another device may change in a row, as a part of its norm, by the type
# that the model computes in. In bfloat16 rows of SmolLM2-135M are 0.01 off
# those in float32, the worst of 690 0.08, and two devices may be off both ways.
HARDWARE = {'float32': 1e-3, 'bfloat16': 0.16}
# Half of a bfloat16's last bit, on either side of a border.
_BFLOAT16 = 2.0**-8
# Forward passes at most, unless all rows are asked for.
_BATCHES = 16


def verify_store(
  root: str | Path,
  *,
  rows: int | None = 256,
  exact: bool = False,
  model_path: str = '',
  subject: Subject | None = None,
) -> list[Check]:
  """All checks of a store, in the order of the printed table.

  Args:
    rows: how many are computed from the model again, 0 for none, None for all.
    exact: see store.verify.verify.
    model_path: the model, if it has moved.
    subject: the model, when it is loaded already.

  Raises UserError where there is no store, and for a model_path that names no
  model or another one than the store's.
  """
  checks = verify.verify(root, exact=exact)
  bad = {(p.shard, p.part) for check in checks for p in check.problems}
  return [*checks, check_rows(look(root), bad, rows, model_path, subject)]


def check_rows(
  view: View,
  bad: Collection[tuple[int | None, str]],
  rows: int | None = 256,
  model_path: str = '',
  subject: Subject | None = None,
) -> Check:
  """Rows of the store against a forward pass over the very same batches.

  A row x is the model's if |x - y| is at most HARDWARE[compute_dtype] |y| and
  what storing may move: 2^-8 |y| in bfloat16, one step in every column in
  int8. Rows of `bad` files are left out. Raises UserError for a model_path
  that names no model or another one.
  """
  m, name = view.manifest, 'model'
  if rows == 0:
    return Check(name, '', skipped='no rows asked for (--rows=0)')
  if not from_harvest(m):
    return Check(
      name, '', skipped=f'not from a harvest but from {origin(m)}: no model'
    )
  if any(part in (MANIFEST, *planned_parts()) for _, part in bad):
    return Check(name, '', skipped='manifest, sequences or keep are damaged')
  config = stored_config(view.root, m, model_path)
  line = devices_for(config)
  if not view.files:
    return Check(name, '', skipped='no shard is written yet')
  with model_mesh(config, share_of(config)):
    try:
      subject = find_subject(config, m, subject)
    except UserError as error:
      if model_path:
        raise
      return Check(name, '', skipped=str(error))
    run = make_forward(subject, config)
    found = list(_compared(view, bad, config, run, rows))
  return _check(view, found, line)


class _Compared(NamedTuple):
  """Some rows of one site in one shard; each array [n].

  at: where in the file; difference: |x - y| as a part of |y|; allowed: what it
  may be; equal: whether x and y are the same numbers.
  """

  shard: int
  site: str
  at: np.ndarray
  difference: np.ndarray
  allowed: np.ndarray
  equal: np.ndarray


def _compared(
  view: View,
  bad: Collection[tuple[int | None, str]],
  config: Config,
  run: Forward,
  rows: int | None,
) -> Iterator[_Compared]:
  """Rows stored and computed, batch after batch."""
  m, b = view.manifest, config.harvest.batch_sequences
  sequences = Sequences(view.root, m)
  tolerance = HARDWARE[config.harvest.compute_dtype]
  passes = _passes(view, sequences.starts, b, rows)
  most = -(-rows // len(passes)) if rows else m.rows
  place, placed = np.empty(0, np.int64), -1
  with progress('model', len(passes), ' batches') as bar:
    for shard, j in passes:
      if shard != placed:  # where the shard's rows lie in its files
        order = shard_order(m.shards[shard].rows, m.seed, shard)
        place, placed = np.argsort(order), shard
      token, row = _rows_of(sequences, m, shard, j, b, most)
      computed = jax.device_get(run(batch(sequences, j, b)))
      for site in m.sites:
        if not {(shard, part) for part in _site_parts(site)} & set(bad):
          y = computed[site.name][token]
          yield _compare(view, site, shard, place[row], y, tolerance)
      bar.update()


def _passes(
  view: View, starts: np.ndarray, b: int, rows: int | None
) -> list[tuple[int, int]]:
  """(shard, batch) of every forward pass: all, or some spread over shards."""
  shards, m = list(view.files), view.manifest
  needed = lambda shard: batches_needed(m, starts, b, [shard])
  if rows is None:
    return [(shard, j) for shard in shards for j in needed(shard)]
  count = min(_BATCHES, rows)
  chosen = _spread(shards, count)
  each = -(-count // len(chosen))
  return [(s, j) for s in chosen for j in _spread(needed(s), each)][:count]


def _spread(items: list[int], count: int) -> list[int]:
  """`count` of the items, or all if there are fewer, the last among them."""
  if len(items) <= count:
    return items
  return [items[(i + 1) * len(items) // count - 1] for i in range(count)]


def _rows_of(
  sequences: Sequences, m: Manifest, shard: int, j: int, b: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of batch j that lie in a shard, at most so many: their places among
  the b T tokens of the batch, and their numbers in the shard."""
  starts, begin = sequences.starts, j * b
  end = min(begin + b, len(starts) - 1)
  tokens = np.flatnonzero(sequences.keep(begin, end))
  numbers = np.arange(starts[begin], starts[end])
  numbers -= shard * m.rows_per_shard
  mine = (numbers >= 0) & (numbers < m.shards[shard].rows)
  tokens, numbers = tokens[: len(mine)][mine], numbers[mine]
  some = _spread(list(range(len(numbers))), most)
  return tokens[some], numbers[some]


def _site_parts(site: Site) -> list[str]:
  scales = [scale_part(site.name)] if site.dtype == 'int8' else []
  return [TOKENS, site_part(site.name), *scales]


def _compare(
  view: View,
  site: Site,
  shard: int,
  at: np.ndarray,
  y: np.ndarray,
  tolerance: float,
) -> _Compared:
  """The stored rows at these places beside those computed, [n, width]."""
  x = _stored(view, site_part(site.name), shard, at)
  steps = np.zeros(len(at))  # what storing may move a row by
  if site.dtype == 'int8':
    codes, out = column_codes(site), np.empty((2, *y.shape), np.float32)
    scales = _stored(view, scale_part(site.name), shard, at)
    quantise.decode(x, scales, *codes, out[0])
    again, scales = quantise.encode(y, *codes)
    quantise.decode(again, scales, *codes, out[1])
    x, y = out[0], out[1]
    steps = np.linalg.norm(scales * codes[1], axis=1)
  x, y = x.astype(np.float64), y.astype(np.float64)
  norm = np.maximum(np.linalg.norm(y, axis=1), 1e-30)
  if site.dtype == 'bfloat16':
    steps = _BFLOAT16 * norm
  return _Compared(
    shard,
    site.name,
    at,
    np.linalg.norm(x - y, axis=1) / norm,
    tolerance + steps / norm,
    (x == y).all(axis=1),
  )


def _stored(view: View, part: str, shard: int, at: np.ndarray) -> np.ndarray:
  """Rows of a file whose checksums have been looked at."""
  dtype, width = layout(view.manifest, part)
  name = bin_path(part, shard, len(view.manifest.shards))
  return np.memmap(view.root / name, dtype, 'r').reshape(-1, width)[at]


def _check(view: View, found: list[_Compared], line: str) -> Check:
  """The table's row, and a problem for every file with a wrong row."""
  problems = []
  for shard, site in dict.fromkeys((c.shard, c.site) for c in found):
    mine = [c for c in found if (c.shard, c.site) == (shard, site)]
    at, difference, allowed = (
      np.concatenate([getattr(c, name) for c in mine])
      for name in ('at', 'difference', 'allowed')
    )
    wrong = np.flatnonzero(~(difference <= allowed))  # NaN is wrong, too
    if wrong.size:
      i = wrong[0]
      name = bin_path(site_part(site), shard, len(view.manifest.shards))
      text = (
        f'{view.root / name}: {wrong.size} of {len(at)} rows are not the '
        f"model's: row {at[i]} differs by {difference[i]:.2g} of its norm, "
        f'{allowed[i]:.2g} is allowed: {MEND}'
      )
      problems.append(Problem(text, shard, site_part(site)))
  differences = np.concatenate([[0.0], *(c.difference for c in found)])
  equal = sum(int(c.equal.sum()) for c in found)
  looked_at = (
    f'{len(differences) - 1:,} rows of {len({c.site for c in found})} sites in '
    f'{len({c.shard for c in found})} shards: {equal:,} equal to the bit, the '
    f'largest difference {differences.max():.1e} of a row'
  )
  return Check('model', f'{looked_at}; {line}' if line else looked_at,
               tuple(problems))  # fmt: skip
