#!/usr/bin/env bash
# Runs on a worker. install.sh copies this file to every worker; the other scripts call it over ssh.
#
#   worker.sh install PYTHON LABEL      a virtual environment with the package and its [tpu] extra
#   worker.sh check                     versions and devices, as one line
#   worker.sh start RUN -- COMMAND...   detached, with a log
#   worker.sh status                    one line: worker, state, run, exit code, seconds, command
#   worker.sh stop                      ends the processes of the run and records that the user stopped it
#   worker.sh end                       ends them without that record
#   worker.sh log LINES [follow|once] [plain|prefix]
#
# All files are in isheep_jax/ in the home directory: source/, venv/, runs/RUN/{command,log.txt,pid,exit_code}, and
# current, the newest run.
set -euo pipefail

ROOT=$HOME/isheep_jax

# JAX also takes its process number from the metadata server.
worker_number() {
  local number
  number=$(curl --silent --fail --max-time 5 -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || true)
  [[ $number =~ ^[0-9]+$ ]] || number=${HOSTNAME##*-w-}
  [[ $number =~ ^[0-9]+$ ]] || number=0
  printf '%s' "$number"
}
WORKER=${ISHEEP_WORKER:-$(worker_number)}

explain() { printf 'worker %s: %s\n' "$WORKER" "$*" >&2; }

# The process id alone could belong to another process by now.
is_running() {
  local run pid
  run=$(basename "$(readlink "$ROOT/current" || true)")
  pid=$(cat "$ROOT/current/pid" 2>/dev/null) || return 1
  grep -qaF "$run" "/proc/$pid/cmdline" 2>/dev/null
}

install() {
  local python=$1 label=$2
  if is_running; then
    explain "a run is going on; stop.sh ends it"
    exit 3
  fi
  cd "$ROOT"
  rm -rf source
  mkdir source
  tar -xzf source.tar.gz -C source
  export PATH=$HOME/.local/bin:$PATH
  # The runtime images come with Python 3.10; uv brings the version that the package needs.
  command -v uv >/dev/null || python3 -m pip install --user --quiet uv
  uv venv --quiet --clear --python "$python" venv
  uv pip install --quiet --python venv/bin/python './source[tpu]'
  printf '%s\n' "$label" >venv/source_label
  explain "installed $label"
}

check() {
  # All workers run this at the same time, so that JAX counts the devices of the whole slice.
  cd "$ROOT"
  timeout "${ISHEEP_CHECK_SECONDS:-600}" venv/bin/python - "$WORKER" "$(cat venv/source_label)" <<'PYTHON'
import importlib.metadata
import platform
import sys

import jax

worker, source = sys.argv[1:]
jax.distributed.initialize()


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


print(
    f"worker={worker} isheep_jax={version('isheep_jax')} source={source} python={platform.python_version()}"
    f" jax={jax.__version__} libtpu={version('libtpu')} platform={jax.default_backend()}"
    f" devices={jax.device_count()} processes={jax.process_count()}",
    flush=True,
)
PYTHON
}

start() {
  local run=$1
  shift 2
  if is_running; then
    rm -f "$ROOT/$run.environment"
    explain "$(basename "$(readlink "$ROOT/current")") is running already; stop.sh ends it"
    exit 3
  fi
  [ -x "$ROOT/venv/bin/python" ] || {
    rm -f "$ROOT/$run.environment"
    explain "the package is not installed; install.sh does that"
    exit 4
  }
  mkdir -p "$ROOT/runs/$run"
  printf '%q ' "$@" >"$ROOT/runs/$run/command"
  ln -sfn "runs/$run" "$ROOT/current"
  date +%s >"$ROOT/current/started"
  # A new session survives the end of the ssh session, and its process group can be ended at once.
  setsid nohup bash "$0" execute "$run" "$@" </dev/null >>"$ROOT/current/log.txt" 2>&1 &
  echo $! >"$ROOT/current/pid"
  explain "started $run"
}

# Runs in the process that start leaves behind; never called over ssh.
execute() {
  local run=$1 code=0
  shift
  # The exit code is written even when the whole process group is asked to exit.
  trap : TERM INT HUP
  cd "$ROOT"
  if [ -f "$run.environment" ]; then
    set -a
    # shellcheck disable=SC1090
    . "./$run.environment"
    set +a
    # Secrets must not stay on the disk.
    rm -f "$run.environment"
  fi
  export PATH=$ROOT/venv/bin:$PATH PYTHONUNBUFFERED=1
  "$@" || code=$?
  echo "$code" >"runs/$run/exit_code.tmp"
  date +%s >"runs/$run/ended"
  mv "runs/$run/exit_code.tmp" "runs/$run/exit_code"
}

status() {
  local state=none run=- code=- seconds=0 end command=
  if [ -e "$ROOT/current" ]; then
    run=$(basename "$(readlink "$ROOT/current")")
    command=$(cat "$ROOT/current/command")
    end=$(date +%s)
    if [ -f "$ROOT/current/stopped" ] && ! is_running; then
      state=stopped
    elif [ -f "$ROOT/current/exit_code" ]; then
      code=$(cat "$ROOT/current/exit_code")
      end=$(cat "$ROOT/current/ended")
      if [ "$code" = 0 ]; then state=finished; else state=failed; fi
    elif is_running; then
      state=running
    else
      # Neither exit code nor process: out of memory, or the machine restarted.
      state=killed code=137
    fi
    seconds=$((end - $(cat "$ROOT/current/started")))
  fi
  printf 'worker=%s state=%s run=%s code=%s seconds=%s command=%s\n' \
    "$WORKER" "$state" "$run" "$code" "$seconds" "$command"
}

stop() {
  is_running && touch "$ROOT/current/stopped"
  end
}

end() {
  local pid waited=0
  if ! is_running; then
    explain "nothing is running"
    return 0
  fi
  pid=$(cat "$ROOT/current/pid")
  kill -TERM -- "-$pid" 2>/dev/null || true
  while is_running && [ "$waited" -lt "${ISHEEP_STOP_SECONDS:-60}" ]; do
    sleep 1
    waited=$((waited + 1))
  done
  kill -KILL -- "-$pid" 2>/dev/null || true
  explain "ended"
}

# Prints the end of the log and optionally follows it.
log() {
  local lines=$1 follow=${2:-once} prefix=${3:-plain} options=()
  [ -f "$ROOT/current/log.txt" ] || {
    explain "nothing was started"
    return 0
  }
  [ "$follow" = once ] || options=(--follow=name --retry)
  if [ "$prefix" = plain ]; then
    exec tail -n "$lines" "${options[@]}" "$ROOT/current/log.txt"
  fi
  tail -n "$lines" "${options[@]}" "$ROOT/current/log.txt" | sed -u "s/^/worker $WORKER: /"
}

main() {
  case ${1:-} in
    install) install "$2" "$3" ;;
    check) check ;;
    start) start "${@:2}" ;;
    execute) execute "${@:2}" ;;
    status) status ;;
    stop) stop ;;
    end) end ;;
    log) log "${@:2}" ;;
    *)
      explain "worker.sh: no command '${1:-}'"
      exit 2
      ;;
  esac
}

# On one line with exit, because install.sh may replace this file while execute is still running.
main "$@"; exit
