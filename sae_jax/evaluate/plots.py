"""Plots as inline SVG whose colours are the page's CSS variables.

They follow the page's light or dark theme and its font, carry a text
alternative, and hold no address that a browser could ask for.
"""

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import (
  EngFormatter,
  FuncFormatter,
  LogLocator,
  MaxNLocator,
  NullFormatter,
)

# Placeholder colours, replaced by CSS variables in the finished SVG.
_INK, _MUTED, _GRID, _MAIN, _SECOND = (
  '#010203', '#010204', '#010205', '#010206', '#010207',
)  # fmt: skip
_VARIABLES = {
  _INK: '--ink', _MUTED: '--muted', _GRID: '--line', _MAIN: '--plot',
  _SECOND: '--plot-2',
}  # fmt: skip
_STYLE: Any = {  # matplotlib's type for this names every key
  'svg.fonttype': 'none',  # text stays text: selectable, in the page's font
  'font.size': 10,
  'text.color': _INK,
  'axes.edgecolor': _GRID,
  'axes.labelcolor': _MUTED,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': _GRID,
  'grid.linewidth': 0.6,
  'xtick.color': _GRID,
  'ytick.color': _GRID,
  'xtick.labelcolor': _MUTED,
  'ytick.labelcolor': _MUTED,
  'legend.frameon': False,
  'figure.facecolor': 'none',
  'axes.facecolor': 'none',
}


class Line(NamedTuple):
  """A curve: x and y of equal length; nan is a gap."""

  label: str
  x: Sequence[float]
  y: Sequence[float]


def curves(
  name: str, lines: Sequence[Line], *, alt: str, percent: bool = False
) -> str:
  """SVG of up to two curves over rows seen in training."""
  with mpl.rc_context(_STYLE | {'svg.hashsalt': name}):
    figure = Figure(figsize=(4.4, 2.7), layout='constrained')
    axes = figure.subplots()
    for line, color, style in zip(
      lines, (_MAIN, _SECOND), ('-', '--'), strict=False
    ):
      axes.plot(
        line.x, line.y, style, color=color, lw=1.6, label=line.label,
        marker='o' if len(line.x) < 3 else None, markersize=3, clip_on=False,
      )  # fmt: skip
    axes.set_xlabel('training rows (tokens)')
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if _spans_decades(lines):
      axes.set_yscale('log')
      axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:g}'))
      axes.yaxis.set_minor_formatter(NullFormatter())
    else:
      axes.set_ylim(bottom=0)
    if percent:
      axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f'{100 * y:g}%')
      )
    if len(lines) > 1:
      axes.legend()
    return _svg(figure, name, alt)


def _spans_decades(lines: Sequence[Line]) -> bool:
  """Whether a logarithmic axis shows more: positive, and wide enough."""
  values = [y for line in lines for y in line.y]
  return min(values) > 0 and max(values) > 3 * min(values)


def frequency_histogram(
  counts: np.ndarray, edges: np.ndarray, *, alt: str
) -> str:
  """SVG of latents by log10 firing frequency; counts [n], edges [n + 1].

  Begins at the decade of the rarest; at least one count is not zero.
  """
  with mpl.rc_context(_STYLE | {'svg.hashsalt': 'frequency'}):
    figure = Figure(figsize=(4.9, 2.8), layout='constrained')
    axes = figure.subplots()
    width = np.diff(edges)
    axes.bar(edges[:-1] + width / 2, counts, width * 0.9, color=_MAIN)
    axes.grid(axis='x', visible=False)
    axes.set_ylabel('latents')
    axes.set_xlabel('fires on this share of the tokens')
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    rarest = edges[np.flatnonzero(counts)[0]]
    ticks = np.arange(math.floor(rarest), 1)
    axes.set_xticks(ticks, [_share(10.0**t) for t in ticks])
    axes.set_xlim(ticks[0], 0)
    return _svg(figure, 'frequency', alt)


def _share(value: float) -> str:
  """0.001 -> '0.1%'."""
  return f'{100 * value:.10f}'.rstrip('0').rstrip('.') + '%'


def _svg(figure: Figure, name: str, alt: str) -> str:
  """The figure as an <svg> element to stand inside an HTML page."""
  out = io.StringIO()
  figure.savefig(out, format='svg', metadata={'Date': None})
  svg = out.getvalue()
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  svg = re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>',
               lambda m: f'<svg viewBox="{m[1]}" role="img" '
               f'aria-label="{escape(alt)}">', svg, count=1)  # fmt: skip
  # One page holds several figures: their ids must not meet.
  svg = re.sub(r'\bid="', f'id="{name}-', svg)
  svg = re.sub(r'(url\(|href=")#', rf'\1#{name}-', svg).replace('xlink:', '')
  # The page's font, and no style sheet that would reach beyond the figure.
  svg = re.sub(r'font-family: [^;"]*;? ?', '', svg)
  svg = re.sub(r'<style.*?</style>', '', svg, flags=re.DOTALL)
  for color, variable in _VARIABLES.items():
    svg = svg.replace(color, f'var({variable})')
  return svg
