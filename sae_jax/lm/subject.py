"""A subject model with all that a harvest must know and record of it."""

import dataclasses
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import tokenizers

from sae_jax.errors import UserError
from sae_jax.lm import gguf, hf, hub, tokens
from sae_jax.lm.config import LMConfig
from sae_jax.lm.model import Params
from sae_jax.lm.tokens import tokenizer_sha256

KINDS = ('gguf', 'hf', 'hub')


@dataclasses.dataclass(frozen=True)
class Subject:
  """A language model, its tokenizer, and the hashes that identify both."""

  name: str
  cfg: LMConfig
  params: Params
  tokenizer: tokenizers.Tokenizer  # adds no special tokens by itself
  bos: int | None  # None: the model has none (Qwen)
  eos: int
  pad: int | None
  special: frozenset[int]  # control tokens, never harvested
  weights_sha256: str  # see the function
  tokenizer_sha256: str  # of tokenizer.to_str()
  chat_template: str | None = None  # Jinja, as the model's makers wrote it


def load_subject(
  model: ml_collections.ConfigDict,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> Subject:
  """Loads what a config's `model` block names, onto the current mesh.

  model: `path`, a Hugging Face folder, a .gguf file or a name on the hub;
  `kind`, which of them ('hf', 'gguf', 'hub'; '' finds out); `weights`, which
  file or index of a folder that has several (''); `tokenizer`, a folder or
  tokenizer.json in place of the model's own (''). dtype is that of the weight
  matrices; gains and biases are float32. With a mesh set (jax.set_mesh) every
  parameter is read straight into its shards.

  Raises UserError for an unknown kind, for what is missing, damaged or does
  not fit, an architecture we do not know, a hub that does not answer.
  """
  kind, path, weights = _locate(model)
  opened = gguf.opened(path) if kind == 'gguf' else hf.opened(path, weights)
  other = str(model.get('tokenizer') or '')
  words = _tokenizer(other, opened.ids) if other else opened.words()
  words = tokens.fitted(words, opened.cfg.vocab, other or str(path))
  if words.eos is None:
    raise UserError(
      f'{other or path}: the tokenizer names no token that ends a text (eos): '
      'name one that does with model.tokenizer'
    )
  names = {'gguf': path.stem, 'hf': path.resolve().name}
  return Subject(
    name=names.get(kind, str(model.path)),
    cfg=opened.cfg,
    params=opened.params(dtype),
    tokenizer=words.tokenizer,
    bos=words.bos,
    eos=words.eos,
    pad=words.pad,
    special=words.special,
    weights_sha256=_sha256(kind, path, weights),
    tokenizer_sha256=tokenizer_sha256(words.tokenizer),
    chat_template=words.chat_template,
  )


def weights_sha256(model: ml_collections.ConfigDict) -> str | None:
  """What Subject.weights_sha256 would be, without loading; None: not here.

  A .gguf file's own sha256. Of a folder: sha256 of the lines `sha256sum`
  prints for config.json and the weights' files, sorted by name; of several
  .gguf files: for these. Every byte is read, 8 files at a time. A model of the
  hub counts as here when it is cached. Raises UserError for an unknown kind.
  """
  _check_kind(str(model.get('kind') or ''))
  try:
    return _sha256(*_locate(model, cached_only=True))
  except (UserError, OSError):
    return None


def _locate(
  model: ml_collections.ConfigDict, cached_only: bool = False
) -> tuple[str, Path, str]:
  """The kind of a model, where its files are, fetched if need be, and which."""
  kind, given = str(model.get('kind') or ''), str(model.path)
  weights = str(model.get('weights') or '')
  path = Path(given).expanduser()
  _check_kind(kind)
  if not kind:
    if path.is_dir():
      kind = 'hf'
    elif path.suffix == '.gguf':
      kind = 'gguf'
    elif re.fullmatch(r'[\w.-]+/[\w.-]+', given) and not path.exists():
      kind = 'hub'
    else:
      raise UserError(
        f'model.path: {given!r} is no folder, no .gguf file and no name on the '
        'hub (org/name): check the path'
      )
  if weights and kind == 'gguf':
    raise UserError(f'model.weights: {path} is all there is: leave it empty')
  if kind == 'hub':
    path = hub.fetch(given, cached_only, weights)
  return kind, path, weights


def _check_kind(kind: str) -> None:
  if kind and kind not in KINDS:
    raise UserError(
      f'model.kind {kind!r} is not known; known: {", ".join(KINDS)}'
    )


def _tokenizer(given: str, ids: dict[str, int | None]) -> tokens.Words:
  """Of a folder or a tokenizer.json; ids: what the model says of its own."""
  path = Path(given).expanduser()
  if path.is_dir():
    return tokens.from_folder(path, 'check model.tokenizer')
  return tokens.from_file(path, ids)


def _sha256(kind: str, path: Path, weights: str) -> str:
  def digest(file: Path) -> str:
    with open(file, 'rb') as raw:
      return hashlib.file_digest(raw, 'sha256').hexdigest()

  files = gguf.files(path)
  if kind != 'gguf':
    files = sorted([path / hf.CONFIG, *hf.weight_files(path, weights)])
  with ThreadPoolExecutor(8) as pool:  # hashing lets go of the interpreter
    digests = list(pool.map(digest, files))
  if len(files) == 1:
    return digests[0]
  lines = [f'{x}  {y.name}\n' for x, y in zip(digests, files, strict=True)]
  return hashlib.sha256(''.join(lines).encode()).hexdigest()
