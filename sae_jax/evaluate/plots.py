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

# The pages' light colours: replaced by their CSS variables in the finished
# SVG, and those of the same figure as a bitmap.
INK, MUTED, GRID, MAIN, SECOND = (
  '#1d2026', '#5a606b', '#dedcd6', '#c2560c', '#2d5f9a',
)  # fmt: skip
VARIABLES = {
  INK: '--ink', MUTED: '--muted', GRID: '--line', MAIN: '--plot',
  SECOND: '--plot-2',
}  # fmt: skip
STYLE: Any = {  # matplotlib's type for this names every key
  'svg.fonttype': 'none',  # text stays text: selectable, in the page's font
  'font.size': 10,
  'text.color': INK,
  'axes.edgecolor': GRID,
  'axes.labelcolor': MUTED,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': GRID,
  'grid.linewidth': 0.6,
  'xtick.color': GRID,
  'ytick.color': GRID,
  'xtick.labelcolor': MUTED,
  'ytick.labelcolor': MUTED,
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
  with mpl.rc_context(STYLE | {'svg.hashsalt': name}):
    figure = Figure(figsize=(4.4, 2.7), layout='constrained')
    axes = figure.subplots()
    for line, color, style in zip(
      lines, (MAIN, SECOND), ('-', '--'), strict=False
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
    return svg(figure, name, alt)


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
  with mpl.rc_context(STYLE | {'svg.hashsalt': 'frequency'}):
    figure = Figure(figsize=(4.9, 2.8), layout='constrained')
    axes = figure.subplots()
    width = np.diff(edges)
    axes.bar(edges[:-1] + width / 2, counts, width * 0.9, color=MAIN)
    axes.grid(axis='x', visible=False)
    axes.set_ylabel('latents')
    axes.set_xlabel('fires on this share of the tokens')
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    rarest = edges[np.flatnonzero(counts)[0]]
    ticks = np.arange(math.floor(rarest), 1)
    axes.set_xticks(ticks, [_share(10.0**t) for t in ticks])
    axes.set_xlim(ticks[0], 0)
    return svg(figure, 'frequency', alt)


def _share(value: float) -> str:
  """0.001 -> '0.1%'."""
  return f'{100 * value:.10f}'.rstrip('0').rstrip('.') + '%'


def svg(
  figure: Figure, name: str, alt: str, variables: dict[str, str] = VARIABLES
) -> str:
  """The figure as an <svg> element to stand inside an HTML page.

  `name` begins its ids; `variables` are CSS variables by the colour (#rrggbb)
  that each replaces.
  """
  out = io.StringIO()
  figure.savefig(out, format='svg', metadata={'Date': None})
  text = out.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  text = re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>',
               lambda m: f'<svg viewBox="{m[1]}" role="img" '
               f'aria-label="{escape(alt)}">', text, count=1)  # fmt: skip
  # One page holds several figures: their ids must not meet.
  text = re.sub(r'\bid="', f'id="{name}-', text)
  text = re.sub(r'(url\(|href=")#', rf'\1#{name}-', text).replace('xlink:', '')
  # The page's font, and no style sheet that would reach beyond the figure.
  text = re.sub(r'font-family: [^;"]*;? ?', '', text)
  text = re.sub(r'<style.*?</style>', '', text, flags=re.DOTALL)
  for color, variable in variables.items():
    text = text.replace(color, f'var({variable})')
  return text
