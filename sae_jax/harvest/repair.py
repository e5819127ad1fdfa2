"""Harvests again what of a store is damaged; the bytes come out the same.

Nothing is deleted before the model is loaded and, where sequences are damaged,
the text has given the recorded ones.
"""

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import tokenizers
import xxhash

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.harvest.again import (
  devices_for,
  find_subject,
  from_harvest,
  origin,
  stored_config,
)
from sae_jax.harvest.documents import scan
from sae_jax.harvest.job import fill, finish, make_forward, model_mesh, share_of
from sae_jax.harvest.planning import fill_spool, made_by
from sae_jax.harvest.positions import Filter
from sae_jax.lm.subject import Subject
from sae_jax.paths import write_atomic
from sae_jax.store.budget import delete_rows
from sae_jax.store.checks import (
  MANIFEST,
  RECORD,
  REMOVED,
  REPAIR,
  STATISTICS,
  Check,
  listed,
  shards_in_hand,
)
from sae_jax.store.finish import removed_shards, reopen
from sae_jax.store.folder import disk_errors_are_users, locked
from sae_jax.store.manifest import (
  COMPLETE,
  DOCUMENTS,
  KEEP,
  SEQUENCES,
  Manifest,
  bin_path,
  local_root,
  planned_parts,
  read_manifest,
  row_parts,
)
from sae_jax.store.plan import block_checksums, sequence_range
from sae_jax.store.records import delete_record, finished_files
from sae_jax.store.sequences import documents_checksum, spool, write_planned
from sae_jax.store.writer import is_claimed, open_writer


def repair(
  root: str | Path,
  checks: Collection[Check],
  *,
  model_path: str = '',
  text_path: str = '',
  subject: Subject | None = None,
  keep: Filter | None = None,
) -> list[str]:
  """Mends what checks have found; returns lines that say what was done.

  Args:
    checks: of `harvest.verify.verify_store`.
    model_path, text_path: where they are now, if they have moved.
    subject: the model, when it is loaded already.
    keep: the harvest's own filter, if it had one and sequences are damaged.

  Shards that another process is writing are left alone. A repair that was
  killed goes on when started again. Raises UserError, and changes nothing,
  when the store is no harvest's or its model or text cannot be had.
  """
  root = local_root(root)
  m = read_manifest(root, complete=False)
  found = [problem for check in checks for problem in check.problems]
  if not found:
    if (root / REPAIR).exists():  # killed when all was written
      finish(root)
      (root / REPAIR).unlink()
    return ['nothing to mend']
  if any(problem.part == MANIFEST for problem in found):
    raise UserError(
      f'--repair: the manifest of {root} contradicts itself, so that nothing '
      'says what the store should be: harvest again into another folder'
    )
  if not from_harvest(m):
    raise UserError(
      f'--repair: {root} is not a harvest but was made from {origin(m)}: make '
      'it from there again, into another folder'
    )
  parts = {problem.part for problem in found}
  shards = {
    problem.shard
    for problem in found
    if problem.shard is not None and problem.part in (RECORD, *row_parts(m))
  }
  config = stored_config(root, m, model_path, text_path)
  lines = [line] if (line := devices_for(config)) else []
  with disk_errors_are_users(root), model_mesh(config, share_of(config)):
    subject = find_subject(config, m, subject)
    if parts & {*planned_parts(), DOCUMENTS}:
      replan(root, m, config, subject, keep)
      lines.append('sequences: packed from the text again, as recorded')
    held = sorted(s for s in shards if is_claimed(root, m, s))
    if held:
      lines.append(
        f'shards {listed(held)}: left alone, another process is writing them'
      )
    if mine := sorted(shards.difference(held)):
      lines += rewrite(root, m, mine, config, subject)
    if REMOVED in parts:
      delete_rows(root, m, removed_shards(m))
      lines.append('removed shards: their rows deleted')
    if STATISTICS in parts:
      with locked(root):
        reopen(root, read_manifest(root, complete=False))
      lines.append('manifest: statistics merged from the records again')
    # Whoever is still writing will finish the store, and has files there.
    if not held and (m.state == COMPLETE or mine):
      finish(root)
      (root / REPAIR).unlink(missing_ok=True)
  return lines


def replan(
  root: Path,
  m: Manifest,
  config: Config,
  subject: Subject,
  keep: Filter | None,
) -> None:
  """Packs the text again and writes what the rows are computed from.

  Raises UserError, and writes nothing, unless text and tokenizer give what the
  manifest has recorded.
  """
  if (name := m.policy.get('filter')) and keep is None:
    raise UserError(
      f'--repair: the sequences of {root} were packed with the filter {name}: '
      'call sae_jax.harvest.repair.repair with it as `keep`'
    )
  try:
    text = scan(config.text)
  except UserError as error:
    raise UserError(f'--repair: {error} (--text_path)') from error
  if text.sha256 != m.text['sha256']:
    raise UserError(
      f'--repair: {config.text.path!r} is another text than the one the store '
      'was harvested from: give --text_path'
    )
  with (
    locked(root, 'plans the store'),
    spool(root, m.sequence_length) as pieces,
  ):
    packed = fill_spool(pieces, config, text, subject, keep)
    planned = {SEQUENCES: packed.sequences, KEEP: packed.keep}
    same = documents_checksum(packed.places) == m.text.get('documents_xxh3')
    if not (same and _as_recorded(m, planned)):
      raise UserError(
        f'--repair: the text gives other sequences than those recorded in '
        f'{root} (tokenizers {m.made_by.get("tokenizers")}, here '
        f'{tokenizers.__version__}): nothing was changed'
      )
    write_planned(root, m, packed.sequences, packed.keep, packed.places)


def _as_recorded(m: Manifest, planned: dict[str, np.ndarray]) -> bool:
  """Whether sequences and what is kept of them have the recorded checksums."""
  for s, entry in enumerate(m.shards):
    for part, whole in planned.items():
      sums = block_checksums(whole[sequence_range(entry)], m.rows_per_block)
      name = bin_path(part, s, len(m.shards))
      if xxhash.xxh3_64_hexdigest(sums) != entry.files[name].checksum:
        return False
  return len(planned[SEQUENCES]) == m.sequences


def rewrite(
  root: Path, m: Manifest, shards: list[int], config: Config, subject: Subject
) -> list[str]:
  """Computes the rows of shards again, in the batches of the harvest."""
  before = {s: finished_files(root, m, s) for s in shards}
  run = make_forward(subject, config)
  in_hand = sorted({*shards, *shards_in_hand(root)})
  write_atomic(root / REPAIR, json.dumps(in_hand))
  # Before anything goes: readers wait for a shard's record.
  with locked(root):
    reopen(root, read_manifest(root, complete=False))
  for s in shards:
    delete_record(root, m, s)
  delete_rows(root, m, shards)
  with open_writer(root, shards, budget=False) as writer:
    b = config.harvest.batch_sequences
    fill(writer, run, b, list(writer.missing))
  now = read_manifest(root, complete=False)
  delete_rows(root, now, removed_shards(now))
  lines = [f'shards {listed(shards)}: rows computed and written again']
  others = [
    s for s in shards if before[s] not in (None, finished_files(root, now, s))
  ]
  if others:
    here = made_by()
    lines.append(
      f'shards {listed(others)}: other bytes than recorded: the record was of '
      f'damaged rows, or it is the device ({m.made_by.get("device")}, here '
      f'{here["device"]}) or jax ({m.made_by.get("jax")}, here {here["jax"]})'
    )
  return lines
