"""Tokenizers rebuilt from GGUF metadata against the real ones, trained here."""

import itertools
import json
import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from sae_jax.lm import tokens

WORDS = (
  'the quick brown fox jumps over lazy dogs while thinking about naïve '
  "café-goers, it's 1962 or 20,000 leagues; don't we'll they've"
).split()


def texts(n=60):
  """Words with all kinds of white space, digits and unseen characters."""
  draw = random.Random(0)
  between = [' ', ' ', ' ', '  ', '\n', '\n\n', '\t', '']
  odd = ['日本', '🙂', 'Ωmega', '1234567', 'THE', "I'LL", '</b>', '...', '\r\n']
  for _ in range(n):
    some = draw.choices(WORDS + odd, k=draw.randint(1, 30))
    yield ''.join(x + draw.choice(between) for x in some)


@pytest.mark.parametrize('prefix', [False, True], ids=['gemma', 'llama'])
def test_sentence_piece(tmp_path, prefix):
  sentencepiece = pytest.importorskip('sentencepiece')
  pairs = itertools.product(WORDS, WORDS)
  (tmp_path / 'text').write_text('\n'.join(' '.join(x) for x in pairs))
  sentencepiece.SentencePieceTrainer.train(
    input=str(tmp_path / 'text'), model_prefix=str(tmp_path / 'm'),
    vocab_size=450, model_type='bpe', byte_fallback=True,
    add_dummy_prefix=prefix, normalization_rule_name='identity',
    remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
    user_defined_symbols=[] if prefix else ['\n\n', '</b>'],
  )  # fmt: skip
  theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / 'm.model'))
  n = theirs.vocab_size()
  kind = lambda i: (
    6 if theirs.is_byte(i) else 2 if theirs.is_unknown(i)
    else 3 if theirs.is_control(i)
    else 4 if theirs.id_to_piece(i) in ('\n\n', '</b>') else 1
  )  # fmt: skip
  meta = {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.tokens': [theirs.id_to_piece(i) for i in range(n)],
    'tokenizer.ggml.scores': [theirs.get_score(i) for i in range(n)],
    'tokenizer.ggml.token_type': [kind(i) for i in range(n)],
    'tokenizer.ggml.unknown_token_id': 0,
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 2,
    'tokenizer.ggml.add_space_prefix': prefix,
  }
  words = tokens.from_gguf(meta, 'x.gguf')
  assert words.special == {1, 2}
  for text in texts():
    ids = words.tokenizer.encode(text).ids
    assert ids == theirs.encode(text), text
    assert words.tokenizer.decode(ids) == text


def byte_meta(pre, arch):
  trained = Tokenizer(models.BPE())
  trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
  numbers = [str(i) for i in range(100)] * 3
  trained.train_from_iterator([*WORDS * 3, *texts(), *numbers], trainer)
  vocab = sorted(trained.get_vocab().items(), key=lambda x: x[1])
  merges = json.loads(trained.to_str())['model']['merges']
  return {
    'general.architecture': arch,
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': pre,
    'tokenizer.ggml.tokens': [x for x, _ in vocab],
    'tokenizer.ggml.token_type': [1] * len(vocab),
    'tokenizer.ggml.merges': [' '.join(x) for x in merges],
    'tokenizer.ggml.bos_token_id': 0,
    'tokenizer.ggml.eos_token_id': 0,
  }


def test_qwen2_against_transformers():
  transformers = pytest.importorskip('transformers')
  meta = byte_meta('qwen2', 'qwen2')
  words = tokens.from_gguf(meta, 'x.gguf')
  assert words.bos is None  # its files name one that is not to be used
  theirs = transformers.Qwen2Tokenizer(
    vocab={x: i for i, x in enumerate(meta['tokenizer.ggml.tokens'])},
    merges=[tuple(x.split(' ')) for x in meta['tokenizer.ggml.merges']],
  )
  for text in [*texts(), 'e\u0301']:
    assert words.tokenizer.encode(text).ids == theirs(text)['input_ids'], text


def test_llama3_cuts_digits_by_threes():
  meta = byte_meta('llama-bpe', 'llama')
  words = tokens.from_gguf(meta, 'x.gguf')
  cut = words.tokenizer.pre_tokenizer.pre_tokenize_str("1234567 we'LL go\n\n x")
  assert [x for x, _ in cut] == [
    '123', '456', '7', 'Ġwe', "'LL", 'Ġgo', 'ĊĊ', 'Ġx',
  ]  # fmt: skip
  assert words.bos == 0
