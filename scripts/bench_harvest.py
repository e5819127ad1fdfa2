"""How fast the subject model gives activations, beside transformers on torch.

python scripts/bench_harvest.py --rounds=9
Every side is a process of its own with the same weights; each is started, says
its activations (compared before anything is timed), and is then asked in turn.
The last line is JSON: medians over the rounds, ratios, what was skipped, why.
"""

import contextlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from machine import cpu, fast_mkl
from ml_collections import ConfigDict

from sae_jax import cli
from sae_jax.errors import UserError
from sae_jax.paths import cache_dir

ROOT = Path(__file__).resolve().parents[1]
DEMO = cache_dir('demo', 'SmolLM2-135M-Instruct.Q4_1.gguf')
_MODEL = flags.DEFINE_string('model', DEMO, 'GGUF file (llama architecture).')
_LAYER = flags.DEFINE_integer('layer', 9, 'The residual stream after it.', 0)
_LENGTH = flags.DEFINE_integer('length', 1024, 'Tokens in a sequence.', 1)
_BATCH = flags.DEFINE_integer('batch', 1, 'Sequences in a forward pass.', 1)
_ROUNDS = flags.DEFINE_integer('rounds', 7, 'Times each side is asked.', 1)
_CALLS = flags.DEFINE_integer('calls', 3, 'Forward passes a round.', 1)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Arithmetic of all sides.'
)
_JOB = flags.DEFINE_bool(
  'job', False, 'Runs a whole harvest instead: the share of time it writes.'
)
_JOB_ROWS = flags.DEFINE_integer('job_rows', 16_384, 'Rows that it writes.', 1)
_SIDE = flags.DEFINE_enum('side', None, ['ours', 'torch'], 'Internal.')
_OUT = flags.DEFINE_string('out', None, 'Internal: activations of a side.')

TOLERANCE = {'float32': 1e-3, 'bfloat16': 5e-2}  # of the vectors' lengths
REST = 0.3  # seconds before a round: the other sides' threads stop spinning

# The last line of launch/harvest.py's log; the one place that knows its words.
JOB_LINE = re.compile(
  r'(?P<rows>[\d,]+) rows in (?P<wall>[\d.]+) s.*?'
  r'waited (?P<waited>[\d.]+) s.*?wrote\D*(?P<wrote>[\d.]+) s'
)


def main() -> None:
  if _SIDE.value:
    serve({'ours': ours, 'torch': theirs}[_SIDE.value])
    return
  if not Path(_MODEL.value).exists():
    if _MODEL.value != DEMO:
      raise UserError(f'--model={_MODEL.value}: there is no such file')
    subprocess.run([sys.executable, ROOT / 'scripts/fetch_demo.py'], check=True)
  result = bench_job() if _JOB.value else bench()
  print(json.dumps(result), flush=True)


# --- Sides: each gives forward(tokens [B, T]) -> activations [B, T, d] --------


def ours() -> Callable[[np.ndarray], np.ndarray]:
  import jax

  from sae_jax.lm import model
  from sae_jax.lm.subject import load_subject

  subject = load_subject(ConfigDict({'path': _MODEL.value}), _DTYPE.value)
  site = f'layer_{_LAYER.value}.resid_post'
  model.check_sites(subject.cfg, (site,))

  @jax.jit
  def run(params, tokens):
    out = model.forward(
      params, subject.cfg, tokens, sites=(site,), logits=False,
      dtype=_DTYPE.value,
    )  # fmt: skip
    return out.activations[site]

  return lambda tokens: jax.device_get(run(subject.params, tokens))


def theirs() -> Callable[[np.ndarray], np.ndarray]:
  import torch

  from sae_jax.lm.subject import load_subject

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  subject = load_subject(ConfigDict({'path': _MODEL.value}))
  llama = torch_llama(subject.cfg, subject.params).to(
    getattr(torch, _DTYPE.value)
  )

  class Stop(Exception):
    pass

  def hook(_, __, output):
    raise Stop(output)

  llama.layers[_LAYER.value].register_forward_hook(hook)

  def run(tokens):
    with torch.inference_mode(), contextlib.suppress(Stop):
      try:
        llama(torch.from_numpy(tokens).long(), use_cache=False)
      except Stop as stop:
        return stop.args[0].float().numpy()
    raise AssertionError('the hook was not called')

  return run


