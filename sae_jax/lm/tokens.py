"""Tokenizers: of Hugging Face folders, and rebuilt from GGUF metadata.

GGUF names how text is cut before merging (tokenizer.ggml.pre) without saying
what that is, so it is known here; SentencePiece models ('llama') cut nothing,
and their merges follow from the pieces' scores.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sae_jax.errors import UserError

# Values of tokenizer.ggml.token_type
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_BY_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
  r'| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def _cut(digits: str):
  pattern = tokenizers.Regex(_BY_WORDS.format(digits=digits))
  return pre_tokenizers.Split(pattern, 'isolated')


# tokenizer.ggml.pre -> (steps before bytes become characters, whether GPT-2's
# cut follows): what the models' own tokenizer.json have.
_CUTS = {
  'gpt-2': ((), True),
  'smollm': ((pre_tokenizers.Digits(individual_digits=True),), True),
  'llama-bpe': ((_cut('{1,3}'),), False),
  'qwen2': ((_cut(''),), False),
}


@dataclasses.dataclass(frozen=True)
class Words:
  """A tokenizer and what is known of its special tokens."""

  tokenizer: tokenizers.Tokenizer  # adds no special tokens by itself
  bos: int | None  # None: the model has none (Qwen)
  eos: int | None
  pad: int | None
  special: frozenset[int]  # control tokens
  chat_template: str | None = None  # Jinja


def tokenizer_sha256(tokenizer: tokenizers.Tokenizer) -> str:
  """Hex digest of the tokenizer's full JSON description."""
  return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def from_folder(folder: Path, hint: str) -> Words:
  """The tokenizer transformers makes of a folder.

  Raises UserError, ending with the hint, where there is none or it is not one
  of the `tokenizers` package.
  """
  import transformers  # here: takes a second
  from huggingface_hub.errors import StrictDataclassError

  if (
    not any(folder.glob('tokenizer*')) and not (folder / 'vocab.json').exists()
  ):
    raise UserError(f'{folder} has no tokenizer: {hint}')
  try:
    load = transformers.AutoTokenizer.from_pretrained
    try:
      auto = load(folder, trust_remote_code=False)
    except StrictDataclassError:  # in config.json, which hf.py checks
      plain = transformers.PreTrainedConfig()
      auto = load(folder, trust_remote_code=False, config=plain)
    tokenizer = _from_json(auto.backend_tokenizer.to_str())
  except Exception as error:  # it raises what it likes, bare ones included
    reason = ' '.join(str(error).split())[:200]
    raise UserError(
      f'{folder}: transformers makes no fast tokenizer of it '
      f'({type(error).__name__}: {reason}): {hint}'
    ) from error
  template = auto.chat_template
  if isinstance(template, dict):
    template = template.get('default')
  return Words(
    tokenizer,
    bos=auto.bos_token_id,
    eos=auto.eos_token_id,
    pad=auto.pad_token_id,
    special=_special(tokenizer) | frozenset(auto.all_special_ids),
    chat_template=template,
  )


def from_file(path: Path, ids: Mapping[str, int | None]) -> Words:
  """A tokenizer.json; ids: the model's 'bos', 'eos' and 'pad'."""
  try:
    tokenizer = _from_json(path.read_text(encoding='utf-8'))
  except Exception as error:  # the package raises Exception itself
    raise UserError(
      f'model.tokenizer: {path} is no tokenizer.json ({error})'
    ) from error
  named = frozenset(x for x in ids.values() if x is not None)
  return Words(
    tokenizer, ids['bos'], ids['eos'], ids['pad'], _special(tokenizer) | named
  )


def _from_json(text: str) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer.from_str(text)
  tokenizer.post_processor = None  # what would add BOS
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def _special(tokenizer: tokenizers.Tokenizer) -> frozenset[int]:
  added = tokenizer.get_added_tokens_decoder()
  return frozenset(i for i, token in added.items() if token.special)


def fitted(words: Words, vocab: int, where: str) -> Words:
  """The same without control tokens that the embedding has no row for.

  Gemma 3's small models have such a one, for images, and a padding token is
  often added. Any other token beyond the embedding is another model's:
  UserError.
  """
  ids = (words.bos or 0, words.eos or 0, words.pad or 0)
  if max(_most(words.tokenizer), *ids) < vocab:
    return words
  parts = json.loads(words.tokenizer.to_str())
  parts['added_tokens'] = [
    token for token in parts['added_tokens']
    if token['id'] < vocab or not token['special']
  ]  # fmt: skip
  kept = tokenizers.Tokenizer.from_str(json.dumps(parts))
  most = max(_most(kept), words.bos or 0, words.eos or 0)
  if most >= vocab:
    raise UserError(
      f'{where}: the tokenizer has ids up to {most}, the embedding {vocab} '
      "rows: it is not this model's; check model.tokenizer"
    )
  return dataclasses.replace(
    words,
    tokenizer=kept,
    pad=words.pad if (words.pad or 0) < vocab else None,
    special=frozenset(i for i in words.special if i < vocab),
  )


