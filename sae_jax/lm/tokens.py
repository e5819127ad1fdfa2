"""Tokenizers rebuilt with the `tokenizers` package from GGUF metadata.

Byte-level BPE only: what llama.cpp calls model 'gpt2'. How text is cut before
merging is only named in the file (tokenizer.ggml.pre), so it is known here.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from sae_jax.errors import UserError

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

# Digits one by one before GPT-2's cut, as the model's own tokenizer.json has.
_CUTS = {
  'gpt-2': (),
  'smollm': (pre_tokenizers.Digits(individual_digits=True),),
}


def from_gguf(
  meta: Mapping[str, Any], where: str
) -> tuple[tokenizers.Tokenizer, frozenset[int]]:
  """The tokenizer of a GGUF file and the ids of its control tokens.

  meta is the file's metadata, where its path for messages. Raises UserError
  for another kind of tokenizer. Encoding adds no special token by itself.
  """
  kind, cut = meta.get('tokenizer.ggml.model'), meta.get('tokenizer.ggml.pre')
  if kind != 'gpt2' or cut not in _CUTS:
    raise UserError(
      f'{where}: tokenizer {kind!r} with pre-tokenizer {cut!r} is not known; '
      f"known: 'gpt2' with {', '.join(map(repr, _CUTS))}"
    )
  try:
    words = meta['tokenizer.ggml.tokens']
    kinds = meta['tokenizer.ggml.token_type']
    merges = meta['tokenizer.ggml.merges']
  except KeyError as error:
    raise UserError(f'{where}: the metadata lacks {error}') from error
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab={word: i for i, word in enumerate(words)},
      merges=[tuple(merge.split(' ')) for merge in merges],
    )
  )
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*_CUTS[cut], byte_level])
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_tokens([
    tokenizers.AddedToken(word, special=kind == _CONTROL, normalized=False)
    for word, kind in zip(words, kinds, strict=True)
    if kind in (_CONTROL, _USER_DEFINED)
  ])  # fmt: skip
  special = frozenset(i for i, kind in enumerate(kinds) if kind == _CONTROL)
  return tokenizer, special
