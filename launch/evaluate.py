"""Evaluates a training run and writes its report.

python launch/evaluate.py --workdir=runs/a
Leaves evaluation.json and report.html in the folder of the run.
"""

from absl import flags

from sae_jax import cli
from sae_jax.evaluate import figures
from sae_jax.evaluate.job import evaluate

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run.', required=True
)
_ROWS = flags.DEFINE_integer('rows', 65_536, 'Held-out rows at most.')
_SEQUENCES = flags.DEFINE_integer(
  'sequences', 64, 'Held-out sequences for the language model at most.'
)
_CONTEXTS = flags.DEFINE_integer('contexts', 20, 'Features in the report.')
_LM = flags.DEFINE_bool('lm', True, 'Whether to run the language model.')
_MODEL_PATH = flags.DEFINE_string(
  'model_path', '', "The language model's file, if it has moved."
)
_STORE_PATH = flags.DEFINE_string(
  'store_path', '', "The store's folder, if it has moved."
)


def main() -> None:
  result = evaluate(
    _WORKDIR.value,
    rows=_ROWS.value,
    sequences=_SEQUENCES.value,
    contexts=_CONTEXTS.value,
    language_model=_LM.value,
    model_path=_MODEL_PATH.value,
    store_path=_STORE_PATH.value,
  )
  print(figures.text_table(result['figures']))
  print(f'\nreport: {_WORKDIR.value}/report.html')


if __name__ == '__main__':
  cli.run(main)
