"""Checks a store of activations, and mends it.

python launch/verify.py --store=DIR
Prints a line for every check; docs/verify.md says what each looks at. Exit
code 0: all is well, 1: problems were found, 2: a mistake in the flags.
"""

import json
import sys
import textwrap

from absl import flags

from sae_jax import cli
from sae_jax.errors import UserError
from sae_jax.harvest.repair import repair
from sae_jax.harvest.verify import verify_store
from sae_jax.store.checks import Check

_STORE = flags.DEFINE_string('store', None, 'Folder of the store.')
_MODEL_PATH = flags.DEFINE_string(
  'model_path', '', 'The language model, if it has moved.'
)
_TEXT_PATH = flags.DEFINE_string(
  'text_path', '', 'The text, if it has moved (for --repair).'
)
_ROWS = flags.DEFINE_string(
  'rows', '256', "Rows to compute from the model again: a number or 'all'."
)
_EXACT = flags.DEFINE_bool(
  'exact', False, 'Compute the statistics of every shard again.'
)
_REPAIR = flags.DEFINE_bool('repair', False, 'Harvest damaged shards again.')
_JSON = flags.DEFINE_bool('json', False, 'Print the result as JSON.')
flags.mark_flag_as_required('store')

# Lines printed of one check; --json has all.
_LINES = 10


def main() -> None:
  rows = _rows(_ROWS.value)
  look = lambda: verify_store(
    str(_STORE.value),
    rows=rows,
    exact=_EXACT.value or rows is None,
    model_path=_MODEL_PATH.value,
  )
  checks, done = look(), []
  if _REPAIR.value:
    if not _JSON.value:
      print(table(checks))
    done = repair(
      str(_STORE.value),
      checks,
      model_path=_MODEL_PATH.value,
      text_path=_TEXT_PATH.value,
    )
    if not _JSON.value:
      print('\n' + '\n'.join(f'repair: {line}' for line in done) + '\n')
    checks = look()
  print(as_json(checks, done) if _JSON.value else table(checks))
  if any(check.problems for check in checks):
    sys.exit(1)


def _rows(given: str) -> int | None:
  """The number of rows, None for all."""
  if given == 'all':
    return None
  if not given.isdecimal():
    raise UserError(f"--rows: {given!r}; give a number, 0 for none, or 'all'")
  return int(given)


def table(checks: list[Check]) -> str:
  """A line for every check, and below it what it found."""
  lines = []
  for check in checks:
    said = check.skipped if check.state == 'skipped' else check.looked_at
    head = f'{check.name:<11} {check.state:<12} '
    lines += textwrap.wrap(
      said, 100, initial_indent=head, subsequent_indent=' ' * len(head)
    ) or [head.rstrip()]
    found = [problem.text for problem in check.problems]
    found += [f'warning: {line}' for line in check.warnings]
    lines += [f'  {line}' for line in found[:_LINES]]
    if len(found) > _LINES:
      lines.append(f'  and {len(found) - _LINES} more (--json lists all)')
  return '\n'.join(lines)


def as_json(checks: list[Check], done: list[str]) -> str:
  """The same as one JSON object."""
  listed = [
    {
      'name': check.name,
      'state': 'problems' if check.problems else check.state,
      'looked_at': check.looked_at,
      'skipped': check.skipped,
      'problems': [problem._asdict() for problem in check.problems],
      'warnings': list(check.warnings),
    }
    for check in checks
  ]
  ok = not any(check.problems for check in checks)
  result = {'store': str(_STORE.value), 'ok': ok, 'checks': listed}
  return json.dumps(result | {'repaired': done}, indent=1, ensure_ascii=False)


if __name__ == '__main__':
  cli.run(main)
