"""Large memory that is used again and again.

The first touch of fresh pages costs several times what a read from the page
cache does; huge pages and recycling spare most of it.
"""

import collections
import contextlib
import mmap
import weakref

import numpy as np

# Spare pieces that a pool keeps; what is in use at a time is up to its user.
SPARE = 8


def anonymous(size: int) -> mmap.mmap:
  """Zeroed memory of `size` bytes, in huge pages where the system has them."""
  memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  if hasattr(mmap, 'MADV_HUGEPAGE'):  # Linux
    with contextlib.suppress(OSError):  # a kernel without them
      memory.madvise(mmap.MADV_HUGEPAGE)
  return memory


class Pool:
  """Arrays whose memory comes back when nothing refers to them any more."""

  def __init__(self):
    self._spare: collections.deque[mmap.mmap] = collections.deque(maxlen=SPARE)

  def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As np.empty. Always of one size, or memory of another size is dropped.

    Views of the array, memoryviews and JAX arrays that share its memory keep
    `whole` alive: numpy makes the base of a view the last array before memory
    that is not numpy's.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    try:
      memory = self._spare.pop()
    except IndexError:
      memory = anonymous(size)
    if len(memory) != max(size, 1):
      memory = anonymous(size)
    whole = np.frombuffer(memory, np.uint8, size)
    weakref.finalize(whole, self._spare.append, memory).atexit = False
    return whole.view(dtype).reshape(shape)
