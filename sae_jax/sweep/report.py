"""What a study leaves behind: a page, its tables, and its figures.

The page is one file that asks the network for nothing. Everything that comes
from configs or errors is escaped by the template engine.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sae_jax.paths import write_atomic
from sae_jax.sweep import charts, drawing
from sae_jax.sweep.drawing import number
from sae_jax.sweep.law_words import (
  beyond,
  exponent,
  flops_key,
  held_out,
  interval,
  sentence,
  words,
)
from sae_jax.sweep.tables import Mark, Point
from sae_jax.sweep.write_tables import csv, parquet, table

TEMPLATE = 'study.html.jinja'


def write(
  folder: Path,
  title: str,
  points: list[Point],
  marks: list[Mark],
  laws: dict[str, Any],
) -> Path:
  """Writes the report of a study into `folder`; the path of study.html.

  `laws` is laws.json, or empty where nothing was fitted. Beside the page:
  points and curves as .parquet and .csv, and for each chart a PNG and its
  numbers as CSV in figures/. All is made before the first file is written,
  and study.html is written last. Raises UserError where pyarrow is not
  installed.
  """
  all_points, all_marks = table(Point, points), table(Mark, marks)
  files = {
    'study.parquet': parquet(all_points),
    'points.csv': csv(all_points),
    'curves.parquet': parquet(all_marks),
    'curves.csv': csv(all_marks),
  }
  shown = {}
  for section, figures in charts.sections(points, marks, laws).items():
    shown[section] = []
    for chart in figures:
      numbers = table(drawing.Row, drawing.rows(chart))
      svg, png = drawing.pictures(chart)
      files[f'figures/{chart.name}.png'] = png
      files[f'figures/{chart.name}.csv'] = csv(numbers)
      shown[section].append(chart._asdict() | {'svg': Markup(svg)})
  page = _render(title, points, laws, shown)
  for name, data in files.items():
    write_atomic(Path(folder) / name, data)
  path = Path(folder) / 'study.html'
  write_atomic(path, page)
  return path


def _render(
  title: str,
  points: Sequence[Point],
  laws: dict[str, Any],
  shown: dict[str, list[dict[str, Any]]],
) -> str:
  here = Path(__file__).parent
  environment = Environment(
    loader=FileSystemLoader([here, here.parent / 'evaluate']),  # look.css
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template(TEMPLATE).render(
    title=title,
    ramps=list(zip(drawing.RAMP, drawing.RAMP_DARK, strict=True)),
    facts=_facts(points),
    tiles=_tiles(points, laws),
    charts=shown,
    fitted=bool(laws.get('fits')),
    fits=[_fit(f) for f in laws.get('fits', [])],
    notes=_notes(laws),
    predictions=[_prediction(p) for p in laws.get('predictions', [])],
    unsaid=laws.get('notes', []),
    advice=[_advice(r) for r in laws.get('recommendation', [])],
    points=[_point(p) for p in sorted(points, key=_order)],
    executed=flops_key(laws) == 'flops_executed',
  )


def _facts(points: Sequence[Point]) -> list[tuple[str, str]]:
  """What was studied."""
  grid = [p for p in points if p.stage == 'grid'] or points
  kinds = ', '.join(sorted({p.activation for p in grid}))
  facts = [
    ('Dictionaries', f'{kinds}, {_all(grid, "d_in")} numbers in'),
    ('Latents N', _all(grid, 'latents')),
    ('k', _all(grid, 'k')),
    ('L0 coefficients', _all([p for p in grid if p.k is None], 'l0_coef')),
    ('Rows (tokens)', _all(grid, 'rows')),
    ('Learning rates', _all(points, 'lr')),
    ('Seeds', f'{len({p.seed for p in grid})}'),
    ('Batch', f'{_all(grid, "batch_rows")} rows'),
  ]
  return [(name, value) for name, value in facts if value] if grid else []


def _all(points: Sequence[Point], field: str) -> str:
  """The values of a field; the ends where there are many."""
  values = sorted({getattr(p, field) for p in points} - {None})
  if len(values) > 8:
    return f'{len(values)} from {number(values[0])} to {number(values[-1])}'
  return ', '.join(number(v) for v in values)


def _tiles(
  points: Sequence[Point], laws: dict[str, Any]
) -> list[tuple[str, str]]:
  """The numbers that the page opens with, and what they are."""
  states = Counter(p.state for p in points)
  rest = ', '.join(
    f'{count} {state}' for state, count in states.items() if state != 'done'
  )
  widths = sorted({p.latents for p in points})
  ends = dict.fromkeys(f'{width:,}' for width in (*widths[:1], *widths[-1:]))
  flops = sum(getattr(p, flops_key(laws)) for p in points)
  kind = 'executed' if flops_key(laws) == 'flops_executed' else 'published'
  tiles = [
    (f'{states["done"]} of {len(points)}', f'SAEs done{rest and "; " + rest}'),
    ('–'.join(ends) or 'none', 'latents'),
    (number(sum(p.device_hours for p in points)), 'device-hours'),
    (number(flops, 2), f'training FLOPs, {kind} count'),
  ]
  return [*tiles, _headline(laws)]


def _headline(laws: dict[str, Any]) -> tuple[str, str]:
  """The exponent of L(C), else of L(N), else that there is none."""
  for name, over in (('L(C)', 'compute'), ('L(N)', 'latents')):
    for fit in laws.get('fits', []):
      if fit['name'].startswith(name) and exponent(fit):
        value, _, span = exponent(fit).partition(' ')
        part = words(fit['slice'])
        return value, f'exponent of loss over {over} {span}, {part}'
  if not laws.get('fits'):
    return 'not fitted', 'no law was fitted to this study'
  return 'undetermined', 'the exponent: see the table of laws for why'


def _notes(laws: dict[str, Any]) -> list[str]:
  """What was left out of the fits, and how sure they can be."""
  notes = []
  if laws.get('left_out'):
    notes.append(f'{sentence(laws["left_out"])}.')
  if laws.get('level') is not None:
    notes.append(f'Intervals and bands are at {laws["level"]:.0%}.')
  if laws.get('seed_noise') is not None:
    notes.append(
      f'Between seeds the loss differs by {laws["seed_noise"]:.2%} (standard '
      'deviation).'
    )
  elif 'seed_noise' in laws:
    notes.append('No point was repeated with another seed: noise is unknown.')
  return notes


def _fit(fit: dict[str, Any]) -> dict[str, Any]:
  """A row of the table of laws."""
  ok, error = fit['verdict'] == 'ok', fit.get('rms_log_error')
  why = [fit.get('why', ''), *fit.get('warnings', [])]
  return {
    'title': fit['title'],
    'name': fit['name'],
    'formula': fit['formula'],
    'params': [(k, interval(v)) for k, v in (fit['params'] or {}).items()],
    'points': len(fit['points']),
    'error': '' if error is None else f'{error:.2%}',
    'held_out': held_out(fit),
    'verdict': 'determined' if ok else fit['verdict'],
    'ok': ok,
    'why': [sentence for sentence in why if sentence],
  }


def _prediction(p: dict[str, Any]) -> dict[str, Any]:
  """A row of the predictions."""
  cells = [words(p['slice']), f'{p["latents"]:,}', interval(p), beyond(p)]
  return {'cells': cells, 'warnings': p.get('warnings', [])}


def _advice(r: dict[str, Any]) -> dict[str, Any]:
  """A row of the recommendation: what to train with a compute."""
  latents = {
    'value': r['latents'], 'low': r['latents_low'], 'high': r['latents_high'],
  }  # fmt: skip
  cells = [
    words(r['slice']),
    number(r['flops']),
    interval(latents),
    number(r['rows']),
    number(r['lr']),
    interval(r),
    beyond(r),
  ]
  return {'cells': cells, 'warnings': r.get('warnings', [])}


def _order(p: Point) -> tuple:
  return (p.stage, p.activation, p.k or 0, p.latents, p.rows, p.lr, p.seed)


def _point(p: Point) -> dict[str, Any]:
  """A row of the table of points; a failed one has its reason instead."""
  head = [
    p.stage, p.activation, number(p.latents), number(p.k), number(p.rows),
    number(p.lr), str(p.seed),
  ]  # fmt: skip
  loss = number(p.delta_loss)
  if loss and p.delta_loss_se is not None:
    loss += f' ± {number(p.delta_loss_se, 2)}'
  dead = '' if p.dead_share is None else f'{p.dead_share:.1%}'
  figures = [
    number(p.fvu), number(p.l0), loss, dead, number(p.flops),
    number(p.flops_executed), number(p.device_hours),
  ]  # fmt: skip
  return {
    'id': p.point, 'changes': p.changes, 'state': p.state, 'head': head,
    'figures': figures, 'reason': p.reason,
  }  # fmt: skip