def _most(tokenizer: tokenizers.Tokenizer) -> int:
  return max(tokenizer.get_vocab().values(), default=-1)


def from_gguf(meta: Mapping[str, Any], where: str) -> Words:
  """The tokenizer of a GGUF file's metadata; where: its path for messages.

  Raises UserError for another kind of tokenizer, or parts that do not fit.
  """
  kind, cut = meta.get('tokenizer.ggml.model'), meta.get('tokenizer.ggml.pre')
  if kind not in ('gpt2', 'llama') or (kind == 'gpt2' and cut not in _CUTS):
    raise UserError(
      f'{where}: tokenizer {kind!r} with pre-tokenizer {cut!r} is not known; '
      f"known: 'llama', and 'gpt2' with {', '.join(map(repr, _CUTS))}; name a "
      'folder that has the tokenizer with model.tokenizer'
    )
  try:
    words = meta['tokenizer.ggml.tokens']
    kinds = meta['tokenizer.ggml.token_type']
    if kind == 'gpt2':
      merges = meta['tokenizer.ggml.merges']
      tokenizer = _byte_level(words, merges, str(cut))
    else:
      tokenizer = _sentence_piece(words, meta['tokenizer.ggml.scores'], meta)
    tokenizer.add_tokens([
      tokenizers.AddedToken(word, special=kind == _CONTROL, normalized=False)
      for word, kind in zip(words, kinds, strict=True)
      if kind in (_CONTROL, _USER_DEFINED)
    ])  # fmt: skip
  except Exception as error:  # the package raises Exception itself
    raise UserError(
      f'{where}: its vocabulary does not fit together ({error!r:.160}): name '
      'a folder that has the tokenizer with model.tokenizer'
    ) from error
  get = lambda name: meta.get(f'tokenizer.ggml.{name}_token_id')
  # Qwen's files name a BOS that is not to be used
  bos = None if meta.get('general.architecture') in ('qwen2', 'qwen3') else (
    get('bos')
  )  # fmt: skip
  return Words(
    tokenizer,
    bos=bos,
    eos=get('eos'),
    pad=get('padding'),
    special=frozenset(i for i, kind in enumerate(kinds) if kind == _CONTROL),
    chat_template=meta.get('tokenizer.chat_template'),
  )


def _byte_level(words, merges, cut: str) -> tokenizers.Tokenizer:
  """BPE over the bytes of text cut in words: llama.cpp's 'gpt2'."""
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab={word: i for i, word in enumerate(words)},
      merges=[tuple(merge.split(' ')) for merge in merges],
      # Llama 3 has whole words that no merge leads to
      ignore_merges=cut == 'llama-bpe',
    )
  )
  steps, gpt2 = _CUTS[cut]
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
  tokenizer.decoder = decoders.ByteLevel()
  if cut == 'qwen2':
    tokenizer.normalizer = normalizers.NFC()
  return tokenizer


def _sentence_piece(words, scores, meta) -> tokenizers.Tokenizer:
  """SentencePiece's BPE: of the pairs at hand merge the one whose whole has
  the best score, the leftmost of equals; unknown characters become bytes.
  """
  vocab = {word: i for i, word in enumerate(words)}
  kinds = meta['tokenizer.ggml.token_type']
  ranked = sorted(
    (i for i, kind in enumerate(kinds) if kind == _NORMAL),
    key=lambda i: -scores[i],
  )
  merges = [
    (word[:cut], word[cut:])
    for word in (words[i] for i in ranked)
    for cut in range(1, len(word))
    if word[:cut] in vocab and word[cut:] in vocab
  ]
  unknown = meta.get('tokenizer.ggml.unknown_token_id')
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=merges,
      unk_token=None if unknown is None else words[unknown],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  prefix = bool(meta.get('tokenizer.ggml.add_space_prefix', True))
  steps = [normalizers.Prepend('▁')] if prefix else []
  tokenizer.normalizer = normalizers.Sequence(
    [*steps, normalizers.Replace(' ', '▁')]
  )
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    + ([decoders.Strip(' ', 1, 0)] if prefix else [])
  )
  return tokenizer
