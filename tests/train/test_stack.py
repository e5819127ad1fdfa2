"""Parts of a job with members: its one step, its bits, its rounds of saves."""

import jax
import numpy as np
from test_sparse import _case
from test_step import _norm, _rows

from sae_jax.parallel.mesh import DATA, make_mesh, spec
from sae_jax.train import members, rounds, state


def _stacked(config, n):
  """n times the first state of a config."""
  s = jax.jit(lambda norm: state.init_state(config, norm))(_norm())
  stack = members.room(s, n)
  for i in range(n):
    stack = members.put(stack, s, np.int32(i))
  return s, stack


def test_the_densest_member_decides_how_many_candidates_there_is_room_for():
  """Room for four times the target: 8 of 64 where the first one decided."""
  configs = [
    _case('jumprelu', 'sparse', train_budget=0, loss_target_l0=target)
    for target in (2.0, 15.0)
  ]
  with jax.set_mesh(make_mesh(1, 1)):
    _, stack = _stacked(configs[0], 2)
    x = jax.device_put(_rows(), spec(DATA, None))
    _, metrics = members.make_step(configs)(stack, x)
  assert np.all(np.asarray(metrics['train/l0']) > 10)
  np.testing.assert_array_equal(metrics['train/dense'], 0)


def test_a_member_is_shared_to_the_bit():
  """The zeros of the other devices added to -0 would be 0."""
  with jax.set_mesh(make_mesh(1, 2, member=2)):
    s, stack = _stacked(_case('topk', 'sparse', (1, 2)), 2)
    negative = s.replace(sae=s.sae.replace(b_dec=-s.sae.b_dec))
    stack = members.put(stack, negative, np.int32(1))
    found = members.take(stack, np.int32(1))
  for a, b in zip(*map(jax.tree.leaves, (found, negative)), strict=True):
    np.testing.assert_array_equal(a, b)
  assert np.all(np.signbit(found.sae.b_dec))


class _Saves:
  """Checkpoints that only tell what is asked of them."""

  def __init__(self, said: list[str]):
    self._said = said

  def wait(self):
    self._said.append('wait')

  def latest(self):
    return 0

  def save(self, step, state, record):
    self._said.append('save')


def test_a_round_of_saves_is_over_before_the_next_begins():
  """A kill then leaves members one checkpoint apart."""
  said: list[str] = []
  every = [_Saves(said) for _ in range(3)]
  job = members.Job([], *[lambda states, i: None] * 6)
  rounds.save(every, 1, job, None, [{}] * 3)
  assert said == ['wait'] * 3 + ['save'] * 3
