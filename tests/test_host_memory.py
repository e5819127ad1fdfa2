"""The memory that a process may have, read from a tree of control groups."""

import os

import pytest

from sae_jax.memory import host_bytes

ALL = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
CASES = {
  'none': ('0::/\n', {}, ALL),
  'no limit': ('0::/a\n', {'a/memory.max': 'max', 'memory.max': 'max'}, ALL),
  'of a parent': (
    '0::/slurm/job_1/step_0\n',
    {'slurm/job_1/memory.max': '4096', 'slurm/job_1/step_0/memory.max': 'max'},
    4096,
  ),
  'first version': (
    '4:cpu,memory:/docker/x\n2:pids:/\n0::/\n',
    {'memory/docker/x/memory.limit_in_bytes': '8192', 'pids/memory.max': '1'},
    8192,
  ),
  'more than there is': ('0::/\n', {'memory.max': str(2 * ALL)}, ALL),
}


@pytest.mark.parametrize('case', CASES)
def test_the_least_limit_counts(tmp_path, case):
  groups, files, expected = CASES[case]
  (tmp_path / 'own').write_text(groups)
  for name, text in files.items():
    path = tmp_path / 'root' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + '\n')
  assert host_bytes(tmp_path / 'own', tmp_path / 'root') == expected


def test_here():
  assert 0 < host_bytes() <= ALL
