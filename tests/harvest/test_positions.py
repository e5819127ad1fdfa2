"""Filters of positions: which tokens get a row, and what the store says."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from sae_jax.errors import UserError
from sae_jax.harvest.positions import all_of, apply, choose, first, without

TOKENS = np.array([[0, 5, 1, 6, 7], [0, 1, 7, 7, 9]], np.int32)


def block(**values):
  defaults = {
    'skip_first': 1, 'skip_special': True, 'skip_tokens': (),
    'sequence_length': 5,
  }  # fmt: skip
  return ConfigDict(defaults | values)


def chosen(bos=0, extra=None, **values):
  return choose(
    block(**values), bos=bos, eos=1, special=frozenset([0, 1, 2]), vocab=10,
    extra=extra,
  )  # fmt: skip


def sevens(tokens):
  return tokens == 7


def test_first_without_and_both():
  np.testing.assert_array_equal(first(2)(TOKENS), [[0, 0, 1, 1, 1]] * 2)
  assert first(0)(TOKENS).all() and all_of()(TOKENS).all()
  keep = without({1, 7})(TOKENS)
  np.testing.assert_array_equal(keep, [[1, 1, 0, 1, 0], [1, 0, 0, 0, 1]])
  assert without(set())(TOKENS).all()
  both = all_of(first(2), without({1, 7}))(TOKENS)
  np.testing.assert_array_equal(both, [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]])


def test_the_configs_filter_and_its_description():
  keep, policy = chosen()
  np.testing.assert_array_equal(
    keep(TOKENS), [[0, 1, 0, 1, 1], [0, 0, 1, 1, 1]]
  )
  assert policy == {
    'first_token': 0,
    'token_after_document': 1,
    'padding_token': None,
    'positions_without_rows': [0],
    'tokens_without_rows': [0, 1, 2],
  }
  keep, policy = chosen(skip_first=3, skip_tokens=(9, 4), skip_special=False)
  np.testing.assert_array_equal(
    keep(TOKENS), [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]
  )
  assert policy['positions_without_rows'] == [0, 1, 2]
  assert policy['tokens_without_rows'] == [4, 9]
  assert json.loads(json.dumps(policy)) == policy


def test_everything_may_get_a_row():
  keep, policy = chosen(skip_first=0, skip_special=False)
  assert keep(TOKENS).all()
  assert policy['positions_without_rows'] == []
  assert policy['tokens_without_rows'] == []


def test_without_a_bos_the_eos_comes_first_and_is_special():
  keep, policy = choose(block(), bos=None, eos=4, special=frozenset(), vocab=10)
  assert policy['first_token'] == policy['token_after_document'] == 4
  assert policy['tokens_without_rows'] == [4]
  assert keep(TOKENS)[:, 1:].all()


def test_a_filter_of_ones_own_is_recorded_by_name():
  keep, policy = chosen(extra=sevens)
  np.testing.assert_array_equal(
    keep(TOKENS), [[0, 0, 0, 0, 1], [0, 0, 1, 1, 0]]
  )
  assert policy['filter'] == f'{__name__}.sevens'
  for nameless in (lambda tokens: tokens > 0, np.vectorize(abs)):
    with pytest.raises(UserError, match='has no name to record'):
      chosen(extra=nameless)


@pytest.mark.parametrize(
  'answer', [TOKENS, TOKENS[:1] == 7, (TOKENS == 7).tolist(), None]
)
def test_what_a_filter_must_give(answer):
  with pytest.raises(UserError, match='must give bool of the same shape'):
    apply(lambda tokens: answer, TOKENS)


@pytest.mark.parametrize(
  'values, message',
  [
    ({'skip_first': 5}, 'skip_first: 5; use 0 to 4'),
    ({'skip_first': -1}, 'skip_first: -1; use 0 to 4'),
    ({'skip_tokens': (3, 10)}, 'skip_tokens: 10 is no token id .* 0 to 9'),
  ],
)
def test_values_that_cannot_work(values, message):
  with pytest.raises(UserError, match=message):
    chosen(**values)
