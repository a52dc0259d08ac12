#!/usr/bin/env bash
# Keeps one command going on a slice that can be preempted.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
Usage: supervise.sh NAME --type=TYPE [--spot | --reserved] [options] -- python -m isheep_jax.COMMAND ...

Creates the slice where it is not there, installs, runs the command and watches it. When the slice is preempted, fails
or is gone: deletes the request, waits, creates it again, installs and runs the same command, which resumes by itself
from its run directory; that must therefore be in gs://. When only the command fails, it is started again on the same
slice. A run that is going on already is taken over. Let it run in tmux on a machine that stays awake.

  --type, --spot, --reserved, --runtime-version, --create-flags="FLAGS"  as in create.sh (FLAGS: what comes after --)
  --ref, --python           as in install.sh
  --env=VARIABLE            as in run.sh
  --max-preemptions=N       slices that may be lost; default: 50
  --max-failures=N          failures of the command in a row (an hour's run breaks the row); default: 3. Bad use (exit
                            code 2) is never tried again
  --delete                  delete the slice when the command has finished
Exit code: the command's, 1 where it gave up.
EOF
}

create=() install=() start=() place=() create_flags=''
max_preemptions=50 max_failures=3 delete=0 type=
while [ $# -gt 0 ]; do
  case $1 in
    --type=?*)
      type=${1#*=}
      create+=("$1")
      ;;
    --spot | --reserved | --runtime-version=?*) create+=("$1") ;;
    --create-flags=*) create_flags=${1#*=} ;;
    --ref=?* | --python=?*) install+=("$1") ;;
    --env=?*)
      # Said now, and not when the slice is there.
      read_variable "${1#*=}"
      start+=("$1")
      ;;
    --max-preemptions=?*) max_preemptions=${1#*=} ;;
    --max-failures=?*) max_failures=${1#*=} ;;
    --delete) delete=1 ;;
    --project=?* | --zone=?* | --iap)
      common_option "$1"
      place+=("$1")
      ;;
    --)
      shift
      break
      ;;
    *) common_option "$1" || unknown_option "$1" ;;
  esac
  shift
done
[ -n "$type" ] || [ -z "$NAME" ] || die "which slice? Give --type=TYPE, such as --type=v4-256"
[[ $max_preemptions =~ ^[0-9]+$ ]] || die "--max-preemptions=$max_preemptions: a number"
[[ $max_failures =~ ^[0-9]+$ ]] || die "--max-failures=$max_failures: a number"
[ -z "$NAME" ] || check_program "$@"
if [ "${3:-}" = isheep_jax.train ] && ! workdir_is_remote "$@"; then
  die "give the command --workdir=gs://BUCKET/RUN: a new slice has none of the old one's disks"
fi
[ -z "$type" ] || slice_facts "$type"
check_common
set_place

# A child in the background, so that a signal is obeyed at once and not after hours of waiting for a slice.
child=
in_background() {
  local code=0
  "$@" </dev/null &
  child=$!
  wait "$child" || code=$?
  child=
  return "$code"
}

sibling() {
  local script=$1
  shift
  in_background "$HERE/$script" "$NAME" ${place[@]+"${place[@]}"} "$@"
}
# shellcheck disable=SC2086  # the flags are several words
create_slice() { sibling create.sh "${create[@]}" "$@" -- $create_flags; }

if [ "$DRY_RUN" = 1 ]; then
  note "the slice, where it is not there:"
  create_slice --dry-run
  note "the package:"
  sibling install.sh --dry-run ${install[@]+"${install[@]}"}
  note "the command:"
  sibling run.sh --dry-run ${start[@]+"${start[@]}"} -- "$@"
  note "every $POLL_SECONDS seconds:"
  queued describe '--format=value(state.state)'
  node describe '--format=value(state)'
  on_workers all "$STATUS_COMMAND"
  note "when the slice is lost, and then again from the top:"
  sibling delete.sh --dry-run --yes
  exit 0
fi

# The link's target is this process: made and read in one step, and it can be seen whether its owner still lives.
mkdir -p "$STATE_DIRECTORY"
lock=$(lock_path)
if ! ln -s "$$" "$lock" 2>/dev/null; then
  if pid=$(supervisor_pid); then
    fail "process $pid supervises $NAME already"
  fi
  rm -f "$lock"
  ln -s "$$" "$lock" 2>/dev/null || fail "another supervisor of $NAME has just started"
fi
trap 'rm -f "$lock"' EXIT
trap '[ -z "$child" ] || kill "$child" 2>/dev/null; exit 143' TERM INT HUP

preemptions=0 failures=0 unsure=0

# Twice as long each time, sixteen times at most.
pause() {
  local factor=1 n
  for ((n = 1; n < $1 && n < 5; n++)); do factor=$((factor * 2)); done
  in_background sleep $((BACKOFF_SECONDS * factor))
}

