"""What the quickstart does in --minutes on faster and slower machines."""

import pytest
from programs import program

BOTH = ['jumprelu', 'topk']


@pytest.mark.parametrize(
  'float32, bfloat16, rows, latents',
  [
    (1900, 5700, 500_000, 4096),  # AMX: all of it fits
    (2000, 1200, 458_677, 4096),
    (900, 600, 234_683, 1024),
    (300, 200, 50_000, 1024),  # the least, and longer
  ],
)
def test_rows_and_latents_fit_into_the_minutes(
  float32, bfloat16, rows, latents
):
  speed = {'float32': float32, 'bfloat16': bfloat16}
  dtype = 'bfloat16' if bfloat16 > float32 else 'float32'
  with program('scripts/quickstart.py') as quickstart:
    changes, seconds = quickstart.fitting(dtype, speed, 10, BOTH)
    whole, longer = quickstart.fitting(dtype, speed, 0, BOTH)
  harvest, train = changes['harvest'], changes['train']
  assert harvest['harvest.rows'] == rows
  assert harvest['harvest.compute_dtype'] == dtype
  assert train['sae.latents'] == latents
  assert train['train.rows'] == pytest.approx(1.2 * rows, abs=2)
  assert seconds <= 600.1 or rows == 50_000
  assert harvest.get('store.rows_per_shard', 2**16) <= rows // 3
  assert whole['harvest']['harvest.rows'] == 500_000 and longer >= seconds
