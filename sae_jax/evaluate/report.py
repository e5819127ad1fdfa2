"""What an evaluation leaves behind: evaluation.json and report.html.

The page is one file that asks the network for nothing. Everything that comes
from texts or configs is escaped by the template engine.
"""

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from tokenizers import Tokenizer

from sae_jax.evaluate import figures, plots
from sae_jax.evaluate.contexts import AFTER, Context, LatentContexts
from sae_jax.paths import write_atomic
from sae_jax.train.writer import read_metrics

TEMPLATE = 'report.html.jinja'
_KINDS = {
  'resid_pre': 'residual stream before',
  'resid_post': 'residual stream after',
  'attn_z': 'attention heads, before their output matrix, of',
  'attn_out': 'attention output of',
  'mlp_in': 'MLP input of',
  'mlp_out': 'MLP output of',
}
_ACTIVATIONS = {
  'topk': 'TopK', 'batchtopk': 'BatchTopK', 'jumprelu': 'JumpReLU',
}  # fmt: skip


class Chart(NamedTuple):
  """A training curve: keys of metrics.jsonl, and how to draw and read them."""

  name: str
  title: str
  keys: dict[str, str]
  form: str  # of the last training value
  meaning: str
  percent: bool = False


_CHARTS = (
  Chart(
    'loss', 'Training loss', {'train/loss': 'training'}, '.3g',
    'Squared error plus penalties, in normalised units; {last} at the end.',
  ),
  Chart(
    'l0', 'Active latents per token (L0)',
    {'train/l0': 'training', 'eval/l0': 'held-out'}, '.3g',
    'Features used at a token; {last} at the end.',
  ),
  Chart(
    'fvu', 'Fraction of variance unexplained',
    {'train/fvu': 'training', 'eval/fvu': 'held-out'}, '.3g',
    'Share of the variation that is missed; {last} at the end.',
  ),
  Chart(
    'dead', 'Dead latents', {'train/dead': 'training'}, '.2%',
    'Share of features that have long not fired in training; {last} at the '
    'end.', percent=True,
  ),
)  # fmt: skip


class Span(NamedTuple):
  """A token of a context as the page shows it.

  Tokens that are parts of one character are shown as one.
  """

  text: str
  title: str
  shade: float  # 0 to 1: activation over the latent's highest
  peak: bool
  known: bool  # False: no row of this token is stored


def write(
  run_dir: str | Path,
  result: dict[str, Any],
  features: Sequence[LatentContexts],
  tokenizer: Tokenizer | None,
  out: Path,
) -> Path:
  """Writes evaluation.json and report.html of a run into `out`; their paths.

  `result` is what `job.evaluate` documents. Without a tokenizer the contexts
  show token ids. Raises UserError when metrics.jsonl is damaged.
  """
  metrics = read_metrics(run_dir)
  page = render(result, metrics, features, tokenizer)
  write_atomic(
    out / 'evaluation.json',
    json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + '\n',
  )
  path = out / 'report.html'
  write_atomic(path, page)
  return path


def render(
  result: dict[str, Any],
  metrics: Sequence[dict[str, Any]],
  features: Sequence[LatentContexts],
  tokenizer: Tokenizer | None,
) -> str:
  """The page as text."""
  environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template(TEMPLATE).render(
    r=result,
    site=site_in_words(result['site']),
    tiles=_tiles(result),
    facts=_facts(result),
    rows=figures.table(result['figures']),
    charts=_charts(metrics),
    histogram=_histogram(result['firing_frequency']),
    features=[_feature(f, result['rows'], tokenizer) for f in features],
    most=max((len(f.contexts) for f in features), default=0),
  )


def site_in_words(site: str) -> str:
  """'layer_9.resid_post' -> 'residual stream after layer 9'."""
  match = re.fullmatch(r'layer_(\d+)\.(\w+)', site)
  if not match or match[2] not in _KINDS:
    return site
  return f'{_KINDS[match[2]]} layer {match[1]}'


def _tiles(result: dict[str, Any]) -> list[dict[str, str]]:
  """The three or four numbers that the page opens with."""
  values, latents = result['figures'], result['dictionary']['latents']
  unexplained = values['fvu']
  explained = None if unexplained is None else 1 - unexplained
  tiles = [
    (_percent(explained), 'of the variance explained'),
    (f'{values["l0"]:.0f}', f'of {latents:,} features active per token'),
    (_percent(values['dead_share']), 'of the features never fired'),
  ]
  if 'loss_recovered' in values:
    recovered = _percent(values['loss_recovered'])
    label = "of the language model's loss recovered"
    if values['delta_loss'] is not None:
      label += f' (delta loss {values["delta_loss"]:.3f} nats)'
    tiles.insert(2, (recovered, label))
  return [{'value': value, 'label': label} for value, label in tiles]


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
  """What was trained on what."""
  dictionary = result['dictionary']
  activation = dictionary['activation']
  facts = [
    ('Subject model', result['subject']['name']),
    ('Site', f'{result["site"]}: {site_in_words(result["site"])}'),
    (
      'Dictionary',
      f'{_ACTIVATIONS.get(activation, activation)}, '
      f'{dictionary["width"]} numbers in, '
      f'{dictionary["latents"]:,} features',
    ),
    ('Trained on', f'{result["training_rows"]:,} rows (tokens)'),
  ]
  text = result['text']
  if 'documents_read' in text:
    facts.append(
      (
        'Texts',
        f'{text["name"]}: {text["documents_read"]:,} of {text["documents"]:,} '
        'documents',
      )
    )
  return facts


