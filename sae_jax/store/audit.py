"""Whether the rows of a store belong to their tokens, and its statistics to
its rows."""

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from sae_jax.errors import UserError
from sae_jax.store import reader
from sae_jax.store.checks import (
  RECORD,
  STATISTICS,
  Check,
  Problem,
  View,
  pool,
  progress,
)
from sae_jax.store.files import MEND
from sae_jax.store.manifest import (
  COMPLETE,
  FILE,
  KEEP,
  TOKENS,
  Site,
  bin_path,
  site_part,
)
from sae_jax.store.records import load_record, with_statistics
from sae_jax.store.sequences import Sequences, shard_tokens
from sae_jax.store.statistics import Moments, merge, moments_of, within

Bad = Collection[tuple[int | None, str]]

# Of how many shards, and how many blocks of each, a sample is taken.
_SHARDS, _BLOCKS = 64, 4
# Chance of a false alarm of one whole check of a sound store.
_FALSE_ALARM = 1e-6


def check_alignment(view: View, bad: Bad) -> Check:
  """Every row's token against what the sequences, what is kept of them and
  the permutation say; no (sequence, position) twice in the store."""
  m, name = view.manifest, 'alignment'
  if any(part == KEEP for _, part in bad):
    return Check(name, '', skipped='what is kept of the sequences is damaged')
  try:
    sequences = Sequences(view.root, m)
  except UserError as error:  # damaged since the checksums were looked at
    return Check(name, '', skipped=str(error))
  if sequences.starts[-1] != m.rows:
    text = f'{sequences.starts[-1]:,} tokens are kept, not {m.rows:,}'
    return Check(name, '', (Problem(f'{FILE}: {text}', None, KEEP),))
  found, looked, left, last = [], 0, 0, -1
  with progress(name, len(view.files), ' shards') as bar:
    for shard in view.files:
      bar.update()
      try:
        expected = shard_tokens(sequences, m, shard)
        if (shard, TOKENS) in bad:
          raise UserError('damaged')
        tokens = view.part_file(TOKENS, shard).read_all()
      except UserError:  # named by the checks before this one, or removed
        left += 1
        continue
      looked += len(tokens)
      found += _misplaced(view, shard, tokens, expected)
      twice, last = _twice(view, shard, tokens, last)
      found += twice
  looked_at = f'{looked:,} tokens, {len(m.sites)} sites of as many rows each'
  if left:
    looked_at += f'; not those of {left} shards that cannot be read'
  return Check(name, looked_at, tuple(found))


def _misplaced(
  view: View, shard: int, tokens: np.ndarray, expected: np.ndarray
) -> Iterator[Problem]:
  wrong = np.flatnonzero((tokens != expected).any(1))
  if len(wrong):
    at = int(wrong[0])
    yield Problem(
      f'{_path(view, TOKENS, shard)}: {len(wrong):,} rows have another token '
      f'than the sequences say: row {at} has {tokens[at].tolist()} (sequence, '
      f'position, id), not {expected[at].tolist()}: {MEND}',
      shard,
      TOKENS,
    )


def _twice(
  view: View, shard: int, tokens: np.ndarray, last: int
) -> tuple[list[Problem], int]:
  """Places that occur twice, here or in a shard before; and the last place.

  Shards follow each other in the order of places, so that one number stands
  for all that came before.
  """
  T = view.manifest.sequence_length
  places = tokens[:, 0].astype(np.int64) * T + tokens[:, 1]
  unique = np.unique(places)
  count = len(places) - len(unique) + int((unique <= last).sum())
  last = max(last, int(unique[-1]))
  if not count:
    return [], last
  text = (
    f'{_path(view, TOKENS, shard)}: {count:,} rows of a (sequence, position) '
    f'that has a row already: {MEND}'
  )
  return [Problem(text, shard, TOKENS)], last


