"""A disk that fills up in mid-shard: a real one, of a megabyte."""

import subprocess

import pytest
from test_tasks import contents, end, start
from tiny_harvest import write_text


@pytest.fixture
def small_disk(tmp_path):
  """A mounted file system of 1 MiB; only root can mount."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(folder)]
  done = subprocess.run(mount, capture_output=True, text=True)
  if done.returncode:
    pytest.skip(f'cannot mount a small disk: {done.stderr.strip()}')
  yield folder
  subprocess.run(['umount', str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_mid_shard(small_disk, tmp_path):
  text = tmp_path / 'text'
  text.mkdir()
  write_text(text)
  end(start(text, tmp_path / 'whole'))
  store, ballast = small_disk / 'store', small_disk / 'ballast'
  # Killed in the second shard; then somebody fills what the third would need.
  first = start(text, store, death='rename:30')
  first.communicate()
  assert first.returncode < 0
  ballast.write_bytes(b'0')
  free = int(
    subprocess.run(
      ['df', '--output=avail', '-B1', str(small_disk)],
      capture_output=True, text=True, check=True,
    ).stdout.split()[-1]
  )  # fmt: skip
  # What is missing still fits by its size, but not with what comes beside it.
  missing = 4 * (2 * 64 * 16 * 4 + 64 * 12)
  ballast.write_bytes(b'0' * max(free - missing - 4096, 1))
  failed = start(text, store)
  error = failed.communicate()[1]
  assert failed.returncode != 0
  last = error.strip().splitlines()[-1]
  assert 'No space left on device' in last and str(store) in last, error
  assert 'run the same harvest again' in last
  assert not list(store.rglob('*.tmp'))
  ballast.unlink()
  end(start(text, store))
  assert contents(store) == contents(tmp_path / 'whole')
