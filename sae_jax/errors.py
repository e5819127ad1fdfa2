"""The one exception that means: the user can mend this, show one line."""


class UserError(Exception):
  """A mistake in what the user gave us: a path, a shape, a config value.

  The message is one line that says what is wrong, where, and what to do.
  `sae_jax.cli.run` prints it without a traceback and exits with code 2.
  """
