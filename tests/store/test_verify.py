"""Every damaged file of a store is listed, and no sound one."""

import numpy as np
import pytest

from sae_jax.store.create import write_arrays
from sae_jax.store.verify import problems

pytestmark = pytest.mark.smoke


def test_damaged_files_are_listed(tmp_path):
  x = np.ones((150, 3), np.float32)
  write_arrays(tmp_path, {'a': x}, rows_per_shard=64, rows_per_block=16)
  assert list(problems(tmp_path)) == []
  flipped = tmp_path / 'sites/a/shard-00002-of-00003.bin'
  flipped.write_bytes(flipped.read_bytes()[:-1] + b'\7')
  cut = tmp_path / 'sequences/shard-00001-of-00003.bin'
  cut.write_bytes(cut.read_bytes()[:-1])
  (tmp_path / 'tokens/shard-00000-of-00003.bin').unlink()
  found = list(problems(tmp_path))
  assert len(found) == 3
  assert 'tokens/shard-00000' in found[0] and 'missing' in found[0]
  assert str(cut) in found[1] and '511 bytes, expected 512' in found[1]
  assert f'{flipped}: block 1' in found[2]
