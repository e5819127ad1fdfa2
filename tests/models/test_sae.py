"""The SAE's units, folding and pre-bias against the plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.models import sae as saes
from sae_jax.models.activations import BatchTopK, TopK, jump_relu
from sae_jax.models.sae import Norm
from sae_jax.parallel.mesh import DICT, make_mesh, spec

pytestmark = pytest.mark.smoke

D, F, B = 16, 32, 8


def _sae(act='jumprelu', *, pre_bias=True, log=False):
  """An SAE with nothing left at zero, and rows; under the mesh in force."""
  rng = np.random.default_rng(3)
  theta = jnp.full(F, 0.1, out_sharding=spec(DICT))
  if act == 'jumprelu':
    act = jump_relu(theta, 0.1, log=log)
  else:
    act = TopK(5) if act == 'topk' else BatchTopK(jnp.float32(0.4), 5)
  mean = jnp.array(rng.normal(size=D), jnp.float32)
  s = saes.init(
    jax.random.key(0),
    latents=F,
    act=act,
    norm_in=Norm(mean, jnp.float32(3.0)),
    pre_bias=pre_bias,
  )
  s = s.replace(
    W_enc=s.W_enc * 1.5,
    b_enc=s.b_enc + 0.03,
    b_dec=jnp.array(rng.normal(size=D) * 0.1, jnp.float32),
  )
  x = rng.normal(size=(B, D)).astype(np.float32) * 2 + np.asarray(mean)
  return s, jax.device_put(x, spec('data', None))


def _numpy(s, x):
  """The definition in plain numpy: (f, x_hat) in raw units."""
  a = jax.tree.map(lambda v: np.asarray(v, np.float64), s)
  n = (np.asarray(x, np.float64) - a.norm_in.mean) / a.norm_in.scale
  z = (n - a.b_dec * s.pre_bias) @ a.W_enc.T + a.b_enc
  if isinstance(s.act, TopK):
    kth = np.sort(z, -1)[:, -s.act.k][:, None]
    f = np.where(z >= kth, np.maximum(z, 0), 0)
  else:
    f = z * (z > np.asarray(s.act.theta))
  x_hat = (f @ a.W_dec + a.b_dec) * a.norm_in.scale + a.norm_in.mean
  return f * a.norm_in.scale, x_hat


def test_other_arrays_than_jax_ones():
  torch = pytest.importorskip('torch')
  s, x = _sae()
  x = np.asarray(x)
  f = s.encode(jnp.array(x))
  x_hat = s.decode(f)
  for of in (
    np.asarray, np.float64, np.ndarray.tolist, torch.tensor,
    lambda a: torch.tensor(a, requires_grad=True),
    lambda a: torch.tensor(a.T.copy()).double().T,
  ):  # fmt: skip
    for found, expected in (
      (s.encode(of(x)), f),
      (s.decode(of(np.asarray(f))), x_hat),
    ):
      assert isinstance(found, jax.Array) and found.dtype == jnp.float32
      np.testing.assert_array_equal(found, expected)
  half = torch.tensor(x).bfloat16()  # which numpy does not know
  np.testing.assert_array_equal(s.encode(half), s.encode(half.float()))


@pytest.mark.parametrize('act', ['jumprelu', 'topk', 'batchtopk'])
@pytest.mark.parametrize('pre_bias', [True, False])
def test_encode_and_decode_are_the_definition(mesh, act, pre_bias):
  s, x = _sae(act, pre_bias=pre_bias)
  f = s.encode(x)
  f_numpy, x_hat = _numpy(s, x)
  assert 0 < np.count_nonzero(f) < f.size / 2
  np.testing.assert_allclose(f, f_numpy, atol=2e-5)
  np.testing.assert_allclose(s.decode(f), x_hat, atol=2e-5)


@pytest.mark.parametrize('act', ['jumprelu', 'topk', 'batchtopk'])
@pytest.mark.parametrize('log', [True, False])
def test_folding_changes_nothing_a_user_can_see(mesh, act, log):
  s, x = _sae(act, log=log)
  folded = s.fold()
  assert not folded.pre_bias and folded.norm_in.scale == 1
  f = s.encode(x)
  np.testing.assert_allclose(folded.encode(x), f, atol=2e-5)
  np.testing.assert_allclose(folded.decode(f), s.decode(f), atol=2e-5)
  again = folded.fold()
  np.testing.assert_allclose(again.encode(x), f, atol=2e-5)


def test_folding_with_another_output_norm():
  s, x = _sae()
  s = s.replace(norm_out=Norm(jnp.ones(D), jnp.float32(7.0)))
  f = s.encode(x)
  np.testing.assert_allclose(s.fold().decode(f), s.decode(f), atol=5e-5)


def test_encoder_norm_scales_the_first_rows_of_the_encoder():
  norm = Norm(jnp.zeros(8), jnp.ones(()))
  s = saes.init(
    jax.random.key(0), latents=16, act=TopK(2), norm_in=norm,
    encoder_norm=0.45,
  )  # fmt: skip
  np.testing.assert_allclose(s.W_enc, 0.45 * s.W_dec, rtol=1e-6)
  np.testing.assert_allclose(jnp.linalg.norm(s.W_dec, axis=1), 1, rtol=1e-6)


def test_init_is_tied_unit_norm_and_the_same_on_every_mesh(mesh):
  make = lambda: saes.init(
    jax.random.key(1),
    latents=F,
    act=TopK(4),
    norm_in=saes.identity_norm(D),
  )
  s = jax.jit(make)()
  np.testing.assert_allclose(jnp.linalg.norm(s.W_dec, axis=1), 1, rtol=1e-6)
  np.testing.assert_array_equal(s.W_enc, s.W_dec)
  with jax.set_mesh(make_mesh(1, 1)):
    one = jax.jit(make)()
  np.testing.assert_allclose(s.W_dec, np.asarray(one.W_dec), rtol=1e-6)
  rows = [shard.data.shape[0] for shard in s.W_dec.addressable_shards]
  assert rows == [F // mesh.shape['dict']] * mesh.size


def test_bfloat16_rows_and_leading_dimensions():
  s, x = _sae()
  f = s.encode(x.astype(jnp.bfloat16).reshape(2, 4, D))
  assert f.dtype == jnp.float32 and f.shape == (2, 4, F)
  assert s.decode(f).shape == (2, 4, D)
