"""Finds the documents of a corpus: `scan` says what there is to harvest.

Plain text is read here, one file a document; harvest/tables.py has the other
sources. Documents are read one by one, never all at once.
"""

import re
from pathlib import Path

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.harvest import files, tables
from sae_jax.harvest.config import base_config
from sae_jax.harvest.files import KINDS, Text, kind_of, nearest

_SAVED = ('info', 'dict')  # what `save_to_disk` leaves
# Keys that a kind of source has no use for.
_UNUSED = {
  'txt': ('column', 'chat', 'split', 'name'), 'jsonl': ('split', 'name'),
  'parquet': ('split', 'name'), 'datasets': ('name',), 'hub': (),
}  # fmt: skip


def scan(text: Config) -> Text:
  """Finds, checks and hashes what a config's `text` block names.

  Args:
    text: path, kind, column, chat, split and name, as harvest/config.py.

  Raises UserError, naming the file and the place in it, when there is no text,
  it is not what its kind says, or lacks what the config asks for.
  """
  kind = text.kind or _detect(text.path)
  if kind not in KINDS:
    raise UserError(
      f'text.kind: {kind!r} is not known{nearest(kind, KINDS)}; known: '
      f"'' to detect it, {', '.join(KINDS)}"
    )
  usual = base_config().text
  for key in _UNUSED[kind]:
    if text[key] != usual[key]:
      raise UserError(
        f'text.{key}: {text[key]!r}, which {text.path} ({kind}) does not have: '
        f'leave it at {usual[key]!r}, or give a source that has'
      )
  root = Path(text.path).expanduser()
  if kind == 'datasets':
    return tables.saved(text, root)
  if kind == 'hub':
    return tables.hub(text)
  found = files.find_files(root, kind, bool(text.kind))
  if kind == 'txt':
    return _plain(text.path, root, found)
  return tables.copied(text, root, found, kind)


def _plain(name: str, root: Path, found: list[Path]) -> Text:
  """A corpus of .txt files, each a document."""
  sha256, size = files.hash_files(root, found, text=True)

  def read(i: int) -> str:
    with files.reading(found[i]), files.opened(found[i]) as raw:
      return raw.read().decode('utf-8')

  return Text(name, len(found), len(found), size, sha256, False, read)


def _detect(path: str) -> str:
  """The kind of source at a path; UserError when there is none, or two."""
  root = Path(path).expanduser()
  if root.is_dir():
    if any((root / f'dataset_{name}.json').exists() for name in _SAVED):
      return 'datasets'
    found = {kind_of(file) for file in files.seen(root)}
    kinds = [kind for kind in files.FILES if kind in found]
    if len(kinds) > 1:
      raise UserError(
        f'text.path: {path!r} has files of several kinds: choose with '
        f'--config.text.kind={" or ".join(kinds)}'
      )
    if kinds:
      return kinds[0]
  elif root.is_file():
    if (kind := kind_of(root) or 'txt') != 'other':
      return kind
    raise UserError(
      f'text.path: {path!r} is of no kind we read: make it .txt, .jsonl '
      'or .parquet, or say what it is with '
      f'--config.text.kind={" or ".join(files.FILES)}'
    )
  elif re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', path) and not kind_of(root):
    return 'hub'
  raise files.no_text(root)