def torch_llama(cfg, params):
  """transformers' LlamaModel (no logits) with our params' values."""
  import torch
  import transformers

  if cfg.rope_scaling or cfg.sliding_window:
    raise UserError('--model: only a plain Llama can be built in transformers')
  settings: dict[str, Any] = dict(
    vocab_size=cfg.vocab, hidden_size=cfg.d_model, head_dim=cfg.head_dim,
    intermediate_size=cfg.d_mlp, num_hidden_layers=cfg.layers,
    num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads,
    rms_norm_eps=cfg.norm_eps, max_position_embeddings=_LENGTH.value,
    rope_parameters={'rope_type': 'default', 'rope_theta': cfg.rope_base},
    attn_implementation='sdpa', pad_token_id=0, bos_token_id=0, eos_token_id=0,
  )  # fmt: skip
  hf = transformers.LlamaConfig(**settings)
  llama = transformers.LlamaModel(hf).eval()
  name = {
    'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm',
    **{f'w_{x}': f'self_attn.{x}_proj' for x in 'qkvo'},
    **{f'w_{x}': f'mlp.{x}_proj' for x in ('gate', 'up', 'down')},
  }  # fmt: skip
  state = {'embed_tokens': params['embed'], 'norm': params['final_norm']}
  for i, layer in enumerate(params['layers']):
    state |= {f'layers.{i}.{name[k]}': v.T for k, v in layer.items()}
  llama.load_state_dict(
    {f'{k}.weight': torch.tensor(np.asarray(v)) for k, v in state.items()}
  )
  return llama


def serve(side: Callable[[], Callable[[np.ndarray], np.ndarray]]) -> None:
  """Writes the activations to --out, then answers each line with seconds."""
  run, tokens = side(), make_tokens()
  np.save(str(_OUT.value), np.asarray(run(tokens), np.float32))
  print('ready', flush=True)
  for _ in sys.stdin:
    run(tokens)  # caches and threads are warm again
    start = time.perf_counter()
    for _ in range(_CALLS.value):
      run(tokens)
    print((time.perf_counter() - start) / _CALLS.value, flush=True)


def make_tokens() -> np.ndarray:
  """The same tokens [B, T] on every side; ids that any vocabulary has."""
  rng = np.random.default_rng(0)
  return rng.integers(0, 1000, (_BATCH.value, _LENGTH.value), dtype=np.int32)


# --- The comparison -----------------------------------------------------------


def bench() -> dict:
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    skipped, sides = {}, {'ours': {}}
    missing = [x for x in ('torch', 'transformers') if not _installed(x)]
    if missing:
      skipped['torch'] = f'{missing[0]} is not installed'
    else:
      sides['torch'] = {}
    library = None if missing else fast_mkl(Path(folder))
    if library:
      sides['torch_mkl'] = {'LD_PRELOAD': str(library)}
    else:
      skipped['torch_mkl'] = skipped.get('torch', 'there is no cc')
    asked = {}
    for name, environment in sides.items():
      out = Path(folder) / f'{name}.npy'
      asked[name] = stack.enter_context(_side(name, environment, out))
      check_agreement(Path(folder) / 'ours.npy', out)
    seconds = {name: [] for name in sides}
    for _ in range(_ROUNDS.value):
      for name, ask in asked.items():
        seconds[name].append(ask())
  return report(seconds, skipped)


@contextlib.contextmanager
def _side(
  name: str, environment: dict, out: Path
) -> Iterator[Callable[[], float]]:
  """A running side; calling it takes one round and gives seconds a pass."""
  command = [
    sys.executable, __file__, f'--side={name.split("_")[0]}', f'--out={out}',
    *(f'--{x.name}={x.value}' for x in
      (_MODEL, _LAYER, _LENGTH, _BATCH, _CALLS, _DTYPE)),
  ]  # fmt: skip
  path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
  process = subprocess.Popen(
    command, env=os.environ | {'PYTHONPATH': path} | environment, text=True,
    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
  )  # fmt: skip
  assert process.stdin and process.stdout
  stdin, stdout = process.stdin, process.stdout

  def ask() -> float:
    time.sleep(REST)
    stdin.write('go\n')
    stdin.flush()
    return float(stdout.readline())

  try:
    if stdout.readline() != 'ready\n':
      raise UserError(f'{name}: this side did not start, see above')
    yield ask
  finally:
    stdin.close()
    process.wait()