def check_statistics(view: View, bad: Bad, exact: bool) -> Check:
  """Statistics computed again: of a sample of blocks within its error, of one
  normaliser shard (`exact`: of all shards) to ten digits; the manifest's
  against the merge of the records.

  The rule for a sample of n rows of a shard and one of its columns, with mean
  mu and deviation sigma in the record: |mean - mu| is at most
  sigma sqrt(2 L / n) + max|x - mu| L / (3 n), Bernstein's inequality with the
  largest deviation seen, L = log(2 x comparisons / 1e-6). Outlier columns make
  it wide for themselves alone. Of the rows' squared norm q, every column
  divided by its sigma, the mean is 1 by definition; the sample's is at most
  1 + sqrt(2 max(q) L / n) + max(q) L / n. Below 1 it may be anything: a token
  with a hundred times the norm is not in every sample.
  """
  m, shards = view.manifest, list(view.files)
  step = -(-len(shards) // _SHARDS)
  norm = [s for s in shards if m.held_out_shards <= s < m.pinned_shards][:1]
  full = set(shards if exact else norm)
  sampled = set(shards[::step] if step else [])
  found: list[Problem] = []
  sums, seen = _Sums({}, {}), 0
  with progress('statistics', len(m.shards), ' shards') as bar, pool() as each:
    for shard in range(len(m.shards)):
      bar.update()
      record = load_record(view.root, m, shard)
      if record is None:
        continue
      seen += 1
      sums.add(record.moments, m.held_out_shards <= shard < m.pinned_shards)
      look_at = lambda site, shard=shard, record=record: _shard_problem(
        view, site, shard, record.moments[site.name], shard in full
      )
      if shard in full | sampled:
        sites = [s for s in m.sites if (shard, site_part(s.name)) not in bad]
        found += [p for p in each.map(look_at, sites) if p]
  merged = seen == len(m.shards)
  if m.state == COMPLETE and merged:
    found += _unmerged(view, sums)
  looked_at = (
    f'{len(m.sites)} sites: {len(full)} shards in full, up to {_BLOCKS} '
    f'blocks of {len(sampled - full)} others'
  )
  if m.state == COMPLETE and merged:
    looked_at += f'; the manifest against {seen} records'
  return Check('statistics', looked_at, tuple(found))


class _Sums(NamedTuple):
  """Merged moments by site: of the normaliser shards, and of all."""

  norm: dict[str, Moments]
  every: dict[str, Moments]

  def add(self, record: dict[str, Moments], in_norm: bool) -> None:
    for site, found in record.items():
      for sums in [self.every, self.norm][: 1 + in_norm]:
        sums[site] = merge(sums[site], found) if site in sums else found


def _unmerged(view: View, sums: _Sums) -> Iterator[Problem]:
  """Statistics of the manifest that are not the merge of the records'."""
  for site in view.manifest.sites:
    if site.name not in sums.norm:
      continue
    expected = with_statistics(
      site, sums.norm[site.name], sums.every[site.name]
    )
    names = [field.name for field in dataclasses.fields(Site)]
    wrong = [n for n in names if getattr(site, n) != getattr(expected, n)]
    if wrong:
      text = f'{site.name}: {", ".join(wrong)} are not those of the records'
      yield Problem(f'{FILE}: {text}: {MEND}', None, STATISTICS)


def _shard_problem(
  view: View, site: Site, shard: int, said: Moments, full: bool
) -> Problem | None:
  """What is wrong with the moments that a shard's record says of a site."""
  try:
    file = view.rows_file(site.name, shard)
    if full:
      blocks = (within(file.read(b), site.max_norm) for b in range(file.blocks))
      wrong = _differs(moments_of(blocks), said)
    else:
      blocks = range(0, file.blocks, -(-file.blocks // _BLOCKS))
      rows = np.concatenate([file.read(b) for b in blocks])
      rows = within(rows, site.max_norm)
      wrong = _improbable(rows.astype(np.float64), said, _comparisons(view))
  except UserError:  # named by the checks before this one, or removed
    return None
  if wrong:
    where = _path(view, site_part(site.name), shard)
    return Problem(f'{where}: {wrong}: {MEND}', shard, RECORD)
  return None


def check_norms(view: View, exact: bool) -> Check:
  """How many rows have many times the median norm, in a sample of the
  normaliser shards (`exact`: of all); a warning where they matter."""
  m, said, warnings = view.manifest, [], []
  for site in m.sites:
    try:
      shards = list(view.files) if exact else []
      every = reader.shard_blocks(view.root, site.name, shards)
      rows = (x for x, _ in every) if exact else None
      found = reader.outliers(view.root, site.name, rows)
    except UserError as error:  # named by the checks before, or not there yet
      return Check('norms', '', skipped=str(error))
    left = f'; {m.rows - site.all_rows:,} are left out' if site.all_rows else ''
    said.append(f'{site.name}: {found["said"]}{left}')
    if found['share'] > 0.01 and not site.max_norm:
      warnings.append(f'{said[-1]}: {reader.ADVICE}')
  return Check('norms', '; '.join(said), warnings=tuple(warnings))


def _comparisons(view: View) -> int:
  shards = min(len(view.files), _SHARDS)
  return sum(site.width for site in view.manifest.sites) * shards


def _differs(found: Moments, said: Moments) -> str:
  """What differs between moments that should be the same numbers.

  By more than the last digits, which another processor sums in other order.
  """
  for name in said._fields:
    if name == 'max_abs' and said.max_abs is None:  # a record older than it
      continue
    a, b = (np.asarray(getattr(m, name)) for m in (found, said))
    if a.shape != b.shape:
      return f'{name} of its record has shape {b.shape}'
    # m2 of a column that hardly varies is what rounding its mean leaves.
    tiny = 1e-12 * found.n * np.square(found.mean) if name == 'm2' else 1e-15
    off = np.abs(np.subtract(a, b))
    if not (off <= 1e-10 * np.abs(a) + tiny).all():
      worst = np.max(off / (np.abs(a) + 1e-300))
      return f'{name} of its record is not that of the rows (by {worst:.1e})'
  return ''


def _improbable(x: np.ndarray, said: Moments, comparisons: int) -> str:
  """What in moments cannot be those of a shard of which x is a sample."""
  n, log = len(x), math.log(2 * comparisons / _FALSE_ALARM)
  if said.mean.shape != x.shape[1:]:
    return f'the means of its record are {said.mean.shape[0]} numbers'
  if not n:  # all are beyond a bound
    return ''
  deviation, sigma = np.abs(x - said.mean), np.sqrt(said.m2 / said.n)
  bound = sigma * math.sqrt(2 * log / n) + deviation.max(0) * log / (3 * n)
  # The last bits of a column that is constant.
  bound += 1e-9 * np.abs(said.mean)
  off = np.abs(x.mean(0) - said.mean)
  if (wrong := np.flatnonzero(~(off <= bound))).size:
    c = int(wrong[np.argmax((off / np.maximum(bound, 1e-300))[wrong])])
    return (
      f'the mean of {wrong.size} columns is not that of its record: column {c} '
      f'has {x[:, c].mean():.4g} in {n} rows, {said.mean[c]:.4g} is recorded'
    )
  varies = sigma > 1e-6 * np.abs(said.mean)
  if varies.any():
    q = np.square(deviation[:, varies] / sigma[varies]).mean(1)
    if q.mean() - 1 > math.sqrt(2 * q.max() * log / n) + q.max() * log / n:
      return (
        f'{n} of the rows have {q.mean():.3g} times the squared norm of its '
        'record'
      )
  most = float(np.abs(x).max())
  if said.max_abs is not None and most > said.max_abs * (1 + 1e-6):
    return f'its numbers reach {most:.6g}, its record says {said.max_abs:.6g}'
  return ''


def _path(view: View, part: str, shard: int) -> str:
  return str(view.root / bin_path(part, shard, len(view.manifest.shards)))
