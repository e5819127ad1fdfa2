"""Several processes as one job: the only place that calls jax.distributed."""

import jax

from sae_jax.errors import UserError

# Processes have unequal shares of the work: at its end one waits for the others
# as long as they live. (JAX's default, 300 s, would then abort them all.)
_FOREVER = 1_000_000


def start_processes(coordinator: str, processes: int, process_id: int) -> None:
  """Joins this process to its job, before any device is asked for.

  coordinator: host:port of process 0; 'auto' takes all three from the cluster
  (Slurm, GKE, TPU slices); '' means that this process is alone.

  Raises UserError for numbers that do not fit together, and when the others
  do not come.
  """
  if not coordinator:
    if processes != 1:
      raise UserError(
        f'--processes={processes}: give --coordinator=HOST:PORT of process 0 '
        'too'
      )
    return
  if not 0 <= process_id < processes:
    raise UserError(
      f'--process_id={process_id}: must be below --processes={processes}'
    )
  try:
    if coordinator == 'auto':
      jax.distributed.initialize(shutdown_timeout_seconds=_FOREVER)
    else:
      jax.distributed.initialize(
        coordinator, processes, process_id, shutdown_timeout_seconds=_FOREVER
      )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f'--coordinator={coordinator}: the processes of this job did not find '
      f'each other ({error}): is process 0 running there?'
    ) from error
