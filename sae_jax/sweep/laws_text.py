"""The laws of a study for a terminal."""

import textwrap

from sae_jax.sweep.law_words import beyond, held_out, interval, words


def text(found: dict) -> str:
  """A line for every fit, and below it what is to be said of it."""
  lines = [
    f'{found["metric"]}; FLOPs {found["flops"]}; {found["level"]:.0%} intervals'
  ]
  if found['left_out']:
    lines.append(found['left_out'])
  if found['seed_noise'] is not None:
    lines.append(f'seeds alone: {found["seed_noise"]:.2%} of the loss')
  for fit in found['fits']:
    lines += ['', f'{fit["name"]:<24} {fit["formula"]}', *_fit(fit)]
  for made in found['predictions']:
    lines += [
      '',
      f'{made["latents"]:,} latents ({words(made["slice"])}): '
      f'{found["metric"]} {interval(made)}, '
      f'{beyond(made)}',
      *_warnings(made),
    ]
  for made in found['recommendation']:
    lines += ['', *_recommendation(made, found['metric'])]
  lines += [''] * bool(found['notes']) + found['notes']
  return '\n'.join(lines)


def _fit(fit: dict) -> list[str]:
  if fit['params'] is None:
    return _wrapped(fit['why']) + _warnings(fit)
  lines = [
    f'  {name:<8} {interval(value)}' for name, value in fit['params'].items()
  ]
  lines.append(
    f'  {len(fit["points"])} points, {fit["rms_log_error"]:.2%} off the law'
  )
  if held := held_out(fit):
    lines += _wrapped(held)
  if fit['verdict'] != 'ok':
    lines += _wrapped(f'{fit["verdict"]}: {fit["why"]}')
  return lines + _warnings(fit)


def _recommendation(made: dict, metric: str) -> list[str]:
  lr = 'no law' if made['lr'] is None else f'{made["lr"]:.3g}'
  return [
    f'{made["flops"]:.3g} FLOPs ({words(made["slice"])}): '
    f'{made["latents"]:,} latents (best '
    f'{made["latents_low"]:,.0f} to {made["latents_high"]:,.0f}), '
    f'{made["rows"]:,} rows, learning rate {lr}',
    f'  {metric} {interval(made)}, {beyond(made)}',
    *_warnings(made),
  ]


def _warnings(made: dict) -> list[str]:
  return [
    line for said in made['warnings'] for line in _wrapped(f'warning: {said}')
  ]


def _wrapped(said: str) -> list[str]:
  return textwrap.wrap(said, 80, initial_indent='  ', subsequent_indent='    ')
