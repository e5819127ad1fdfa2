"""From flags to one call: what the programs in launch/ share.

Bad input ends with one line on stderr and exit code 2, without a traceback.
"""

import contextlib
import errno
import logging as std_logging
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from sae_jax.compile_cache import use_cache
from sae_jax.errors import UserError

# What a disk or a path of the user's can do to any program.
_USER_ERRNOS = (
  errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS,
  errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
)  # fmt: skip


def run(main: Callable[[], None]) -> None:
  """Parses the flags, calls `main()`, turns user mistakes into one line."""

  def guarded(_: Sequence[str]) -> None:
    try:
      use_cache()
      main()
    except UserError as error:
      stop(error)
    except OSError as error:
      if not (mistake := mistake_of(error)):
        raise
      stop(mistake)

  app.run(guarded, flags_parser=_parse)


def mistake_of(error: BaseException) -> UserError | None:
  """What to say of an error that a disk or a path of the user's gave."""
  if not isinstance(error, OSError) or error.errno not in _USER_ERRNOS:
    return None
  where = error.filename or 'disk'
  return UserError(f'{where}: {error.strerror}: mend that and retry')


def stop(error: BaseException | str) -> None:
  """Ends the program with the documented form of a user's mistake."""
  logging.flush()
  line = ' '.join(str(error).split())
  print(f'error: {line}', file=sys.stderr, flush=True)
  sys.exit(2)


def usage(program: str) -> str:
  """The flags of a program (the name of its module), as they stand in it: those
  that matter first. Those of libraries are hundreds."""
  defined = flags.FLAGS.flags_by_module_dict()
  ours = defined[program] + defined.get('sae_jax.parallel.processes', [])
  lines = [f'--{f.name}={f.default or ""}  {f.help}' for f in ours]
  if 'config' in flags.FLAGS:
    lines.append('--config.KEY=VALUE  any key of it, as in sae_jax/*/config.py')
  return '\n'.join([*lines, '--helpfull  the flags of all libraries, too'])


def _whole(self: flags.IntegerParser, argument: int | str) -> int:
  """Takes 1e6 for an integer: of a flag, and of a key of a config."""
  with contextlib.suppress(ValueError):
    if {'e', '.'} & {*str(argument).lower()} and float(argument).is_integer():
      argument = int(float(argument))
  return _convert(self, argument)


_convert = flags.IntegerParser.convert
flags.IntegerParser.convert = _whole


def _parse(argv: Sequence[str]) -> list[str]:
  """Flag parsing that reports a bad flag or config key in one line."""
  if {'-h', '-help', '--help', '--helpshort'} & set(argv):
    print(f'{sys.modules["__main__"].__doc__}\n{usage(argv[0])}')
    sys.exit(0)
  try:
    rest = flags.FLAGS(list(argv))
    for name in flags.FLAGS:  # a config file that failed to load says so late
      getattr(flags.FLAGS[name].value, 'to_dict', None)
  except (
    flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError,
    OSError,
  ) as error:  # fmt: skip  # config_flags raises all of these for typos
    stop(_readable(error, argv))
    raise AssertionError('unreachable') from error
  if len(rest) > 1:
    stop(f'unknown argument {rest[1]!r}: options are written --name=value')
  logging.get_absl_handler().setFormatter(
    std_logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S')
  )
  logging.set_verbosity(logging.INFO)
  logging.get_absl_logger().addFilter(_ours)
  std_logging.getLogger('jax').setLevel(std_logging.WARNING)
  return rest


def _ours(record: std_logging.LogRecord) -> bool:
  """Orbax logs a dozen lines a save at INFO, through the same logger."""
  return 'orbax' not in record.pathname or record.levelno > std_logging.INFO


def _readable(error: BaseException, argv: Sequence[str]) -> str:
  """The message of an error of flag parsing, without its quoting."""
  text = error.args[0] if error.args else str(error)
  if isinstance(error, OSError):
    text = str(error)
  # ml_collections of a key that is not there: its name, and perhaps a near one.
  bare = re.fullmatch(r'[\'"]*(\w+)[\'"]*', str(text))
  near = re.search(r'Did you mean "(.*)" instead of "(.*)"\?', str(text))
  if bare or near:
    key = near[2] if near else bare and bare[1]
    given = (a.partition('=')[0] for a in argv)
    flag = next((a for a in given if a.endswith(f'.{key}')), key)
    text = f'{flag}: the config has no such key'
    text += f', did you mean {near[1]}?' if near else ''
  return re.sub(r'\s+', ' ', str(text)).strip()
