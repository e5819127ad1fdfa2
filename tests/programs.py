"""Programs as modules, whose flags go when a test is done with them."""

import contextlib
import importlib.util
from pathlib import Path

from absl import flags

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def program(path):
  """The module at a path below the root; its flags are defined meanwhile."""
  spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
  module = importlib.util.module_from_spec(spec)
  before = set(flags.FLAGS)
  try:
    spec.loader.exec_module(module)
    yield module
  finally:
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
