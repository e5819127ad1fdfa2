"""What a check of a store looks at, and how it says what it found."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from sae_jax.store.files import ShardFile, site_file
from sae_jax.store.finish import removed_shards
from sae_jax.store.manifest import (
  COMPLETE,
  FileEntry,
  Manifest,
  local_root,
  read_manifest,
)
from sae_jax.store.records import load_record, record_path

# Parts that are no files of a shard, for Problem.part.
MANIFEST, STATISTICS = 'manifest', 'statistics'
RECORD, REMOVED = 'record', 'removed'
# The shards that a repair has in hand: it goes on with them when killed.
REPAIR = 'repair.json'
# Files read at once: enough for a disk that likes a queue. A block each is
# what lies in memory.
_THREADS = 4


class Problem(NamedTuple):
  """One line about what cannot be trusted; the shard (None: the store as a
  whole) and the part of it, as in the manifest's paths or one of the above."""

  text: str
  shard: int | None = None
  part: str = ''


@dataclasses.dataclass(frozen=True)
class Check:
  """What one check looked at and found; skipped: why it looked at nothing."""

  name: str
  looked_at: str
  problems: tuple[Problem, ...] = ()
  warnings: tuple[str, ...] = ()
  skipped: str = ''

  @property
  def state(self) -> str:
    """'ok', 'skipped' or the number of problems, in words."""
    if self.skipped:
      return 'skipped'
    count = len(self.problems)
    return f'{count} problem{"s" * (count > 1)}' if count else 'ok'


class View(NamedTuple):
  """A store as it is now: its manifest, and how far it has come.

  files: of every shard whose rows should be there, path -> FileEntry;
  unwritten: shards whose are not, yet; cut: those a killed repair has left.
  """

  root: Path
  manifest: Manifest
  files: dict[int, dict[str, FileEntry]]
  unwritten: list[int]
  cut: list[int]

  def part_file(self, part: str, shard: int) -> ShardFile:
    """A file of a shard as it lies on the disk; UserError if it cannot."""
    files = self.files.get(shard)
    return ShardFile(self.root, self.manifest, part, shard, files)

  def rows_file(self, site: str, shard: int) -> ShardFile:
    """The rows of a site as a reader sees them; UserError likewise."""
    files = self.files[shard]
    return site_file(self.root, self.manifest, site, shard, files)

  def removed_now(self, shard: int) -> bool:
    """Whether a harvest has removed the shard since the view was taken."""
    return read_manifest(self.root, complete=False).shards[shard].removed


def look(root: str | Path) -> View:
  """The view of a store; UserError when there is none."""
  root = local_root(root)
  manifest = read_manifest(root, complete=False)
  gone, files, unwritten = removed_shards(manifest), {}, []
  cut = shards_in_hand(root)
  for s, entry in enumerate(manifest.shards):
    if s in gone:
      continue
    if manifest.state == COMPLETE:
      files[s] = entry.files
    elif record := load_record(root, manifest, s):
      files[s] = record.files
    elif s not in cut and not record_path(root, manifest, s).exists():
      unwritten.append(s)
  cut = [s for s in cut if load_record(root, manifest, s) is None]
  return View(root, manifest, files, unwritten, cut)


def shards_in_hand(root: Path) -> list[int]:
  """The shards that a repair was writing when it was killed."""
  path = root / REPAIR
  return json.loads(path.read_text()) if path.exists() else []


def listed(numbers: list[int]) -> str:
  """'3', '3, 5', '3 and 17 more': shards, in a few words."""
  if len(numbers) <= 3:
    return ', '.join(map(str, numbers))
  return f'{numbers[0]} and {len(numbers) - 1} more'


def pool() -> ThreadPoolExecutor:
  """Threads to read with: files and checksums let go of the interpreter."""
  return ThreadPoolExecutor(_THREADS)


def progress(what: str, total: int, unit: str = 'B') -> tqdm:
  """A bar on a terminal, nothing elsewhere."""
  return tqdm(
    total=total, desc=what, unit=unit, unit_scale=True, disable=None,
    leave=False,
  )  # fmt: skip
