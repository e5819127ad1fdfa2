"""Evaluates a training run and writes its report.

python launch/evaluate.py --workdir=runs/a
Leaves evaluation.json and report.html in the folder of the run, or in --out.
"""

from absl import flags

from sae_jax import cli
from sae_jax.errors import UserError
from sae_jax.evaluate import figures
from sae_jax.evaluate.job import evaluate
from sae_jax.lm.subject import load_subject

_WORKDIR = flags.DEFINE_multi_string(
  'workdir', None, 'Folder of the run; several times for several.',
  required=True,
)  # fmt: skip
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
_OUT = flags.DEFINE_string(
  'out', '', 'Folder for the two files, where that of the run is read-only.'
)


def main() -> None:
  if _OUT.value and len(_WORKDIR.value) > 1:
    raise UserError('--out: for one --workdir only')
  # The language model is read once for all of them.
  load = None if len(_WORKDIR.value) < 2 else kept(load_subject)
  for workdir in _WORKDIR.value:
    result = evaluate(
      workdir,
      rows=_ROWS.value,
      sequences=_SEQUENCES.value,
      contexts=_CONTEXTS.value,
      language_model=_LM.value,
      model_path=_MODEL_PATH.value,
      store_path=_STORE_PATH.value,
      load=load,
      out=_OUT.value,
    )
    print(figures.text_table(result['figures']))
    print(f'\nreport: {_OUT.value or workdir}/report.html')


def kept(load):
  """The same function, which remembers what it gave for a config."""
  found = {}

  def remembered(model):
    key = model.to_json()
    if key not in found:
      found[key] = load(model)
    return found[key]

  return remembered


if __name__ == '__main__':
  cli.run(main)
