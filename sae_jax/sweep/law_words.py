"""laws.json, looked up and said in words."""

from typing import Any

from sae_jax.sweep.drawing import number


def agree(a: dict[str, Any], b: dict[str, Any]) -> bool:
  """Whether two slices, or a slice and a point, do not differ."""
  return all(a[key] == b[key] for key in a.keys() & b.keys())


def words(part: dict[str, Any]) -> str:
  """{'activation': 'topk', 'k': 32} -> 'topk, k = 32'."""
  return ', '.join(
    str(value) if key == 'activation' else f'{key} = {_plain(value)}'
    for key, value in part.items()
    if value is not None
  )


def _plain(value: Any) -> str:
  known = isinstance(value, int | float) and not isinstance(value, bool)
  return number(value) if known else str(value)


def sentence(text: str) -> str:
  """With a capital at its start."""
  return text[:1].upper() + text[1:]


def find(
  laws: dict[str, Any], name: str, part: dict[str, Any]
) -> dict[str, Any] | None:
  """The fit of this name (up to its bar) for a slice; None without one."""
  for fit in laws.get('fits', []):
    if fit['name'].startswith(name) and agree(fit['slice'], part):
      return fit if fit['law'] != 'joint' else None
  return None


def flops_key(laws: dict[str, Any]) -> str:
  """The field of Point and Mark that the laws take as C."""
  executed = laws.get('flops') == 'executed'
  return 'flops_executed' if executed else 'flops'


def interval(value: dict[str, Any]) -> str:
  """'0.31 [0.28, 0.35]': a parameter, or anything with value, low, high."""
  key = 'value' if 'value' in value else 'predicted'
  text = number(value[key])
  if value.get('low') is None or value.get('high') is None:
    return text
  return f'{text} [{number(value["low"])}, {number(value["high"])}]'


def exponent(fit: dict[str, Any] | None) -> str:
  """The exponent with its interval; '' where it was not determined."""
  if not fit or fit['verdict'] != 'ok' or not fit['params']:
    return ''
  return interval(fit['exponent'])


def in_words(fit: dict[str, Any] | None, name: str) -> str:
  """One or two sentences on a fit, for the caption of its chart."""
  if not fit:
    return f'No law {name} was fitted here.'
  if fit['verdict'] != 'ok':
    why = fit.get('why', '').strip().rstrip('.')
    is_ = 'has' if fit['verdict'] == 'too few points' else 'is'
    return f'{name} {is_} {fit["verdict"]}' + (f': {why}.' if why else '.')
  values = ', '.join(
    f'{k} = {interval(v)}' for k, v in (fit['params'] or {}).items()
  )
  text = f'Fitted: {fit["formula"]} with {values}.'
  return f'{text} {held_out(fit)}'.strip()


def held_out(fit: dict[str, Any]) -> str:
  """What the fit without the widest predicted for them; '' without one."""
  held = fit.get('held_out')
  if not held or held['measured'] is None or held['predicted'] is None:
    return ''
  error = held['predicted'] / held['measured'] - 1
  at = number(held['x']) + (' FLOPs' if fit['x'] == 'flops' else ' latents')
  at += f', k = {held["k"]:g}' if 'k' in held else ''
  return (
    f'Held out: {number(held["measured"])} measured at {at}; '
    f'{interval(held)} predicted ({error:+.1%}).'
  )


def beyond(made: dict[str, Any]) -> str:
  """How far outside the study a prediction lies."""
  if made['beyond'] <= 1:
    return 'within the study'
  return f'{made["beyond"]:.3g} times beyond the study'