# Nothing is deleted or started on the strength of an answer that did not come.
wait_unsure() {
  unsure=$((unsure + 1))
  [ "$unsure" -lt 60 ] ||
    fail "$NAME has not answered for long (request $QUEUED_STATE, machines $NODE_STATE); the slice may be charged"
  in_background sleep "$POLL_SECONDS"
}

# Sets SLICE: usable; lost; queued, where create.sh is to wait; absent; or unsure.
look_at_slice() {
  NODE_STATE=-
  read_queued_state
  case $QUEUED_STATE in
    ACTIVE)
      read_node_state
      case $NODE_STATE in
        READY) SLICE=usable ;;
        PREEMPTED | TERMINATED | ABSENT) SLICE=lost ;;
        *) SLICE=unsure ;;
      esac
      ;;
    FAILED | SUSPENDING | SUSPENDED) SLICE=lost ;;
    ABSENT) SLICE=absent ;;
    UNKNOWN | DELETING) SLICE=unsure ;;
    *) SLICE=queued ;;
  esac
}

recreate() {
  installed=0
  preemptions=$((preemptions + 1))
  say "$NAME is lost (request $QUEUED_STATE, machines $NODE_STATE); lost slices so far: $preemptions"
  [ "$preemptions" -le "$max_preemptions" ] || fail "giving up after $max_preemptions lost slices (--max-preemptions)"
  [ "$QUEUED_STATE" = ABSENT ] || queued delete --force --quiet || say "$NAME: the request is not deleted yet"
  pause "$preemptions"
}

# attempt WHAT COMMAND...: a step that may fail a few times in a row. Bad use is never tried again.
attempt() {
  local what=$1 code=0
  shift
  "$@" || code=$?
  [ "$code" != 0 ] || return 0
  look_at_slice
  # The loop deals with that.
  [ "$SLICE" != lost ] || return 1
  failed_once "$what" "$code"
  return 1
}

failed_once() {
  [ "$2" != 2 ] || {
    printf '%s: %s was refused (exit code 2); not trying again\n' "$SCRIPT" "$1" >&2
    exit 2
  }
  failures=$((failures + 1))
  say "$NAME: $1 failed (exit code $2); failures in a row: $failures"
  if [ "$failures" -ge "$max_failures" ]; then
    printf '%s: giving up (--max-failures); watch.sh %s --worker=all --once shows the logs\n' "$SCRIPT" "$NAME" >&2
    exit "$2"
  fi
  pause "$failures"
}

# Follows the run until it ends or the slice is lost; sets OUTCOME: finished, failed, stopped, lost.
follow() {
  unsure=0
  while :; do
    look_at_slice
    case $SLICE in
      lost | absent)
        OUTCOME=lost
        return
        ;;
      usable)
        read_run_state
        case $RUN_STATE in
          running) unsure=0 ;;
          finished | failed | stopped)
            OUTCOME=$RUN_STATE
            return
            ;;
          none | bare)
            # The machines were replaced under the same name.
            OUTCOME=failed EXIT_CODE=137 installed=0
            return
            ;;
          unreachable) wait_unsure ;;
        esac
        ;;
      *) wait_unsure ;;
    esac
    in_background sleep "$POLL_SECONDS"
  done
}

installed=0
while :; do
  look_at_slice
  case $SLICE in
    lost)
      recreate
      continue
      ;;
    unsure)
      wait_unsure
      continue
      ;;
    queued | absent)
      # Returns when the slice is ACTIVE.
      installed=0
      attempt "the request" create_slice || true
      continue
      ;;
  esac
  RUN_STATE=unreachable
  if try_read_slice; then read_run_state; fi
  if [ "$RUN_STATE" = unreachable ]; then
    wait_unsure
    continue
  fi
  if [ "$RUN_STATE" = running ]; then
    say "$NAME: taking over the run that is going on"
    installed=1
  else
    if [ "$installed" = 0 ]; then
      attempt "the installation" sibling install.sh ${install[@]+"${install[@]}"} || continue
      installed=1
    fi
    attempt "the start" sibling run.sh ${start[@]+"${start[@]}"} -- "$@" || continue
  fi
  began=$(date +%s)
  follow
  # The failures before an hour's run are another story.
  [ $(($(date +%s) - began)) -lt 3600 ] || failures=0
  case $OUTCOME in
    finished)
      say "$NAME: finished; lost slices on the way: $preemptions"
      if [ "$delete" = 1 ]; then
        queued delete --force --quiet || fail "$NAME was not deleted"
      else
        say "the slice is still there, and charged: delete.sh $NAME"
      fi
      exit 0
      ;;
    stopped) fail "$NAME was stopped by stop.sh; not starting it again" ;;
    failed)
      on_workers all 'bash isheep_jax/worker.sh end' >/dev/null 2>&1 || true
      failed_once "the command" "$EXIT_CODE"
      ;;
    lost) recreate ;;
  esac
done
