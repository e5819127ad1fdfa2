"""Finds the documents of a corpus: `scan` says what there is to harvest.

Plain text is read here, one file a document; harvest/tables.py has the other
sources. Documents are read one by one, never all at once.
"""

import re
from pathlib import Path

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.harvest import tables
from sae_jax.harvest.config import base_config
from sae_jax.harvest.files import (
  FILES,
  KINDS,
  Text,
  ending,
  find_files,
  hash_files,
  kind_of,
  nearest,
  no_text,
  opened,
  reading,
  seen,
)

_SAVED = ('info', 'dict')  # what `save_to_disk` leaves
# A file that ends like this is not taken for plain text without being asked.
_OTHERS = ('json', 'csv', 'tsv', 'arrow', 'zip', 'tar', 'tgz')
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
  files = find_files(root, kind, bool(text.kind))
  if kind == 'txt':
    return _plain(text.path, root, files)
  return tables.copied(text, root, files, kind)


def _plain(name: str, root: Path, files: list[Path]) -> Text:
  """A corpus of .txt files, each a document."""
  sha256, size = hash_files(root, files, text=True)

  def read(i: int) -> str:
    with reading(files[i]), opened(files[i]) as raw:
      return raw.read().decode('utf-8')

  return Text(name, len(files), len(files), size, sha256, False, read)


def _detect(path: str) -> str:
  """The kind of source at a path; UserError when there is none, or two."""
  root = Path(path).expanduser()
  if root.is_dir():
    if any((root / f'dataset_{name}.json').exists() for name in _SAVED):
      return 'datasets'
    found = {kind_of(file) for file in seen(root)}
    kinds = [kind for kind in FILES if kind in found]
    if len(kinds) > 1:
      raise UserError(
        f'text.path: {path!r} has files of several kinds: choose with '
        f'--config.text.kind={" or ".join(kinds)}'
      )
    if kinds:
      return kinds[0]
  elif root.is_file():
    if ending(root) not in _OTHERS:
      return kind_of(root) or 'txt'
    raise UserError(
      f'text.path: {path!r} is of no kind we read: make it .txt, .jsonl '
      'or .parquet, or say what it is with '
      f'--config.text.kind={" or ".join(FILES)}'
    )
  elif re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', path) and not kind_of(root):
    return 'hub'
  raise no_text(root)
