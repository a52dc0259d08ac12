#!/usr/bin/env bash
# Shows the state of a slice and its run, and follows the log.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
Usage: watch.sh NAME [--worker=K | --worker=all] [--lines=N] [--once] [--fetch=DIRECTORY] [options]

Shows the state of the slice and of each worker's process, then follows the log. Ctrl-C does not stop the run.

  --worker=K         worker of the log; default: 0, which writes the results. 'all': every log, lines with their worker
  --lines=N          number of last lines to begin with; default: 20
  --once             do not follow
  --fetch=DIRECTORY  copy every worker's log to DIRECTORY/worker_K.txt instead of showing it
EOF
}

worker=0 lines=20 follow=follow directory=
while [ $# -gt 0 ]; do
  case $1 in
    --worker=?*) worker=${1#*=} ;;
    --lines=?*) lines=${1#*=} ;;
    --once) follow=once ;;
    --fetch=?*) directory=${1#*=} ;;
    *) common_option "$1" || unknown_option "$1" ;;
  esac
  shift
done
[[ $worker =~ ^([0-9]+|all)$ ]] || die "--worker=$worker: a number, or all"
[[ $lines =~ ^[0-9]+$ ]] || die "--lines=$lines: a number"
check_common
set_target

if [ "$DRY_RUN" = 1 ]; then
  queued describe '--format=value(state.state)'
  node describe '--format=value(state)'
else
  read_queued_state
  [ "$QUEUED_STATE" != UNKNOWN ] || fail "gcloud does not answer: ${QUEUED_ERROR:-no state}"
  read_node_state
  say "$NAME: request $QUEUED_STATE, machines $NODE_STATE"
  [ "$NODE_STATE" = READY ] || exit 1
fi
read_slice
if [ "$DRY_RUN" = 1 ]; then
  on_workers all "$STATUS_COMMAND"
else
  read_run_state
  [ -z "$STATUS" ] || printf '%s\n' "$STATUS"
  case $RUN_STATE in
    bare) fail "the package is not on every worker; install.sh $NAME brings it" ;;
    unreachable) fail "not every worker answers${RUN_ERROR:+: $RUN_ERROR}" ;;
  esac
fi
if [ -n "$directory" ]; then
  run mkdir -p "$directory"
  if [ "$DRY_RUN" = 1 ]; then
    note "for K = 0 to $WORKERS - 1:"
    last=0
  else
    last=$((WORKERS - 1))
  fi
  for ((k = 0; k <= last; k++)); do
    run "${TPU_VM[@]}" scp "$NAME:isheep_jax/current/log.txt" "$directory/worker_$k.txt" \
      ${TARGET[@]+"${TARGET[@]}"} ${REACH[@]+"${REACH[@]}"} "--worker=$k" --quiet || fail "no log from worker $k"
  done
  [ "$DRY_RUN" = 1 ] || say "logs are in $directory"
  exit 0
fi
prefix=plain
[ "$worker" != all ] || prefix=prefix
on_workers "$worker" "bash isheep_jax/worker.sh log $lines $follow $prefix"
