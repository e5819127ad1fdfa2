"""What a compiled step sends, added up from its text: no more than written."""

import jax
import jax.numpy as jnp
import pytest

from sae_jax.parallel.collectives import summary
from sae_jax.parallel.mesh import DATA, DICT, P, make_mesh
from sae_jax.train import state, step
from sae_jax.train.config import base_config

B, D, F, K, AUX_K = 256, 16, 1024, 4, 8
SCALARS = 16  # all-reduced, a micro-batch
VECTORS = 3  # of D elements, a micro-batch: biases of the decoder
# Of BatchTopK, a micro-batch: 32 rounds and those for ties, in two sums; of its
# list of candidates as many in one.
COUNTS = 3 * 64


def _sent(config, data, dict_):
  """{(axes, kind): elements of one device} of one step."""
  mesh = make_mesh(data, dict_)
  config.mesh.data, config.mesh.dict = data, dict_
  with jax.set_mesh(mesh):
    rows = jax.NamedSharding(mesh, P(DATA, None))
    x = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=rows)
    lowered = step.make_step(config).lower(state.abstract_state(config), x)
  text = lowered.compile().as_text()
  return {key: n for key, (_, n, _) in summary(text, mesh).items()}


def _config(name, parts, zero1):
  c = base_config()
  c.sae.d_in, c.sae.latents, c.train.batch_rows = D, F, B
  c.act.name, c.act.k, c.loss.aux_k = name, K, AUX_K
  c.train.micro_batches, c.mesh.zero1 = parts, zero1
  return c


@pytest.mark.parametrize(
  'shape, zero1, parts',
  [
    ((2, 4), False, 4), ((2, 4), True, 1), ((8, 1), True, 4),
    ((1, 8), False, 1), ((1, 8), False, 4),
  ],
)  # fmt: skip
@pytest.mark.parametrize('name', ['jumprelu', 'topk', 'batchtopk'])
def test_a_step_sends_what_is_written_and_nothing_else(
  shape, name, parts, zero1
):
  data, dict_ = shape
  sent = _sent(_config(name, parts, zero1), data, dict_)
  rows, latents = B // data, F // dict_
  counts = COUNTS if name == 'batchtopk' else 0
  small = parts * (VECTORS * D + SCALARS + counts)
  matrices = 2 * latents * D
  expected = {}
  if dict_ > 1:
    # One all-reduce of the reconstructions (two with AuxK); L0 of each row.
    made = (1 if name == 'jumprelu' else 2) * rows * D
    expected[DICT, 'all-reduce'] = (made, made + rows + small)
    if name != 'jumprelu':  # values and indices of the candidates
      offered = 2 * rows * dict_ * (AUX_K + (K if name == 'topk' else 0))
      # BatchTopK's dense rule, after a search in vain, offers AuxK's again.
      most = offered if name == 'topk' else 2 * offered
      expected[DICT, 'all-gather'] = (offered, most)
  if data > 1:
    # Gradients once whatever the parts; 3 F more for biases, thresholds and
    # who fired.
    if zero1:
      expected[DATA, 'reduce-scatter'] = (matrices, matrices + 2 * latents)
      expected[DATA, 'all-gather'] = (matrices, matrices + 2 * latents)
      expected[DATA, 'all-reduce'] = (latents, latents + small)
    else:
      most = matrices + 3 * latents + small
      expected[DATA, 'all-reduce'] = (matrices + latents, most)
  if data > 1 and dict_ > 1:  # norms and counts, in one or in two sums
    expected[f'{DATA}+{DICT}', 'all-reduce'] = (
      0,
      SCALARS + parts * counts,
    )
    sent.setdefault((f'{DATA}+{DICT}', 'all-reduce'), 0)
  assert sent.keys() == expected.keys()
  for key, (least, most) in expected.items():
    assert least <= sent[key] <= most, (key, sent[key])


def test_reconstructions_do_not_depend_on_the_size_of_the_dictionary():
  """More devices, each with its part: what one sends over dict is constant."""
  config = _config('jumprelu', 1, False)
  sent = {n: _sent(config, 1, n)[DICT, 'all-reduce'] for n in (2, 4, 8)}
  assert len(set(sent.values())) == 1
