"""How much memory this process may have."""

import os
from pathlib import Path


def host_bytes(
  own: Path = Path('/proc/self/cgroup'), root: Path = Path('/sys/fs/cgroup')
) -> int:
  """The machine's memory, or less where a container or a Slurm job (`--mem`)
  has a limit: that of any control group that the process is in, of either
  version. own, root: where the kernel tells of them.
  """
  found = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if not own.exists():  # no Linux
    return found
  for line in own.read_text().splitlines():
    _, controllers, path = line.split(':', 2)
    if not controllers:
      top, name = root, 'memory.max'
    elif 'memory' in controllers.split(','):
      top, name = root / 'memory', 'memory.limit_in_bytes'
    else:
      continue
    group = top / path.lstrip('/')
    for folder in (group, *group.parents):
      if folder.is_relative_to(top) and (folder / name).exists():
        limit = (folder / name).read_text().strip()
        found = min(found, int(limit) if limit.isdecimal() else found)
  return found
