"""A chart of a study as numbers, and drawn: SVG, PNG and rows of a table.

One figure makes both pictures: its colours are the page's light ones, which in
the SVG are replaced by the page's CSS variables.
"""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import (
  EngFormatter,
  FixedLocator,
  FuncFormatter,
  LogLocator,
  MaxNLocator,
  NullFormatter,
  NullLocator,
)

from sae_jax.evaluate import plots

# A part of viridis for each theme, as its ends would vanish in the paper: even
# steps of lightness, and the same order in both.
_STEPS = 16
_VIRIDIS = mpl.colormaps['viridis']
RAMP = [to_hex(_VIRIDIS(v)) for v in np.linspace(0, 0.6, _STEPS)]
RAMP_DARK = [to_hex(_VIRIDIS(v)) for v in np.linspace(0.37, 1, _STEPS)]
_CARD = '#ffffff'
_VARIABLES = plots.VARIABLES | {
  _CARD: '--card', **{color: f'--ramp-{i}' for i, color in enumerate(RAMP)}
}  # fmt: skip
_MARKERS = 'os^Dvp<>'
_LABELS = {
  'latents': 'latents N (width)',
  'rows': 'training rows (tokens)',
  'flops': 'training FLOPs C',
  'seconds': 'seconds of training',
  'fvu': 'FVU, held-out rows',
  'mse': 'MSE, held-out rows',
  'target': 'target loss',
  'l0': 'active latents per token (L0)',
  'delta_loss': 'delta loss (nats)',
  'lr': 'learning rate',
  'dead_share': 'dead latents',
}


class Series(NamedTuple):
  """Points or a line of one kind; low and high are a band or error bars."""

  label: str  # in the legend; the same label is shown once
  x: Sequence[float]
  y: Sequence[float]
  color: str
  form: str = 'line'  # a key of _FORMS
  marker: str = 'o'
  low: Sequence[float] = ()
  high: Sequence[float] = ()
  points: Sequence[str | None] = ()  # ids, where each is a point


_FORMS: dict[str, dict[str, Any]] = {
  'line': {'ls': '-', 'lw': 1.6, 'marker': ''},
  'thin': {'ls': '-', 'lw': 1.1, 'alpha': 0.9, 'marker': ''},
  'dashed': {'ls': '--', 'lw': 1.1, 'marker': ''},
  'dotted': {'ls': ':', 'lw': 1.6, 'marker': ''},
  'joined': {'ls': '-', 'lw': 1.2, 'ms': 4.5},
  'small': {'ls': '', 'ms': 3},
  'points': {'ls': '', 'ms': 5},
  'faint': {'ls': '', 'ms': 3.5, 'alpha': 0.4},
  'hollow': {'ls': '', 'ms': 6.5, 'mfc': 'none', 'mew': 1.4},
}


class Chart(NamedTuple):
  name: str  # of its files, and what its ids begin with
  title: str
  caption: str  # what there is to see
  x: str  # a key of _LABELS
  y: str
  series: Sequence[Series]
  log_y: bool = True
  log_x: bool = True
  ticks: Sequence[float] = ()  # of x, where every value matters
  spans: tuple[tuple[float, float], tuple[float, float]] | None = None  # x, y


class Row(NamedTuple):
  """A number that a chart draws; a row of figures/NAME.csv."""

  series: str
  form: str
  point: str | None
  x: float
  y: float
  low: float | None
  high: float | None


class Look(NamedTuple):
  color: str
  marker: str


def ramp(i: int, n: int) -> Look:
  """Colour and marker of the i-th of n ordered values, for a Series."""
  step = round(i * (_STEPS - 1) / (n - 1)) if n > 1 else _STEPS // 2
  return Look(RAMP[step], _MARKERS[i % len(_MARKERS)])


def rows(chart: Chart) -> list[Row]:
  """The numbers of a chart."""
  found = []
  for s in chart.series:
    for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)):
      edges = (s.low[i], s.high[i]) if len(s.low) else (None, None)
      point = s.points[i] if len(s.points) else None
      found.append(Row(s.label, s.form, point, float(x), float(y), *edges))
  return found


