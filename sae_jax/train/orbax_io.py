"""The only file that calls Orbax: arrays and a record, to and from a folder.

Leaves lie in it under their names (integrity.named), as one flat dict.
"""

import dataclasses
import functools
import logging as std_logging
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import future

from sae_jax.train import integrity

# Bytes that are read and written as one: a reader on another mesh takes little
# more than its own rows, and nobody holds a whole array in host memory.
_PIECE = 2**25
# Seconds that a write may take. A process that is gone is noticed otherwise.
_DAY = 24 * 3600


def make_manager(
  folder: Path, keep: int, keep_every: int, written: Callable[[], None]
) -> ocp.CheckpointManager:
  """Keeps the newest `keep` checkpoints and those of every `keep_every`th
  step; calls `written` from a thread when all bytes of one are on disk."""
  _hush()
  policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep)]
  if keep_every:
    every = ocp.checkpoint_managers.EveryNSteps(keep_every)
    policies.append(every)
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  registry.add('state', ocp.args.PyTreeSave, _array_handler())
  registry.add('meta', _RecordSave, _RecordHandler())
  return ocp.CheckpointManager(
    folder,
    handler_registry=registry,
    options=ocp.CheckpointManagerOptions(
      cleanup_tmp_directories=True,  # of killed runs: the folder is locked
      single_host_load_and_broadcast=True,  # network disks: one view for all
      preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(
        policies
      ),
      async_options=ocp.options.AsyncOptions(
        timeout_secs=_DAY,
        barrier_sync_fn=_barrier,
        post_finalization_callback=written,
      ),
      # Several members save at once, and the processes' threads need not come
      # to the members' barriers in the same order.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        barrier_sync_key_prefix=folder.parent.name
      ),
    ),
  )


def start_save(
  manager: ocp.CheckpointManager,
  step: int,
  leaves: dict[str, jax.Array],
  record: dict[str, Any],
) -> None:
  """Returns when the leaves may be donated. Their sums, in the order of their
  sorted names, become a part of the record once they are there."""
  pieces = {name: ocp.SaveArgs(chunk_byte_size=_PIECE) for name in leaves}
  sums: Future[jax.Array] = Future()
  try:
    manager.save(
      step,
      args=ocp.args.Composite(
        meta=_RecordSave(record, sorted(leaves), sums),
        state=ocp.args.PyTreeSave(leaves, pieces),
      ),
      force=True,
    )
  finally:
    # Started before the donation, but after the save: on CPU they would take
    # the cores from what the loop is waiting for.
    try:
      sums.set_result(integrity.sums(leaves))
    except BaseException as error:  # whoever waits for them must hear of it
      sums.set_exception(error)
      raise


def _barrier(*, key: str, timeout_ms: int) -> None:
  """Waits for the other processes, unless this one's save has failed: Orbax
  calls it on the way out, and there the others may never come."""
  if sys.exc_info()[1] is None:
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def is_finished(path: Path) -> bool:
  """Whether a checkpoint was written to its end."""
  return ocp.utils.is_checkpoint_finalized(path)


def read(path: Path, abstract: dict[str, Any]) -> dict[str, jax.Array]:
  """The leaves, each process reading only its shards. Waits for no other
  process, so that each may fail alone."""
  _hush()
  handler = _array_handler()
  where: Any = path  # Orbax asks for a class of its own
  try:
    out = handler.restore(
      where,
      args=ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
      ),
    )
  finally:
    handler.close()
  leaves = {name: out[name] for name in abstract}
  for name, x in leaves.items():
    a = abstract[name]  # which is what comes back for what is not there
    if not isinstance(x, jax.Array) or (x.shape, x.dtype) != (a.shape, a.dtype):
      raise ValueError(f'{name} is missing')
  return leaves


@functools.cache
def _hush() -> None:
  """Leaves one line of an error: the one that is raised. Orbax also logs it
  several times with tracebacks, and once a read or write has failed, the others
  of the same checkpoint print theirs from threads of tensorstore."""
  hook = sys.unraisablehook

  def others(unraisable: Any) -> None:
    if str(unraisable.exc_value) != 'Event loop is closed':
      hook(unraisable)

  sys.unraisablehook = others
  std_logging.getLogger('asyncio').addFilter(
    lambda record: not re.search('orbax|tensorstore', record.getMessage())
  )
  logging.get_absl_logger().addFilter(
    lambda record: 'orbax' not in record.pathname or not record.exc_info
  )


def _array_handler() -> ocp.PyTreeCheckpointHandler:
  """Arrays alone. Several processes share the writing of what they all have;
  in one, slicing it would only compile (20 ms a device and shape)."""
  arrays = ocp.type_handlers.ArrayHandler(
    use_replica_parallel=jax.process_count() > 1,
    enable_write_sharding_file=False,  # the reader says where arrays go
  )
  return ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, arrays)
    )
  )


class _RecordHandler(ocp.AsyncCheckpointHandler):
  """Writes the record when its sums are there: after the loop has gone on."""

  async def async_save(self, directory: Any, args: '_RecordSave') -> list:
    return [
      future.CommitFutureAwaitingContractedSignals(
        self._write(directory, args), name='record'
      )
    ]

  async def _write(self, directory: Any, args: '_RecordSave') -> None:
    found = np.asarray(jax.device_get(args.sums.result())).tolist()
    sums = dict(zip(args.names, found, strict=True))
    if jax.process_index() == 0:
      text = integrity.seal(args.record | {'sums': sums})
      (directory / 'record.json').write_text(text)

  def save(self, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError('saves are asynchronous')

  def restore(self, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError('read_meta reads')


@ocp.args.register_with_handler(_RecordHandler, for_save=True)
@dataclasses.dataclass
class _RecordSave(ocp.args.CheckpointArgs):
  record: dict[str, Any]
  names: list[str]
  sums: Future[jax.Array]  # [len(names)] uint32
