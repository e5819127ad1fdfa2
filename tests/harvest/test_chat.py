"""Chats: rendered by the template, its control tokens read as such."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tiny_harvest import pack_all, tiny_subject

from sae_jax.errors import UserError
from sae_jax.harvest.chat import check_messages, make_render
from sae_jax.harvest.files import Text
from sae_jax.harvest.packing import pack
from sae_jax.harvest.positions import all_of, first, without

TEMPLATE = (
  "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] "
  "+ ' ' + eos_token + ' ' }}{% endfor %}"
)
CHATS = [
  [{'role': 'w1', 'content': f'w{i} w3'}, {'role': 'w2', 'content': 'w5'}]
  for i in range(10, 30)
]


def source(chats):
  return Text('made', len(chats), 1, 0, '', True, chats.__getitem__)


def tiny_tokenizer():
  tokenizer = tiny_subject().tokenizer
  tokenizer.add_special_tokens(['<|im_start|>'])  # id 40
  return tokenizer


def test_a_chat_becomes_tokens_with_the_templates_control_tokens():
  tokenizer = tiny_tokenizer()
  tokenizer.encode_special_tokens = True  # reads them as plain text
  packed = pack_all(
    pack(
      source(CHATS), tokenizer, bos=0, separator=1, length=12, rows=0, seed=0,
      keep=all_of(first(1), without({0, 1, 2, 40})), chat_template=TEMPLATE,
    )
  )  # fmt: skip
  # <|im_start|> w1 wi w3 </s> <|im_start|> w2 w5 </s>, and the separator.
  flat = packed.sequences[:, 1:].ravel()
  assert len(flat) >= 19 * 10
  numbers = packed.places[:, 0]
  for k, number in enumerate(numbers[:19]):
    wanted = [40, 4, 3 + 10 + number, 6, 1, 40, 5, 8, 1, 1]
    assert flat[10 * k : 10 * k + 10].tolist() == wanted
  assert packed.rows == packed.keep.sum()
  assert (packed.keep.sum() * 2) <= packed.sequences.size
  assert tokenizer.encode_special_tokens  # the caller's is as it was


def test_chats_need_a_template():
  with pytest.raises(UserError, match='has no chat template'):
    pack(
      source(CHATS), tiny_tokenizer(), bos=0, separator=1, length=12, rows=0,
      seed=0, keep=first(1),
    )  # fmt: skip


def test_what_a_template_refuses_is_named():
  refuses = "{{ raise_exception('roles must alternate') }}"
  render = make_render(tiny_tokenizer(), refuses, 0, 1)
  with pytest.raises(UserError, match='x, document 3: .*roles must alternate'):
    render(CHATS[0], 'x, document 3')
  broken = make_render(tiny_tokenizer(), '{% for %}', 0, 1)
  with pytest.raises(UserError, match='template is not valid'):
    broken(CHATS[0], 'x')


def test_a_template_knows_bos_and_no_clock():
  template = "{{ bos_token }} {{ strftime_now('%d %B %Y') }}"
  render = make_render(tiny_tokenizer(), template, 0, 1)
  assert render(CHATS[0], 'x') == '<s> 26 July 2024'
  with pytest.raises(UserError, match='asks for the date'):
    make_render(tiny_tokenizer(), '{{ strftime_now(format) }}', 0, 1)


def test_messages_keep_role_and_content_alone():
  message = {'role': 'w1', 'content': 'w2'}
  assert check_messages([message | {'name': 'x'}], '') == [message]


@pytest.mark.model
def test_smollm2():
  gguf = pytest.importorskip('gguf')
  from sae_jax.lm import tokens
  from sae_jax.paths import cache_dir

  root = Path(__file__).parents[2]
  fetch = [sys.executable, 'scripts/fetch_demo.py']
  env = os.environ | {'PYTHONPATH': str(root)}
  subprocess.run(fetch, cwd=root, env=env, check=True)
  path = cache_dir('demo', 'SmolLM2-135M-Instruct.Q4_1.gguf')
  fields = gguf.GGUFReader(path).fields
  meta = {name: field.contents() for name, field in fields.items()}
  words = tokens.from_gguf(meta, path)
  tokenizer, special = words.tokenizer, words.special
  assert isinstance(tokenizer, tokenizers.Tokenizer)
  bos = meta['tokenizer.ggml.bos_token_id']
  eos = meta['tokenizer.ggml.eos_token_id']
  chats = [
    [{'role': 'user', 'content': f'What is {i} + 1?'},
     {'role': 'assistant', 'content': f'It is {i + 1}.'}]
    for i in range(40)
  ]  # fmt: skip
  packed = pack_all(
    pack(
      source(chats), tokenizer, bos=bos, separator=eos, length=32, rows=500,
      seed=0, keep=all_of(first(1), without(special | {bos, eos})),
      chat_template=meta['tokenizer.chat_template'],
    )
  )  # fmt: skip
  assert packed.rows == 500
  start, end = (tokenizer.token_to_id(f'<|im_{x}|>') for x in ('start', 'end'))
  assert {start, end} <= special
  number = packed.places[0, 0]
  flat = packed.sequences[:, 1:].ravel()
  second = packed.places[1, 1]
  document = flat[: second // 32 * 31 + second % 32 - 1]
  assert document[-1] == eos
  text = tokenizer.decode(document[:-1].tolist(), skip_special_tokens=False)
  # The template's own system message, then ours.
  assert text.startswith('<|im_start|>system\n')
  assert text.endswith(
    f'<|im_start|>user\nWhat is {number} + 1?<|im_end|>\n'
    f'<|im_start|>assistant\nIt is {number + 1}.<|im_end|>\n'
  )
  assert (document == start).sum() == 3 and (document == end).sum() == 4