def check_agreement(a: Path, b: Path) -> None:
  """UserError unless every activation vector is the same on both sides."""
  x, y = np.load(a), np.load(b)
  error = np.linalg.norm(x - y, axis=-1) / np.linalg.norm(x, axis=-1)
  if not error.max() < TOLERANCE[_DTYPE.value]:
    raise UserError(
      f'{a.stem} and {b.stem} disagree: relative error {error.max():.2g} where '
      f'at most {TOLERANCE[_DTYPE.value]} is rounding; nothing was timed'
    )


def report(seconds: dict[str, list[float]], skipped: dict[str, str]) -> dict:
  """Prints the table; medians and the medians of the rounds' ratios."""
  tokens = _BATCH.value * _LENGTH.value
  result = {'cpu': cpu(), 'layer': _LAYER.value, 'length': _LENGTH.value}
  result |= {'batch': _BATCH.value, 'dtype': _DTYPE.value}
  print(f'{"":12} tokens/s   lowest  highest  ours against it')
  for name, times in seconds.items():
    rate = [tokens / x for x in times]
    pairs = zip(times, seconds['ours'], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    result[f'{name}_tokens_per_s'] = round(statistics.median(rate))
    if name != 'ours':
      result[f'ours_over_{name}'] = round(ratio, 3)
    print(
      f'{name:12}{statistics.median(rate):9,.0f}{min(rate):9,.0f}'
      f'{max(rate):9,.0f}{ratio:10.2f}'
    )
  for name, why in skipped.items():
    print(f'{name:12}  skipped: {why}')
  return result | {'skipped': skipped}


def _installed(package: str) -> bool:
  return importlib.util.find_spec(package) is not None


# --- A whole harvest ----------------------------------------------------------


def bench_job() -> dict:
  """launch/harvest.py into a temporary store; what share of it is writing."""
  with tempfile.TemporaryDirectory() as folder:
    shard = 1 << max(8, (_JOB_ROWS.value // 4).bit_length() - 1)
    command = [
      sys.executable, ROOT / 'launch/harvest.py',
      '--config=configs/harvest.py:smollm2',
      f'--config.model.path={_MODEL.value}',
      f'--config.store.path={folder}/store',
      f'--config.store.rows_per_shard={shard}',
      f'--config.harvest.rows={_JOB_ROWS.value}',
      f'--config.harvest.sequence_length={_LENGTH.value}',
      f'--config.harvest.batch_sequences={_BATCH.value}',
      f'--config.harvest.compute_dtype={_DTYPE.value}',
      f'--config.harvest.sites=("layer_{_LAYER.value}.resid_post",)',
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    start = time.perf_counter()
    done = subprocess.run(
      command, cwd=ROOT, env=os.environ | {'PYTHONPATH': path}, text=True,
      stderr=subprocess.PIPE,
    )  # fmt: skip
    whole = time.perf_counter() - start
  if done.returncode:
    raise UserError(f'the harvest failed: {done.stderr.strip()[-400:]}')
  found = JOB_LINE.search(done.stderr)
  if not found:
    raise UserError(
      'the harvest does not log its seconds as JOB_LINE in '
      'scripts/bench_harvest.py has it: mend that pattern'
    )
  wall, wrote = float(found['wall']), float(found['wrote'])
  print(
    f'{found["rows"]} rows in {wall:.1f} s (the program: {whole:.1f} s), '
    f'writing {wrote:.2f} s, {wrote / wall:.1%} of the wall time'
  )
  return {
    'cpu': cpu(),
    'rows': int(found['rows'].replace(',', '')),
    'length': _LENGTH.value,
    'batch': _BATCH.value,
    'dtype': _DTYPE.value,
    'wall_s': wall,
    'program_s': round(whole, 1),
    'waited_s': float(found['waited']),
    'writing_s': wrote,
    'writing_share': round(wrote / wall, 4),
  }


if __name__ == '__main__':
  cli.run(main)