def pictures(chart: Chart) -> tuple[str, bytes]:
  """The chart as inline SVG and as a PNG on white."""
  with mpl.rc_context(plots.STYLE | {'svg.hashsalt': chart.name}):
    figure = _figure(chart)
    alt = f'{chart.title}. {chart.caption}'
    svg = plots.svg(figure, chart.name, alt, _VARIABLES)
    png = io.BytesIO()
    figure.savefig(png, format='png', dpi=160, facecolor=_CARD)
  return svg, png.getvalue()


def _figure(chart: Chart) -> Figure:
  labels = {s.label for s in chart.series if s.label}
  lines = math.ceil(len(labels) / 3)
  figure = Figure(figsize=(4.6, 2.9 + 0.2 * lines), layout='constrained')
  axes = figure.subplots()
  shown = {}
  for s in chart.series:
    handle = _draw(axes, s)
    if s.label:
      shown.setdefault(s.label, handle)
  if chart.spans:
    axes.set_xlim(*chart.spans[0])
    axes.set_ylim(*chart.spans[1])
  axes.set_xlabel(_LABELS[chart.x])
  axes.set_ylabel(_LABELS[chart.y])
  _scale(axes.xaxis, chart.log_x, chart.ticks)
  _scale(axes.yaxis, chart.log_y)
  for axis, key in ((axes.xaxis, chart.x), (axes.yaxis, chart.y)):
    if key == 'rows':
      axis.set_major_formatter(EngFormatter(sep=''))
  if chart.y == 'dead_share':
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{100 * v:g}%'))
  figure.legend(
    shown.values(), shown.keys(), loc='outside lower center', ncols=3,
    fontsize=9, handlelength=1.6, columnspacing=1.2, borderpad=0.1,
  )  # fmt: skip
  return figure


def _draw(axes: Any, s: Series) -> Any:
  """Draws a series; what stands for it in the legend."""
  style = {'marker': s.marker} | _FORMS[s.form]
  (line,) = axes.plot(s.x, s.y, color=s.color, **style)
  if len(s.low) and style['ls']:
    axes.fill_between(
      s.x, s.low, s.high, color=s.color, alpha=0.16, linewidth=0
    )
  elif len(s.low):
    axes.vlines(s.x, s.low, s.high, color=s.color, lw=1.2)
  return line


def _scale(axis: Any, log: bool, ticks: Sequence[float] = ()) -> None:
  """Scale and tick labels in plain numbers; call after all is drawn."""
  getattr(axis.axes, f'set_{axis.axis_name}scale')('log' if log else 'linear')
  low, high = sorted(axis.get_view_interval())
  if ticks:
    axis.set_major_locator(FixedLocator(_apart(ticks, math.log(high / low))))
  elif not log or high < 4 * low:
    axis.set_major_locator(MaxNLocator(5 if axis.axis_name == 'y' else 4))
  elif high > 200 * low:
    axis.set_major_locator(LogLocator(numticks=7))
  else:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
  axis.set_minor_locator(NullLocator())
  axis.set_minor_formatter(NullFormatter())
  axis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))


def _apart(ticks: Sequence[float], span: float) -> list[float]:
  """Those whose labels do not meet on an axis of this span of the log."""
  first, *rest = sorted(ticks)
  share = 0.2 if max(ticks) >= 1e5 else 0.13  # of the axis, for a label
  kept = [first]
  for tick in rest:
    if math.log(tick / kept[-1]) >= share * span:
      kept.append(tick)
  return kept


def number(value: float | None, digits: int = 3) -> str:
  """A number for people: 0.123, 1,024, 3.2 × 10¹⁵; '' for None."""
  if value is None:
    return ''
  if not math.isfinite(value):
    return 'not finite'
  if value == 0 or 2e-3 <= abs(value) < 999.5:
    return f'{value:.{digits}g}'
  if 999.5 <= abs(value) < 1e8:
    return f'{value:,.0f}'
  mantissa, exponent = f'{value:.{digits - 1}e}'.split('e')
  mantissa = mantissa.rstrip('0').rstrip('.')
  power = '10' + str(int(exponent)).translate(_RAISED)
  return power if mantissa == '1' else f'{mantissa}\u00a0×\u00a0{power}'


_RAISED = str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹')