def _percent(value: float | None) -> str:
  return 'undefined' if value is None else f'{value:.1%}'


def _charts(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """The training curves that metrics.jsonl has numbers for."""
  shown = []
  for chart in _CHARTS:
    lines = []
    for key, label in chart.keys.items():
      points = [(m['rows'], m[key]) for m in metrics if m.get(key) is not None]
      if points:
        lines.append(plots.Line(label, *zip(*points, strict=True)))
    if not lines:
      continue
    last = format(lines[0].y[-1], chart.form)
    caption = chart.meaning.format(last=last)
    svg = plots.curves(
      chart.name,
      lines,
      alt=f'{chart.title} over training rows. {caption}',
      percent=chart.percent,
    )
    shown.append({'title': chart.title, 'svg': Markup(svg), 'caption': caption})
  return shown


def _histogram(frequency: dict[str, Any]) -> dict[str, Any] | None:
  counts = np.array(frequency['latents'])
  if not counts.sum():
    return None
  edges = np.array(frequency['log10_edges'])
  median = f'one token in {round(1 / frequency["median_of_living"]):,}'
  alt = (
    f'Histogram of the {counts.sum()} latents that fired, over the logarithm '
    f'of their firing frequency. Half of them fire on less than {median}.'
  )
  svg = plots.frequency_histogram(counts, edges, alt=alt)
  return {'svg': Markup(svg), 'median': median}


def _feature(
  f: LatentContexts, rows: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
  """One latent as the template shows it."""
  best = max((_at_peak(c) for c in f.contexts), default=0.0)
  span = math.log10(rows) if rows > 1 else 1
  return {
    'latent': f.latent,
    'share': f'{100 * f.frequency:.2g}%',
    'one_in': f'{round(1 / f.frequency):,}',
    'place': round(100 * (1 + math.log10(f.frequency) / span), 1),
    'best': f'{best:.3g}',
    'contexts': [
      {
        'where': f'sequence {c.sequence}, token {c.peak}',
        'value': f'{_at_peak(c):.3g}',
        'spans': spans(c, best, tokenizer),
        'cut_start': c.start > 0,
        'cut_end': c.start + len(c.ids) == c.peak + AFTER + 1,
      }
      for c in f.contexts
    ],
  }


def _at_peak(c: Context) -> float:
  return float(c.activations[c.peak - c.start])


def spans(c: Context, best: float, tokenizer: Tokenizer | None) -> list[Span]:
  """The tokens of a context with their text, shade and hover title."""
  shown = []
  for group in _characters(c.ids.tolist(), tokenizer):
    values = c.activations[group.start : group.stop]
    known = not np.isnan(values).all()
    value = float(np.nanmax(values)) if known else 0.0
    title = f'{value:.4g}' if known else 'not in the store'
    shown.append(
      Span(
        _visible(group.text),
        f'activation {title}' if known else title,
        round(min(max(value / best, 0), 1), 3) if best else 0.0,
        group.start <= c.peak - c.start < group.stop,
        known,
      )
    )
  return shown


class _Group(NamedTuple):
  start: int
  stop: int
  text: str


def _characters(ids: list[int], tokenizer: Tokenizer | None) -> list[_Group]:
  """Tokens as text, joined where only together they are valid UTF-8."""
  if tokenizer is None:
    return [_Group(i, i + 1, f'{t} ') for i, t in enumerate(ids)]
  # Decoders strip a space at the start of a text: put a token before it.
  anchor = tokenizer.encode('a', add_special_tokens=False).ids[-1:]
  skip = len(tokenizer.decode(anchor, skip_special_tokens=False))
  groups, start = [], 0
  while start < len(ids):
    for stop in range(start + 1, min(start + 4, len(ids)) + 1):
      text = tokenizer.decode(
        anchor + ids[start:stop], skip_special_tokens=False
      )[skip:]
      if '\ufffd' not in text:
        break
    else:  # no valid character begins here: show this token alone
      stop, text = start + 1, '\ufffd'
    groups.append(_Group(start, stop, text))
    start = stop
  return groups


def _visible(text: str) -> str:
  """Line breaks as a sign, other control characters as a dot."""
  text = text.replace('\r\n', '\n').replace('\n', '⏎').replace('\t', '⇥')
  return ''.join(
    '·' if unicodedata.category(c) in ('Cc', 'Cf', 'Cs') else c for c in text
  )
