"""Memory is used again, and never while anything can still see it."""

import jax
import numpy as np
import pytest

from sae_jax.store import memory
from sae_jax.store.batches import BatchSource, train_batches
from sae_jax.store.create import write_arrays
from sae_jax.store.memory import Pool

pytestmark = pytest.mark.smoke
SHAPE, FLOAT = (64, 128), np.dtype(np.float32)


def address(array):
  return array.__array_interface__['data'][0]


def test_memory_comes_back_when_the_last_reference_goes(monkeypatch):
  pool, made = Pool(), []
  anonymous = memory.anonymous
  monkeypatch.setattr(
    memory, 'anonymous', lambda size: made.append(size) or anonymous(size)
  )
  array = pool.empty(SHAPE, FLOAT)
  assert array.shape == SHAPE and array.dtype == FLOAT
  first, part = address(array), array[3:5, ::2]
  del array
  other = pool.empty(SHAPE, FLOAT)
  assert address(other) != first
  del part
  assert address(pool.empty(SHAPE, FLOAT)) == first and len(made) == 2


@pytest.mark.parametrize(
  'hold',
  [
    lambda a: a[10:20],
    lambda a: a.T[5:].reshape(-1, 4, order='F'),
    lambda a: a.view(np.int32)[1:],
    memoryview,
    jax.device_put,
    jax.dlpack.from_dlpack,
    lambda a: jax.device_put(a)[1:],
  ],
)
def test_what_is_made_of_an_array_keeps_its_numbers(hold):
  pool = Pool()
  array = pool.empty(SHAPE, FLOAT)
  array[:] = np.arange(array.size).reshape(SHAPE)
  held = hold(array)
  before = np.array(held)
  del array
  later = []
  for _ in range(3):
    later.append(pool.empty(SHAPE, FLOAT))
    later[-1][:] = -1
  np.testing.assert_array_equal(np.asarray(held), before)


def test_another_size_gets_other_memory():
  pool = Pool()
  first = address(pool.empty(SHAPE, FLOAT))
  array = pool.empty((200, 128), FLOAT)
  array[:] = 1
  assert array.sum() == 200 * 128 and first
  assert pool.empty((0, 4), FLOAT).shape == (0, 4)


def test_batches_that_are_held_stay_as_they_were(tmp_path):
  x = np.arange(1024 * 8, dtype=np.float32).reshape(1024, 8)
  write_arrays(tmp_path, {'a': x}, rows_per_shard=128, rows_per_block=16)
  source = BatchSource(tmp_path, 'a', 32, seed=1, window=2)
  batches = train_batches(source)
  held = [next(batches)[i % 16 :: 2] for i in range(60)]
  on_device = [jax.device_put(next(batches)) for _ in range(60)]
  batches.close()
  fresh = BatchSource(tmp_path, 'a', 32, seed=1, window=2)
  for i, (rows, array) in enumerate(zip(held, on_device, strict=True)):
    np.testing.assert_array_equal(rows, fresh[i].copy()[i % 16 :: 2])
    np.testing.assert_array_equal(np.asarray(array), fresh[60 + i])
