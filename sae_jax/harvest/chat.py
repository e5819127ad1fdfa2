"""Chats: lists of messages, checked and rendered by a chat template."""

import datetime
import re
from collections.abc import Callable
from typing import Any

import jinja2
import tokenizers

from sae_jax.errors import UserError

Messages = list[dict[str, str]]

# Templates may write the date of the day; a store must not depend on when it
# was made. The day is the one Llama's templates name where there is no clock.
_TODAY = datetime.date(2024, 7, 26)
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def check_messages(value: Any, where: str) -> Messages:
  """A chat reduced to role and content; UserError when it is none.

  Other keys of a message are not read. where is the place for messages.
  """
  if not isinstance(value, list) or not value:
    found = 'an empty list' if value == [] else type(value).__name__
    raise UserError(
      f'{where}: a chat is a list of {{"role": ..., "content": ...}} messages, '
      f'not {found}'
    )
  for i, message in enumerate(value):
    if not isinstance(message, dict):
      raise UserError(
        f'{where}: message {i} is {type(message).__name__}, not an object with '
        'role and content'
      )
    for key in ('role', 'content'):
      if key not in message:
        raise UserError(
          f'{where}: message {i} has no {key!r}, its keys are '
          f'{", ".join(message)}: rename them'
        )
      if not isinstance(message[key], str):
        raise UserError(
          f'{where}: {key} of message {i} is {type(message[key]).__name__}, '
          'not text'
        )
  bare = lambda text: text.lstrip('\ufeff')  # a byte order mark
  return [{key: bare(m[key]) for key in ('role', 'content')} for m in value]


def make_render(
  tokenizer: tokenizers.Tokenizer,
  template: str | None,
  bos: int | None,
  eos: int,
) -> Callable[[Messages, str], str]:
  """(messages, where) -> the chat as the template writes it.

  The template's special tokens are text here; the tokenizer reads them back.
  Raises UserError without a template, and the function for messages that the
  template refuses. Where a template writes the date, it is a fixed one.
  """
  if not template:
    raise UserError(
      'text.chat: the tokenizer of this model has no chat template: harvest a '
      'model trained on chats, or give plain text'
    )
  # Written into the template: transformers passes no functions to it.
  template = _CLOCK.sub(lambda m: repr(_TODAY.strftime(m[2])), template)
  if 'strftime_now(' in template:
    raise UserError(
      'the chat template asks for the date in a way we do not know, and '
      'tomorrow it would write another text: give the date in the template'
    )
  # Here: importing transformers takes seconds, and plain text needs none.
  from transformers import PreTrainedTokenizerFast

  names = {'eos_token': tokenizer.id_to_token(eos)}
  if bos is not None:
    names['bos_token'] = tokenizer.id_to_token(bos)
  writer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, chat_template=template, **names
  )

  def render(messages: Messages, where: str) -> str:
    try:
      text = writer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError as error:
      said = ' '.join(str(error).split())
      raise UserError(
        f'{where}: the chat template is not valid: {said}'
        if isinstance(error, jinja2.TemplateSyntaxError)
        else f'{where}: the chat template refuses it: {said}'
      ) from error
    return str(text)

  return render
