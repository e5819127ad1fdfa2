"""Finds the documents of a corpus: `scan` says what there is to harvest.

Plain text is read here, one file a document; harvest/tables.py has the other
sources. Documents are read one by one, never all at once.
"""

import re
from pathlib import Path

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.harvest import tables
from sae_jax.harvest.files import (
  KINDS,
  SUFFIXES,
  Text,
  find_files,
  hash_files,
  kind_of,
  nearest,
  no_text,
)

_SAVED = ('info', 'dict')  # what `save_to_disk` leaves
# A file that ends like this is not taken for plain text without being asked.
_OTHERS = (
  '.json', '.csv', '.tsv', '.arrow', '.json.gz', '.json.zst', '.txt.gz',
  '.txt.zst', '.zip', '.tar', '.tar.gz',
)  # fmt: skip


def scan(text: Config) -> Text:
  """Finds, checks and hashes what a config's `text` block names.

  Args:
    text: path, kind, column, chat, split and name, as harvest/config.py.

  Raises UserError, naming the file and the place in it, when there is no text
  or it is not what its kind says.
  """
  kind = text.kind or _detect(text.path)
  if kind not in KINDS:
    raise UserError(
      f'text.kind: {kind!r} is not known{nearest(kind, KINDS)}; known: '
      f"'' to detect it, {', '.join(KINDS)}"
    )
  root = Path(text.path).expanduser()
  if kind == 'txt':
    if text.chat:
      raise UserError(
        'text.chat: a .txt file is no chat: give .jsonl, .parquet or a data set'
      )
    return _plain(text.path, root, find_files(root, kind))
  if kind == 'jsonl':
    return tables.jsonl(text, root, find_files(root, kind))
  if kind == 'parquet':
    return tables.parquet(text, root, find_files(root, kind))
  return tables.saved(text, root) if kind == 'datasets' else tables.hub(text)


def _plain(name: str, root: Path, files: list[Path]) -> Text:
  """A corpus of .txt files, each a document."""
  sha256, size = hash_files(root, files, utf8=True)
  read = lambda i: files[i].read_bytes().decode('utf-8')
  return Text(name, len(files), len(files), size, sha256, False, read)


def _detect(path: str) -> str:
  """The kind of source at a path; UserError when there is none, or two."""
  root = Path(path).expanduser()
  if root.is_dir():
    if any((root / f'dataset_{name}.json').exists() for name in _SAVED):
      return 'datasets'
    found = {kind_of(file) for file in root.rglob('*') if file.is_file()}
    kinds = [kind for kind in SUFFIXES if kind in found]
    if len(kinds) > 1:
      raise UserError(
        f'text.path: {path!r} has files of several kinds: choose with '
        f'--config.text.kind={" or ".join(kinds)}'
      )
    if kinds:
      return kinds[0]
  elif root.is_file():
    if not root.name.endswith(_OTHERS):
      return kind_of(root) or 'txt'
    raise UserError(
      f'text.path: {path!r} is of no kind we read: make it .txt, .jsonl '
      'or .parquet, or say what it is with '
      f'--config.text.kind={" or ".join(SUFFIXES)}'
    )
  elif re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', path) and not kind_of(root):
    return 'hub'
  raise no_text(root)
