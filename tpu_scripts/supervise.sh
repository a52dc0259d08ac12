#!/usr/bin/env bash
# Keeps a command running on a slice that can be preempted.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
Usage: supervise.sh NAME --type=TYPE [--spot | --reserved] [options] -- python -m isheep_jax.COMMAND ...

Creates the slice if needed, installs the package, runs the command and watches it. When the slice is preempted, fails
or disappears, this script deletes the request, waits, creates the slice again, installs and runs the same command,
which resumes from its run directory; that must therefore be in gs://. When only the command fails, it is started again
on the same slice. An active run is taken over. Run this script in tmux on a machine that stays awake.

  --type, --spot, --reserved, --runtime-version, --create-flags="FLAGS"  as in create.sh (FLAGS: those after --)
  --ref, --python           as in install.sh
  --env=VARIABLE            as in run.sh
  --max-preemptions=N       slices that may be lost; default: 50
  --max-failures=N          failures of the command in a row (a run of an hour starts a new row); default: 3. Bad use
                            (exit code 2) is never tried again
  --delete                  delete the slice when the command has finished
Exit code: that of the command, or 1 after giving up.
EOF
}

create=() install=() start=() target=() create_flags=''
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
      # Checked now, not once the slice exists.
      read_variable "${1#*=}"
      start+=("$1")
      ;;
    --max-preemptions=?*) max_preemptions=${1#*=} ;;
    --max-failures=?*) max_failures=${1#*=} ;;
    --delete) delete=1 ;;
    --project=?* | --zone=?* | --iap)
      common_option "$1"
      target+=("$1")
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
  die "give the command --workdir=gs://BUCKET/RUN: a new slice does not have the disks of the old one"
fi
[ -z "$type" ] || slice_facts "$type"
check_common
set_target

# Runs a child in the background, so that a signal takes effect at once, not after hours of waiting for a slice.
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
  in_background "$HERE/$script" "$NAME" ${target[@]+"${target[@]}"} "$@"
}
# shellcheck disable=SC2086  # the flags are several words
create_slice() { sibling create.sh "${create[@]}" "$@" -- $create_flags; }

if [ "$DRY_RUN" = 1 ]; then
  note "the slice, if it does not exist:"
  create_slice --dry-run
  note "the package:"
  sibling install.sh --dry-run ${install[@]+"${install[@]}"}
  note "the command:"
  sibling run.sh --dry-run ${start[@]+"${start[@]}"} -- "$@"
  note "every $POLL_SECONDS seconds:"
  queued describe '--format=value(state.state)'
  node describe '--format=value(state)'
  on_workers all "$STATUS_COMMAND"
  note "when the slice is lost, before starting over:"
  sibling delete.sh --dry-run --yes
  exit 0
fi

# The lock is a link to this process id: creating it is atomic, and others can check whether its owner is running.
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

# Pauses twice as long each time, up to sixteen times.
pause() {
  local factor=1 n
  for ((n = 1; n < $1 && n < 5; n++)); do factor=$((factor * 2)); done
  in_background sleep $((BACKOFF_SECONDS * factor))
}

# Without an answer from gcloud nothing is deleted or started.
wait_unsure() {
  unsure=$((unsure + 1))
  [ "$unsure" -lt 60 ] ||
    fail "$NAME has not answered for long (request $QUEUED_STATE, machines $NODE_STATE); the slice may be charged"
  in_background sleep "$POLL_SECONDS"
}

# Sets SLICE: usable; lost; queued (create.sh waits for it); absent; or unsure.
check_slice() {
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

# attempt WHAT COMMAND...: runs a step that may fail a few times in a row. Bad use is never tried again.
attempt() {
  local what=$1 code=0
  shift
  "$@" || code=$?
  [ "$code" != 0 ] || return 0
  check_slice
  # The main loop handles a lost slice.
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
    check_slice
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
            # The machines were replaced by new ones with the same name.
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
  check_slice
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
    say "$NAME: taking over the active run"
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
  # A run of an hour starts a new row of failures.
  [ $(($(date +%s) - began)) -lt 3600 ] || failures=0
  case $OUTCOME in
    finished)
      say "$NAME: finished; lost slices on the way: $preemptions"
      if [ "$delete" = 1 ]; then
        queued delete --force --quiet || fail "$NAME was not deleted"
      else
        say "the slice still exists and is charged: delete.sh $NAME"
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
