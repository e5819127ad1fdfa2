"""Reads a whole store and says what in it cannot be trusted.

Readers check what they read, when they read it; this finds everything at once:
files, checksums, whose token every row is, statistics. Whether the rows are the
model's is harvest/verify.py's.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import xxhash

from sae_jax.errors import UserError
from sae_jax.locks import HELD
from sae_jax.store.audit import check_alignment, check_norms, check_statistics
from sae_jax.store.budget import FOLDER as TRAINERS
from sae_jax.store.checks import (
  MANIFEST,
  RECORD,
  REMOVED,
  REPAIR,
  Check,
  Problem,
  View,
  look,
  pool,
  progress,
)
from sae_jax.store.files import MEND, check_size
from sae_jax.store.folder import LOCK
from sae_jax.store.manifest import (
  COMPLETE,
  DOCUMENTS,
  FILE,
  Manifest,
  bin_path,
  blocks_path,
  layout,
  part_rows,
  parts,
  planned_parts,
  row_parts,
)
from sae_jax.store.records import load_record, record_path


def problems(root: str | Path) -> Iterator[str]:
  """One line for everything in a store that is missing, damaged or wrong.

  As `verify`, which see, without its table.
  """
  for check in verify(root):
    for problem in check.problems:
      yield problem.text


def verify(root: str | Path, *, exact: bool = False) -> list[Check]:
  """All checks that need no model; those of a store that is being written look
  at its finished shards.

  exact: whether the statistics of every shard are computed again in full,
  and not just those of the first normaliser shard. Raises UserError where
  there is no store.
  """
  view = look(root)
  files = check_files(view)
  if any(p.part == MANIFEST for p in files.problems):
    others = ('checksums', 'alignment', 'statistics', 'norms')
    reason = 'the manifest contradicts itself'
    return [files, *(Check(name, '', skipped=reason) for name in others)]
  bad = {(p.shard, p.part) for p in files.problems}
  checksums = check_checksums(view, bad)
  bad |= {(p.shard, p.part) for p in checksums.problems}
  return [
    files,
    checksums,
    check_alignment(view, bad),
    check_statistics(view, bad, exact),
    check_norms(view, exact),
  ]


def check_files(view: View) -> Check:
  """The manifest against what lies in the folder."""
  m, root = view.manifest, view.root
  found, count = list(_misplanned(m)), 0
  for shard, entry in enumerate(m.shards):
    there = row_parts(m) if shard in view.files else []
    for part in [*planned_parts(), *there]:
      found += _sizes(view, part, shard)
      count += 2
    if entry.removed:
      found += _not_removed(view, shard)
    found += _record(view, shard)
  documents = root / DOCUMENTS
  if not documents.exists():
    found.append(Problem(f'{documents}: missing: {MEND}', None, DOCUMENTS))
  looked_at = f'{count + 1:,} files of {len(view.files):,} shards'
  if gone := sum(entry.removed for entry in m.shards):
    looked_at += f', {gone:,} removed'
  if view.unwritten:
    looked_at += f', {len(view.unwritten):,} not written yet'
  return Check('files', looked_at, tuple(found), tuple(_strays(view)))


def _misplanned(m: Manifest) -> Iterator[Problem]:
  """Numbers of the manifest that contradict each other."""
  first, rows = 0, m.rows_per_shard
  if len(m.shards) != -(-m.rows // rows):
    text = f'{len(m.shards)} shards for {m.rows:,} rows'
    yield Problem(f'{FILE}: {text}', None, MANIFEST)
    return
  for shard, entry in enumerate(m.shards):
    expected = min(rows, m.rows - shard * rows)
    if (entry.rows, entry.first_sequence) != (expected, first):
      yield Problem(
        f'{FILE}: shard {shard} has {entry.rows:,} rows and begins with '
        f'sequence {entry.first_sequence:,}, not {expected:,} and {first:,}',
        None,
        MANIFEST,
      )
    first += entry.sequences
    for part in parts(m):
      dtype, width = layout(m, part)
      size = part_rows(m, part, shard) * width * dtype.itemsize
      name = bin_path(part, shard, len(m.shards))
      if name not in entry.files or entry.files[name].bytes != size:
        text = f'{FILE}: {name} must have {size:,} bytes'
        yield Problem(text, None, MANIFEST)
  if first != m.sequences:
    text = f'{first:,} sequences in the shards, not {m.sequences:,}'
    yield Problem(f'{FILE}: {text}', None, MANIFEST)


def _sizes(view: View, part: str, shard: int) -> Iterator[Problem]:
  """A .bin and its .blocks, there and of their size."""
  m = view.manifest
  name = bin_path(part, shard, len(m.shards))
  dtype, width = layout(m, part)
  rows = part_rows(m, part, shard)
  try:
    check_size(view.root / name, rows * width * dtype.itemsize)
    sums = view.root / blocks_path(name)
    check_size(sums, 8 * -(-rows // m.rows_per_block))
  except UserError as error:
    if part in planned_parts() or not view.removed_now(shard):
      yield Problem(str(error), shard, part)


def _not_removed(view: View, shard: int) -> Iterator[Problem]:
  for part in row_parts(view.manifest):
    name = bin_path(part, shard, len(view.manifest.shards))
    for path in (view.root / name, view.root / blocks_path(name)):
      if path.exists():
        text = f'{path}: there, though its shard was removed: {MEND}'
        yield Problem(text, shard, REMOVED)


def _record(view: View, shard: int) -> Iterator[Problem]:
  """The record of a finished shard: there, and as the manifest says."""
  m = view.manifest
  if shard in view.unwritten:
    return
  path = record_path(view.root, m, shard)
  record = load_record(view.root, m, shard)
  if shard in view.cut:
    text = f'shard {shard}: its repair was cut off: {MEND}'
    yield Problem(text, shard, RECORD)
  elif record is None:
    what = 'not a record' if path.exists() else 'missing'
    yield Problem(f'{path}: {what}: {MEND}', shard, RECORD)
  elif m.state == COMPLETE and record.files != m.shards[shard].files:
    text = f'{path}: sizes or checksums differ from the manifest: {MEND}'
    yield Problem(text, shard, RECORD)
  elif any(
    v.n != m.shards[shard].rows and not m.site(site).max_norm
    for site, v in record.moments.items()
  ):
    text = f'{path}: statistics of another number of rows: {MEND}'
    yield Problem(text, shard, RECORD)


def _strays(view: View) -> Iterator[str]:
  """What lies in the folder and belongs to no store, or to no finished one."""
  m, ours = view.manifest, {FILE, DOCUMENTS, LOCK}
  for shard in range(len(m.shards)):
    ours.add(record_path(view.root, m, shard).relative_to(view.root).as_posix())
    for part in parts(m):
      name = bin_path(part, shard, len(m.shards))
      ours |= {name, blocks_path(name)}
  if m.state != COMPLETE and not view.unwritten and not view.cut:
    yield f'{view.root / FILE}: all shards are written, but it is not complete'
  for path in sorted(view.root.rglob('*')):
    name = path.relative_to(view.root).as_posix().removesuffix(HELD)
    if name in ours or name.startswith(f'{TRAINERS}/') or path.is_dir():
      continue
    if name == REPAIR:
      yield f'{path}: a repair was cut off, --repair goes on'
    elif not name.endswith('.tmp'):
      yield f'{path}: does not belong to the store'
    elif m.state == COMPLETE:
      yield f'{path}: half-written, of a task that was killed'


def check_checksums(
  view: View, bad: Collection[tuple[int | None, str]]
) -> Check:
  """Every block of every file against its checksum, but those known as bad."""
  m = view.manifest
  jobs = [
    (shard, part)
    for shard in range(len(m.shards))
    for part in [*planned_parts(), *row_parts(m)]
    if (shard in view.files or part in planned_parts())
    and (shard, part) not in bad
  ]
  found = list(_documents(view)) if (None, DOCUMENTS) not in bad else []
  blocks = 0
  sizes = [
    m.shards[s].files[bin_path(part, s, len(m.shards))].bytes
    for s, part in jobs
  ]
  read = lambda job: check_blocks(view, *job)
  with progress('checksums', sum(sizes)) as bar, pool() as threads:
    for size, (n, problem) in zip(sizes, threads.map(read, jobs), strict=True):
      bar.update(size)
      blocks += n
      found += [problem] if problem else []
  looked_at = f'{blocks:,} blocks of {len(jobs):,} files, {sum(sizes):,} bytes'
  return Check('checksums', looked_at, tuple(found))


def check_blocks(
  view: View, shard: int, part: str
) -> tuple[int, Problem | None]:
  """(number of blocks, what is wrong with the first bad one) of a file."""
  wrong: list[str] = []
  blocks = 0
  try:
    file = view.part_file(part, shard)
    out = np.empty((file.block_rows, file.width), file.dtype)
    for blocks in range(1, file.blocks + 1):
      try:
        file.read_into(blocks - 1, out[: file.block_shape(blocks - 1)[0]])
      except UserError as error:
        wrong.append(str(error))
  except UserError as error:
    wrong.append(str(error))
  if not wrong or (
    part in row_parts(view.manifest) and view.removed_now(shard)
  ):
    return blocks, None
  more = f' (and {len(wrong) - 1} more blocks)' if len(wrong) > 1 else ''
  return blocks, Problem(wrong[0] + more, shard, part)


def _documents(view: View) -> Iterator[Problem]:
  """The file of documents, which has one checksum, in the manifest."""
  path, digest = view.root / DOCUMENTS, xxhash.xxh3_64()
  with open(path, 'rb') as file:
    while piece := file.read(1 << 20):
      digest.update(piece)
  if digest.hexdigest() != view.manifest.text.get('documents_xxh3'):
    text = f'{path}: checksum differs from the manifest: {MEND}'
    yield Problem(text, None, DOCUMENTS)
