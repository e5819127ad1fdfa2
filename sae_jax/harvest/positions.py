"""Which tokens of a sequence get a row: filters, and their description.

A filter is a pure function of token ids [n, T] int32 to bool [n, T], True
where a token gets a row. It may look at a whole sequence, not at others: the
sequences of a harvest come in pieces of any size.
"""

from collections.abc import Callable, Set
from typing import Any

import numpy as np

from sae_jax.config import Config
from sae_jax.errors import UserError

Filter = Callable[[np.ndarray], np.ndarray]


def first(n: int) -> Filter:
  """No row for the first n positions of a sequence."""

  def after_first(tokens: np.ndarray) -> np.ndarray:
    keep = np.ones(tokens.shape, bool)
    keep[:, :n] = False
    return keep

  return after_first


def without(ids: Set[int]) -> Filter:
  """No row for these token ids."""
  unwanted = np.fromiter(ids, np.int32)
  return lambda tokens: ~np.isin(tokens, unwanted)


def all_of(*filters: Filter) -> Filter:
  """A row where every one of the filters gives one."""

  def every(tokens: np.ndarray) -> np.ndarray:
    keep = np.ones(tokens.shape, bool)
    for filter_ in filters:
      keep &= apply(filter_, tokens)
    return keep

  return every


def apply(filter_: Filter, tokens: np.ndarray) -> np.ndarray:
  """The filter's answer [n, T] bool; UserError when it is no such array."""
  keep = filter_(tokens)
  dtype, shape = getattr(keep, 'dtype', None), getattr(keep, 'shape', None)
  if dtype != np.dtype(bool) or shape != tokens.shape:
    raise UserError(
      f'keep: the filter {_name(filter_)} gave {type(keep).__name__} of '
      f'{dtype} {shape} for tokens {tokens.shape}; it must give bool of the '
      'same shape'
    )
  return np.asarray(keep)


def choose(
  harvest: Config,
  *,
  bos: int | None,
  eos: int,
  special: Set[int],
  vocab: int,
  extra: Filter | None = None,
) -> tuple[Filter, dict[str, Any]]:
  """The filter that a config's `harvest` block asks for, and its description.

  Args:
    harvest: skip_first, skip_special, skip_tokens and sequence_length.
    bos, eos: of the tokenizer; without a BOS (None) sequences begin with EOS.
    special: ids of the control tokens; vocab: number of ids.
    extra: a filter of the user's own, on top of the config's.

  Returns the filter, and what the manifest's `policy` says of it: JSON; the
  name of `extra` stands under 'filter'.

  Raises UserError for values that leave no row, ids outside the vocabulary
  and an `extra` that has no name of its own.
  """
  if not 0 <= harvest.skip_first < harvest.sequence_length:
    raise UserError(
      f'harvest.skip_first: {harvest.skip_first}; use 0 to '
      f'{harvest.sequence_length - 1}, below harvest.sequence_length'
    )
  ids = set(harvest.skip_tokens)
  if unknown := sorted(i for i in ids if not 0 <= i < vocab):
    raise UserError(
      f'harvest.skip_tokens: {unknown[0]} is no token id of this model, whose '
      f'ids are 0 to {vocab - 1:,}'
    )
  if harvest.skip_special:
    ids |= special | {eos} | ({bos} if bos is not None else set())
  policy = {
    'first_token': eos if bos is None else bos,
    'token_after_document': eos,
    'padding_token': None,  # an incomplete last sequence is dropped
    'positions_without_rows': list(range(harvest.skip_first)),
    'tokens_without_rows': sorted(int(i) for i in ids),
  }
  filters = [first(harvest.skip_first), without(ids)]
  if extra is not None:
    filters.append(extra)
    policy['filter'] = _name(extra)
    if policy['filter'].endswith('>'):  # <lambda>, or no function
      raise UserError(
        f'keep: {policy["filter"]} has no name to record in the store: write '
        'the filter as a function with a def'
      )
  return all_of(*filters), policy


def _name(filter_: Filter) -> str:
  if not hasattr(filter_, '__qualname__'):
    return f'<{type(filter_).__name__}>'
  return f'{filter_.__module__}.{filter_.__qualname__}'
