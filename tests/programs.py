"""Programs as modules, whose flags go when a test is done with them."""

import contextlib
import importlib.util
import sys
from pathlib import Path

from absl import flags

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def program(path):
  """The module at a path below the root; its flags are defined meanwhile."""
  spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
  module = importlib.util.module_from_spec(spec)
  before = set(flags.FLAGS)
  sys.modules[spec.name] = module  # so that absl knows whose flags they are
  try:
    spec.loader.exec_module(module)
    yield module
  finally:
    del sys.modules[spec.name]
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
