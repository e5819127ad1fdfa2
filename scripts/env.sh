# Sourced by the other scripts: makes or finds the Python environment.
#
# use_env EXTRA installs this checkout with that extra, into the active
# virtual environment if there is one, else into .venv beside this folder.
# $PYTHON is afterwards the interpreter to use. The installation is repeated
# only when setup.py has changed since, or another checkout was installed there.

use_env() {
  local extra=$1 base=${PYTHON:-python3} folder key stamp
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    folder=$VIRTUAL_ENV
  elif [ -n "${CONDA_PREFIX:-}" ]; then
    folder=$CONDA_PREFIX
  else
    folder=$ROOT/${SAE_JAX_VENV:-.venv}
    if [ ! -x "$folder/bin/python" ]; then
      "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $base is older than Python 3.11: set PYTHON" >&2
        exit 2
      }
      echo "making the environment $folder"
      "$base" -m venv "$folder"
    fi
  fi
  PYTHON=$folder/bin/python
  key=$({ echo "$ROOT"; cat "$ROOT/setup.py"; } | cksum | tr ' ' -)
  stamp=$folder/.sae_jax-$key-$extra
  if [ ! -e "$stamp" ]; then
    echo "installing sae_jax[$extra] into $folder"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check \
      -e "$ROOT[$extra]" || {
      echo "error: pip could not install sae_jax[$extra]: see above" >&2
      exit 2
    }
    # Whatever was installed from elsewhere, or before, is no longer.
    find "$folder" -maxdepth 1 -name '.sae_jax-*' ! -name ".sae_jax-$key-*" \
      -delete
    touch "$stamp"
  fi
  export PYTHON
}
