"""A plan as lines of text, and several as a table."""

from typing import Any


def text(p: dict[str, Any]) -> str:
  """One plan, for people."""
  m, s, r = p['memory_gib'], p['seconds'], p['rows']
  lines = [
    f'{p["topology"]}: {p["chips"]} chips, mesh data={p["data"]} '
    f'dict={p["dict"]}, {p["micro_batches"]} micro-batch(es)'
    + (', zero1' if p['zero1'] else ''),
    f'{p["activation"]}, {p["latents"]:,} latents x {p["d_in"]:,}, batch '
    f'{p["batch_rows"]:,}, products in {p["compute_dtype"]}',
    f'rows stored in {r["stored"]} ({r["source"]}), on the devices '
    f'{r["on_devices"]}',
    f'{p["method"]} ({_versions(p)})',
    *([f'to compile it: {p["to_compile"]}'] if 'to_compile' in p else []),
    '',
    'memory of a device, GiB',
    *(
      f'  {key:<14}{m[key]:>10.3f}'
      for key in (
        'parameters', 'optimiser', 'gradients', 'batch', 'activations',
        'arithmetic',
      )
    ),
  ]  # fmt: skip
  if 'peak' in m:
    lines += [
      f'  {"peak":<14}{m["peak"]:>10.3f}   '
      f'{p["peak_over_arithmetic"]:.2f} x arithmetic',
      f'  {"reserved":<14}{m["reserved"]:>10.3f}   state, batch and the '
      'block of temporaries',
    ]
  lines += [f'  {"available":<14}{m["available"]:>10.3f}   of {m["hbm"]:g}']
  if 'refused' in p:
    lines += ['', f'DOES NOT FIT. The compiler says: {p["refused"]}']
  else:
    lines += ['fits' if p['fits'] else 'DOES NOT FIT']
  lines += ['', *_work(p), '', 'collectives of a device and step']
  lines += [_collective(c) for c in p['collectives']] or ['  none']
  lines += ['', *_time(p, s), '', *_needs(p)]
  return '\n'.join(lines)


def _versions(p: dict[str, Any]) -> str:
  return ', '.join(f'{k} {v}' for k, v in p['versions'].items() if v)


def _work(p: dict[str, Any]) -> list[str]:
  f = p['flops']
  return [
    'work of a device and step',
    f'  {"FLOPs":<14}{f["executed"] / 1e12:>10.3f} T executed, '
    f'{f["products"] / 1e12:.3f} T by arithmetic, '
    f'{f["published"] / 1e12:.3f} T as 12 B D F',
    f'  {"HBM":<14}{p["hbm_bytes"] / 1e9:>10.3f} GB read and written',
  ]


def _collective(c: dict[str, Any]) -> str:
  return (
    f'  {c["axis"]:<10}{c["kind"]:<19}{c["devices"]:>4} devices '
    f'{c["runs"]:>5} x {c["bytes"] / 1e6:>12.3f} MB {c["seconds"] * 1e3:>9.3f}'
    ' ms'
  )


def _time(p: dict[str, Any], s: dict[str, Any]) -> list[str]:
  ms = lambda key: f'{s[key] * 1e3:.2f} ms'
  return [
    'roofline (docs/plan.md says what it leaves out)',
    f'  compute {ms("compute")}, HBM {ms("hbm")}, links {ms("links")}',
    f'  step {ms("step")} (kernel by kernel {ms("kernels")} + links); '
    f'{ms("at_best")} if all overlapped; waits for {s["bound"]}',
    f'  {p["rows_per_second"]:,.0f} rows/s; {p["utilisation"]["published"]:.0%}'
    f' of peak as 12 B D F, {p["utilisation"]["executed"]:.0%} executed',
  ]


def _needs(p: dict[str, Any]) -> list[str]:
  i, chips = p['input_bytes_per_second'], p['chips_needed']
  rows = p['rows']
  return [
    f'input {i["store"] / 1e9:.3f} GB/s of {rows["stored"]} rows from disk, '
    f'{i["to_all_devices"] / 1e9:.3f} GB/s of {rows["on_devices"]} to all '
    'devices',
    f'chips needed for the memory: {"too many" if chips is None else chips}',
  ]


def table(plans: list[dict[str, Any]]) -> str:
  """The candidates of a search, a line each, the first recommended."""
  lines = [
    '  data  dict micro zero1   GiB peak  reserved  x arith.   step ms  '
    'rows/s       fits'
  ]
  for p in plans:
    m = p['memory_gib']
    gib = lambda key, m=m: f'{m[key]:.2f}' if key in m else '-'
    ratio = p.get('peak_over_arithmetic')
    lines.append(
      f'{p["data"]:>6}{p["dict"]:>6}{p["micro_batches"]:>6}'
      f'{"yes" if p["zero1"] else "no":>6}{gib("peak"):>11}'
      f'{gib("reserved"):>10}{f"{ratio:.2f}" if ratio else "-":>10}'
      f'{p["seconds"]["step"] * 1e3:>10.1f}{p["rows_per_second"]:>10,.0f}'
      f'{"yes" if p["fits"] else "no":>9}'
    )
  best = plans[0]
  if best['fits']:
    lines += [
      '',
      f'recommended ({best["method"]}): {flags(best)}',
    ]
  else:
    lines += ['', 'none of these fits: compile more (--candidates), or take '
              'more chips']  # fmt: skip
  return '\n'.join(lines)


def flags(p: dict[str, Any]) -> str:
  """The options of a program in launch/ that give this plan."""
  return (
    f'--config.mesh.data={p["data"]} --config.mesh.dict={p["dict"]} '
    f'--config.train.micro_batches={p["micro_batches"]} '
    f'--config.mesh.zero1={p["zero1"]}'
  )


def chips(rows: list[dict[str, Any]]) -> str:
  """The table of families."""
  lines = [
    'family  example   bf16 TFLOP/s  HBM GiB   GB/s  links GB/s  largest  '
    'chips needed'
  ]
  for r in rows:
    needed = r['chips_needed']
    lines.append(
      f'{r["family"]:<8}{r["example"]:<10}{r["tflops"]:>12g}'
      f'{r["hbm_gib"]:>9g}{r["hbm_gb_s"]:>7g}{r["ici_gb_s"]:>12g}'
      f'{r["largest"]:>9}{"-" if needed is None else needed:>14}'
    )
  return '\n'.join(lines)
