#!/usr/bin/env bash
# Starts one command on all workers of a slice.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
Usage: run.sh NAME [--env=VARIABLE]... [--wait] [options] -- python -m isheep_jax.COMMAND ...

Starts the command on every worker, detached: it keeps running when this machine sleeps. Each worker writes its own log;
see watch.sh. Refuses while a run is active on the slice.

  --env=VARIABLE         passes the value of this machine, such as --env=HF_TOKEN; it travels in a file that only you
                         can read, is never printed, and is removed from the worker's disk once the command has started
  --env=VARIABLE=VALUE   such as --env=LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=65536
  --wait                 wait for the end and exit with the command's exit code (the first other than 0, by worker)
EOF
}

wait=0 variables=''
environment=$(umask 077 && mktemp)
trap 'rm -f "$environment"' EXIT
while [ $# -gt 0 ]; do
  case $1 in
    --env=?*)
      read_variable "${1#*=}"
      printf '%s=%q\n' "$variable" "$value" >>"$environment"
      variables="$variables $variable"
      ;;
    --wait) wait=1 ;;
    --)
      shift
      break
      ;;
    *) common_option "$1" || unknown_option "$1" ;;
  esac
  shift
done
[ -z "$NAME" ] || check_program "$@"
check_common
set_target

if [ "${3:-}" = isheep_jax.train ] && ! workdir_is_remote "$@"; then
  printf '%s: warning: no --workdir=gs://...: each worker has its own run directory, which goes with the slice\n' \
    "$SCRIPT" >&2
fi

started=$(date -u +%Y%m%dT%H%M%SZ)
read_slice
if [ "$DRY_RUN" = 1 ]; then
  note "no run may be active:"
  on_workers all "$STATUS_COMMAND"
else
  read_run_state
  case $RUN_STATE in
    running) fail "$NAME is running something already; watch.sh $NAME shows it, stop.sh $NAME ends it" ;;
    bare) fail "the package is not on every worker; install.sh $NAME brings it" ;;
    unreachable) fail "not every worker answers${RUN_ERROR:+: $RUN_ERROR}" ;;
  esac
fi

if [ -n "$variables" ]; then
  note "the file holds:$variables; the values are not shown"
  file=$STATE_DIRECTORY/$NAME/$started.environment
  run mkdir -p "$STATE_DIRECTORY/$NAME"
  if [ "$DRY_RUN" = 0 ]; then
    mv "$environment" "$file"
    trap 'rm -f "$file"' EXIT
  fi
  copy_to_workers "$file" || fail "not every worker got the environment variables; nothing was started"
fi

if ! on_workers all "bash isheep_jax/worker.sh start $started -- $(quoted "$@")"; then
  # The other workers would wait for it forever.
  on_workers all 'bash isheep_jax/worker.sh end' >/dev/null 2>&1 || true
  fail "at least one worker did not start; see the lines above. The others were ended"
fi
[ "$DRY_RUN" = 1 ] || say "$NAME: started on $WORKERS workers: $*"

if [ "$wait" = 0 ]; then
  [ "$DRY_RUN" = 1 ] || say "watch.sh $NAME shows its log, stop.sh $NAME ends it"
  exit 0
fi
if [ "$DRY_RUN" = 1 ]; then
  note "every $POLL_SECONDS seconds, until every worker has ended:"
  on_workers all "$STATUS_COMMAND"
  exit 0
fi
lost=0
while :; do
  read_run_state
  case $RUN_STATE in
    running) lost=0 ;;
    finished)
      say "$NAME: finished"
      exit 0
      ;;
    failed)
      printf '%s\n' "$STATUS" >&2
      on_workers all 'bash isheep_jax/worker.sh end' >/dev/null 2>&1 || true
      printf '%s: the command ended with exit code %s; watch.sh %s --worker=all --once shows the logs\n' \
        "$SCRIPT" "$EXIT_CODE" "$NAME" >&2
      exit "$EXIT_CODE"
      ;;
    stopped) fail "$NAME: stopped by stop.sh" ;;
    *)
      lost=$((lost + 1))
      [ "$lost" -lt 10 ] || fail "$NAME no longer answers; watch.sh $NAME --once shows the slice's state"
      ;;
  esac
  sleep "$POLL_SECONDS"
done
