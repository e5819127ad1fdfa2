"""launch/tpu/slice.sh against a stand-in for gcloud with two local `hosts`.

It shows what the script decides and how it quotes, not that Google agrees.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# $FAKE/state: of the queued resource. $FAKE/plan: a line for each run, the exit
# codes of both hosts, or `preempted`.
GCLOUD = r"""#!/bin/bash
cd "$FAKE"
echo "$3 $4" >> calls
case "$3 $4" in
  'queued-resources describe') [ -e state ] && cat state ;;
  'queued-resources create') echo ACTIVE > state ;;
  'queued-resources delete') rm state ;;
  'tpu-vm ssh')
    for word; do
      case $word in --command=*launch/train.py*) run=${word#--command=} ;; esac
    done
    [ -n "$run" ] || exit 0
    read -r first second < plan
    sed -i 1d plan
    if [ "$first" = preempted ]; then echo SUSPENDED > state; exit 255; fi
    for host in 0 1; do
      code=$first; [ $host = 0 ] || code=$second
      mkdir -p host$host/sae_jax/.venv/bin
      (
        cd host$host
        printf '#!/bin/bash\nprintf "%%s\\n" "$@" > "$FAKE/args"\nexit %s\n' \
          $code > sae_jax/.venv/bin/python
        chmod +x sae_jax/.venv/bin/python
        bash -c "$run"
      )
    done ;;
esac
"""


def keep(folder, *plan, flags=()):
  (folder / 'gcloud').write_text(GCLOUD)
  (folder / 'gcloud').chmod(0o755)
  (folder / 'plan').write_text('\n'.join(plan) + '\n')
  env = os.environ | {
    'PATH': f'{folder}:{os.environ["PATH"]}', 'FAKE': str(folder),
    'NAME': 'a', 'ZONE': 'z', 'TYPE': 'v5p-16', 'RUNTIME': 'r', 'PAUSE': '0',
    'RESTARTS': '5',
  }  # fmt: skip
  done = subprocess.run(
    ['bash', 'launch/tpu/slice.sh', 'keep', *flags],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    timeout=60,
  )
  calls = (folder / 'calls').read_text().splitlines()
  return done, calls, (folder / 'plan').read_text().strip()


def test_goes_on_after_preemption_and_lost_processes(tmp_path):
  flags = ('--workdir=/runs/a b', "--config.x='y'")
  done, calls, left = keep(
    tmp_path, '75 137', '143 143', 'preempted', '0 0', 'unused', flags=flags
  )
  assert done.returncode == 0 and left == 'unused', done.stderr
  # A preempted resource does not come back: it is asked for, filled again.
  assert calls.count('queued-resources create') == 2
  assert calls.count('queued-resources delete') == 1
  assert calls.count('tpu-vm scp') == 2
  args = (tmp_path / 'args').read_text().splitlines()
  assert args == ['launch/train.py', '--coordinator=auto', *flags]


@pytest.mark.parametrize(
  'plan, code', [('75 2', 2), ('2 1', 2), ('1 75', 1), ('134 1', 1), ('0 0', 0)]
)
def test_ends_with_a_mistake(tmp_path, plan, code):
  done, _, left = keep(tmp_path, plan, 'unused')
  assert done.returncode == code and left == 'unused', done.stdout


def test_gives_up(tmp_path):
  done, calls, _ = keep(tmp_path, *['143 143'] * 9)
  assert done.returncode == 75 and 'given up after 5' in done.stderr
  assert calls.count('queued-resources create') == 1
