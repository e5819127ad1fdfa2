"""Which runs of a study a law of latents may compare, and what to say of it."""

from sae_jax.scaling.envelope import fall
from sae_jax.sweep.slices import Slice, at_rows
from sae_jax.sweep.tables import Point

# A larger fall over the last doubling of rows is not convergence.
_CONVERGED = 0.02
# Runs are compared at rows that so many of the widths have.
_MOST = 0.75


def comparable(pool: list[Slice], metric: str) -> tuple[list[Point], list[str]]:
  """The points of a law of latents, and what to say of their convergence: the
  longest runs if all converged, else runs of equally many rows."""
  points, said = [p for one in pool for p in one.points], []
  for one in pool:
    of = f'{one.label}: ' if len(pool) > 1 else ''
    said += [of + doubt for doubt in _not_converged(falls(one))]
  if not said or len({p.rows for p in points}) < 2:
    return points, said
  rows = _common_rows(pool)
  if not rows:
    return [], [*said, 'no number of rows was trained at every k: give one']
  equal = [p for one in pool for p in at_rows(one, rows, metric)]
  left = len(_widths(points) - _widths(equal))
  return equal, [
    *said,
    f'so losses after {rows:,} rows are fitted, which most widths have'
    + (' at every k' if len(pool) > 1 else '')
    + (f'; {left} {"has" if left == 1 else "have"} not' if left else ''),
  ]


def _common_rows(pool: list[Slice]) -> int:
  """The largest number of rows that most widths have, at every k; 0: none."""
  common = set.intersection(*({p.rows for p in one.grid} for one in pool))
  counts = {
    rows: len(_widths([p for one in pool for p in one.grid if p.rows == rows]))
    for rows in common
  }
  most = max(counts.values(), default=0)
  enough = min(most, max(4, _MOST * most))  # four points make a law
  return max((r for r in common if counts[r] >= enough), default=0)


def _widths(points: list[Point]) -> set[tuple]:
  return {(p.k, p.latents) for p in points}


def falls(one: Slice) -> list[dict]:
  """How much the loss of each width fell over the last doubling of rows of its
  longest runs."""
  ends = {}
  for run in one.curves:
    ends[run.latents] = max(run.rows[-1], ends.get(run.latents, 0.0))
  found: dict[int, float] = {}
  for run in one.curves:
    fell = fall(run) if run.rows[-1] == ends[run.latents] else None
    if fell is not None:
      found[run.latents] = max(fell, found.get(run.latents, fell))
  return [{'latents': n, 'fall': f} for n, f in sorted(found.items())]


def _not_converged(table: list[dict]) -> list[str]:
  """Why longest runs of different lengths do not compare; [] if they do."""
  if not table:
    return ['no curve reaches back to half the rows: convergence is not known']
  late = [line for line in table if line['fall'] > _CONVERGED]
  if not late:
    return []
  worst = max(late, key=lambda line: line['fall'])
  return [
    f'not converged: over the last doubling of rows the loss of {len(late)} of '
    f'{len(table)} widths still fell more than {_CONVERGED:.0%} '
    f'({worst["fall"]:.1%} at {worst["latents"]:,} latents)'
  ]
