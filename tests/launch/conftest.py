"""Launchers are tried on the small stores and models of the other tests."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ('train', 'lm')]
