"""The figures of an evaluation: names, units, what each of them means.

One list feeds evaluation.json, the table on the terminal and the report.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from sae_jax.evaluate.reconstruction import Reconstruction
from sae_jax.evaluate.splice import Splice


class Figure(NamedTuple):
  """How one number is called, written and explained to a newcomer."""

  name: str  # key in evaluation.json; name + '_se' is its standard error
  label: str
  unit: str
  form: str
  meaning: str


FIGURES = (
  Figure(
    'fvu', 'Fraction of variance unexplained', 'share', '.4f',
    'Share of the variation between activations that the reconstruction '
    'misses. 0 is perfect; 1 is no better than always answering the mean.',
  ),
  Figure(
    'l0', 'Active latents per token (L0)', 'latents', '.1f',
    'How many features the dictionary uses at a token, on average. Fewer '
    'means a sparser, simpler description.',
  ),
  Figure(
    'dead_share', 'Dead latents', 'share', '.2%',
    'Features that fired at none of the held-out tokens: unused, or rarer '
    'than this sample can show.',
  ),
  Figure(
    'delta_loss', 'Delta loss', 'nats per token', '.4f',
    'What it costs the language model to run on the reconstruction instead '
    'of its own activation. 0 is lossless; the figure to compare first.',
  ),
  Figure(
    'loss_recovered', 'Loss recovered', 'share', '.2%',
    'Where that lies between activations set to zero (0%) and left alone '
    '(100%). Flattering wherever zeros destroy the model.',
  ),
  Figure(
    'ce_clean', 'Cross-entropy, model untouched', 'nats per token', '.4f',
    'How surprised the model is by the next token. e to this power is its '
    'perplexity.',
  ),
  Figure(
    'ce_splice', 'Cross-entropy, reconstruction', 'nats per token', '.4f',
    'The same with the reconstruction in place of the activation.',
  ),
  Figure(
    'ce_zero', 'Cross-entropy, zeros', 'nats per token', '.4f',
    'The same with zeros in place of the activation.',
  ),
  Figure(
    'mse', 'Mean squared error', 'squared activation units per token', '.4g',
    'Squared length of the error vector, averaged over tokens, in the '
    "model's own units.",
  ),
  Figure(
    'variance', 'Variance', 'squared activation units per token', '.4g',
    'Squared distance of an activation from the mean activation, averaged '
    'over tokens: what there is to explain. The mean squared error over this '
    'is the fraction of variance unexplained.',
  ),
  Figure(
    'cosine', 'Cosine similarity', '', '.4f',
    'Cosine of the angle between activation and reconstruction. 1 is the '
    'same direction; a large common mean makes it look better than it is.',
  ),
  Figure(
    'relative_reconstruction_bias', 'Relative reconstruction bias', '', '.4f',
    'Size of the reconstruction where it points the right way. Below 1 the '
    'features are systematically too weak (shrinkage).',
  ),
)  # fmt: skip


class TableRow(NamedTuple):
  """A figure ready to be shown."""

  label: str
  value: str
  unit: str
  meaning: str


def collect(r: Reconstruction, s: Splice | None) -> dict[str, float | None]:
  """{name: value} of the figures there are; None where undefined."""
  values: dict[str, float | None] = {
    'fvu': r.fvu,
    'l0': r.l0,
    'dead_share': r.dead_share,
    'mse': r.mse,
    'variance': r.variance,
    'cosine': r.cosine,
    'relative_reconstruction_bias': r.bias,
  }
  if s is not None:
    values |= {
      'delta_loss': s.delta_loss,
      'delta_loss_se': s.delta_loss_se,
      'loss_recovered': s.loss_recovered,
      'loss_recovered_se': s.loss_recovered_se,
      'ce_clean': s.ce_clean,
      'ce_splice': s.ce_splice,
      'ce_zero': s.ce_zero,
    }
  finite = lambda v: v is not None and math.isfinite(v)
  return {name: v if finite(v) else None for name, v in values.items()}


def units(values: Mapping[str, float | None]) -> dict[str, str]:
  """{name: unit} for the names in `values`; no unit is ''."""
  known = {f.name: f.unit for f in FIGURES}
  return {name: known[name.removesuffix('_se')] for name in values}


def table(values: Mapping[str, float | None]) -> list[TableRow]:
  """The figures there are, in order, with their standard errors."""
  rows = []
  for f in FIGURES:
    if f.name in values:
      text, se = _form(values[f.name], f.form), values.get(f'{f.name}_se')
      text += '' if se is None else f' ± {_form(se, f.form)}'
      unit = '' if f.form.endswith('%') else f.unit
      rows.append(TableRow(f.label, text, unit, f.meaning))
  return rows


def text_table(values: Mapping[str, float | None]) -> str:
  """The table for a terminal: label, value, unit, in columns."""
  rows = table(values)
  wide = max(len(r.label) for r in rows)
  right = max(len(r.value) for r in rows)
  return '\n'.join(
    f'{r.label:<{wide}}  {r.value:>{right}}  {r.unit}'.rstrip() for r in rows
  )


def _form(value: float | None, form: str) -> str:
  return 'undefined' if value is None else format(value, form)
