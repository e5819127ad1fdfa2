"""What products in bfloat16 cost in quality: the same runs in both types.

python scripts/bf16_cost.py --store=~/.cache/sae_jax/stores/quickstart-...
TopK (k = 32) and JumpReLU demos on a store of real rows; only
config.train.compute_dtype differs. Held-out FVU and L0, computed in float32,
after the last step; a line of JSON for each run, then one for each recipe.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from absl import flags

from sae_jax import cli
from sae_jax.errors import UserError
from sae_jax.store.manifest import local_root, read_manifest
from sae_jax.train import loop

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ('float32', 'bfloat16')
_STORE = flags.DEFINE_string('store', '', 'An activation store.')
_SITE = flags.DEFINE_string('site', 'layer_9.resid_post', 'Of the store.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Runs of each recipe and type.', 1)
_STEPS = flags.DEFINE_integer('steps', 150, 'Of each run.', 20)
_BATCH = flags.DEFINE_integer('batch', 2048, 'Rows of a step.', 1)
_LATENTS = flags.DEFINE_integer('latents', 4096, 'F.', 32)


def main() -> None:
  sys.path.insert(0, str(ROOT / 'configs'))
  import jumprelu  # type: ignore[import]
  import topk  # type: ignore[import]

  if not _STORE.value:
    raise UserError('--store: give the folder of an activation store')
  store = local_root(_STORE.value)
  width = read_manifest(store).site(_SITE.value).width
  found: dict[tuple[str, str], list[float]] = {}
  for seed in range(_SEEDS.value):
    for recipe in (topk, jumprelu):
      for dtype in DTYPES:
        c = recipe.get_config('demo')
        c.store.path, c.store.site, c.sae.d_in = str(store), _SITE.value, width
        c.seed, c.train.compute_dtype = seed, dtype
        c.sae.latents, c.train.batch_rows = _LATENTS.value, _BATCH.value
        c.train.rows = _STEPS.value * _BATCH.value
        c.train.eval_rows = c.train.save_rows = c.train.rows
        end = trained(c)
        found.setdefault((recipe.__name__, dtype), []).append(end['eval/fvu'])
        print(json.dumps({
          'recipe': recipe.__name__, 'compute_dtype': dtype, 'seed': seed,
          'fvu': end['eval/fvu'], 'l0': end['eval/l0'],
        }), flush=True)  # fmt: skip
  for name in (topk.__name__, jumprelu.__name__):
    exact, rounded = (found[name, dtype] for dtype in DTYPES)
    less = [b - a for a, b in zip(exact, rounded, strict=True)]
    print(json.dumps({
      'recipe': name, 'steps': _STEPS.value, 'batch': _BATCH.value,
      'latents': _LATENTS.value, 'fvu_float32': statistics.mean(exact),
      'fvu_bfloat16': statistics.mean(rounded),
      'difference': statistics.mean(less), 'differences': less,
      'range_over_seeds': max(exact) - min(exact),
    }))  # fmt: skip


def trained(config) -> dict[str, float]:
  """The last evaluation of a run with this config."""
  with tempfile.TemporaryDirectory(prefix='bf16_') as workdir:
    loop.train(config, workdir)
    lines = (Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  return [x for x in map(json.loads, lines) if 'eval/fvu' in x][-1]


if __name__ == '__main__':
  cli.run(main)
