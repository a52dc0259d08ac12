# shellcheck shell=bash
# shellcheck disable=SC2034  # variables set here are used in the scripts that source this file
# Functions shared by the scripts in this directory, which source this file.
# Works with bash 3.2, the version of macOS.

SCRIPT=$(basename "$0")
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Directory of this machine for locks, archives and files that are sent to the workers.
STATE_DIRECTORY=${ISHEEP_TPU_STATE:-$HOME/.isheep_jax}
# Seconds between two status checks of a slice or a run, and the first pause before a slice is created again.
POLL_SECONDS=${ISHEEP_POLL_SECONDS:-30}
BACKOFF_SECONDS=${ISHEEP_BACKOFF_SECONDS:-60}

NAME=
PROJECT=
ZONE=
IAP=0
DRY_RUN=0

COMMON_OPTIONS="Options of every script:
  --project=ID, --zone=ZONE  default: gcloud's configuration (core/project, compute/zone)
  --iap                      reach the workers through Identity-Aware Proxy (no external addresses)
  --dry-run                  print every command, ready to paste, and run none
  --help                     this text
Exit codes: 0 done, 1 failed, 2 bad use."

# Reports bad use in one line; exit code 2.
die() {
  printf '%s: %s\n' "$SCRIPT" "$*" >&2
  exit 2
}

# Reports any other failure; exit code 1.
fail() {
  printf '%s: %s\n' "$SCRIPT" "$*" >&2
  exit 1
}

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*"; }

# Reads one option that all scripts have. Returns 1 for any other argument.
# An argument without a leading dash is the name.
common_option() {
  case $1 in
    --project=?*) PROJECT=${1#*=} ;;
    --zone=?*) ZONE=${1#*=} ;;
    --iap) IAP=1 ;;
    --dry-run) DRY_RUN=1 ;;
    --help | -h)
      usage
      printf '\n%s\n' "$COMMON_OPTIONS"
      exit 0
      ;;
    --project | --zone) die "$1 needs a value: $1=VALUE" ;;
    -*) return 1 ;;
    *)
      [ -z "$NAME" ] || die "two names: '$NAME' and '$1'"
      NAME=$1
      ;;
  esac
}

unknown_option() { die "unknown option '$1'; see $SCRIPT --help (values come after '=', as in --zone=ZONE)"; }

configured() { gcloud config get-value "$1" --quiet 2>/dev/null </dev/null || true; }

# Checks that there is a name, a project and a zone, given here or in the configuration of gcloud.
check_common() {
  [ -n "$NAME" ] || die "which slice? Usage: $SCRIPT NAME ...; see $SCRIPT --help"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    die "'$NAME' is not a valid name: use lower-case letters, digits and dashes, starting with a letter"
  KNOWN_PROJECT=$PROJECT KNOWN_ZONE=$ZONE
  [ "$DRY_RUN" = 0 ] || return 0
  command -v gcloud >/dev/null || die "gcloud is not on the PATH: https://cloud.google.com/sdk/docs/install"
  [ -n "$PROJECT" ] || KNOWN_PROJECT=$(configured core/project)
  [ -n "$ZONE" ] || KNOWN_ZONE=$(configured compute/zone)
  [ -n "$KNOWN_PROJECT" ] || die "no project: give --project=ID, or run: gcloud config set project ID"
  [ -n "$KNOWN_ZONE" ] || die "no zone: give --zone=ZONE, or run: gcloud config set compute/zone ZONE"
}

# Prints its arguments as one line that a shell reads back as the same arguments.
quoted() {
  local word separator=''
  for word in "$@"; do
    printf '%s' "$separator"
    separator=' '
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      printf '%s' "$word"
    elif [[ $word =~ ^--[a-z-]+= ]]; then
      printf "%s'%s'" "${BASH_REMATCH[0]}" "$(printf '%s' "${word#*=}" | sed "s/'/'\\\\''/g")"
    else
      printf "'%s'" "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")"
    fi
  done
  printf '\n'
}

note() { if [ "$DRY_RUN" = 1 ]; then printf '# %s\n' "$*"; fi; }

# Runs a command, or prints it in a dry run. Without input, because the ssh of gcloud would consume the caller's.
run() {
  if [ "$DRY_RUN" = 1 ]; then
    quoted "$@"
  else
    "$@" </dev/null
  fi
}

# Sets the arguments of gcloud for --project, --zone and --iap, if given.
set_target() {
  TARGET=()
  [ -z "$PROJECT" ] || TARGET+=("--project=$PROJECT")
  [ -z "$ZONE" ] || TARGET+=("--zone=$ZONE")
  TPU_VM=(gcloud compute tpus tpu-vm)
  REACH=()
  if [ "$IAP" = 1 ]; then
    # Only the alpha tpu-vm commands have a tunnel.
    TPU_VM=(gcloud alpha compute tpus tpu-vm)
    REACH=(--tunnel-through-iap)
  fi
}

# queued VERB [FLAGS]: runs a command on the queued resource.
queued() {
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$NAME" ${TARGET[@]+"${TARGET[@]}"} "$@"
}

# node VERB [FLAGS]: runs a command on the machines of the slice.
node() {
  local verb=$1
  shift
  run "${TPU_VM[@]}" "$verb" "$NAME" ${TARGET[@]+"${TARGET[@]}"} "$@"
}

# on_workers WORKER COMMAND: runs a command over ssh on one worker or on all of them at once. The flags detect a lost
# machine within seconds; TCP alone would take a quarter of an hour.
on_workers() {
  node ssh ${REACH[@]+"${REACH[@]}"} \
    "--worker=$1" --quiet --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=30 "--command=$2"
}

# copy_to_workers FILE...: copies files to isheep_jax/ in the home directory of every worker.
copy_to_workers() {
  run "${TPU_VM[@]}" scp "$@" "$NAME:isheep_jax/" ${TARGET[@]+"${TARGET[@]}"} ${REACH[@]+"${REACH[@]}"} \
    --worker=all --quiet
}

# Sets QUEUED_STATE to the state of the queued resource, ABSENT if there is none, or UNKNOWN if gcloud fails (with the
# reason in QUEUED_ERROR): a network failure must never look like a deleted slice.
read_queued_state() {
  local errors
  QUEUED_ERROR=
  errors=$(mktemp)
  if QUEUED_STATE=$(queued describe '--format=value(state.state)' 2>"$errors"); then
    [ -n "$QUEUED_STATE" ] || QUEUED_STATE=UNKNOWN
  elif grep -q NOT_FOUND "$errors"; then
    QUEUED_STATE=ABSENT
  else
    QUEUED_STATE=UNKNOWN
    QUEUED_ERROR=$(grep -m1 ERROR "$errors" || tail -n1 "$errors")
  fi
  rm -f "$errors"
}

# Sets NODE_STATE likewise for the machines of the slice: READY, PREEMPTED, ...
read_node_state() {
  local errors
  errors=$(mktemp)
  if NODE_STATE=$(node describe '--format=value(state)' 2>"$errors"); then
    [ -n "$NODE_STATE" ] || NODE_STATE=UNKNOWN
  elif grep -q NOT_FOUND "$errors"; then
    NODE_STATE=ABSENT
  else
    NODE_STATE=UNKNOWN
  fi
  rm -f "$errors"
}

# Sets ACCELERATOR, CHIPS and WORKERS from the slice itself: only Google knows the number of hosts.
try_read_slice() {
  local answer
  set -- node describe '--format=value(acceleratorType,networkEndpoints.len())'
  if [ "$DRY_RUN" = 1 ]; then
    "$@"
    WORKERS=WORKERS
    return
  fi
  answer=$("$@") || return 1
  read -r ACCELERATOR WORKERS <<<"$answer"
  [[ ${WORKERS:-} =~ ^[1-9][0-9]*$ ]] || return 1
  slice_facts "$ACCELERATOR"
}

read_slice() {
  try_read_slice || fail "there is no slice '$NAME' that is ready; see watch.sh $NAME, or create.sh --help"
}

# Sets ACCELERATOR (the name in gcloud), CHIPS and RUNTIME for the name of a slice, or exits with a message.
# v4 and v5p count TensorCores, two to a chip; v5e and v6e count chips.
# Runtime versions: https://cloud.google.com/tpu/docs/runtimes
slice_facts() {
  local generation size known='v4-N, v5e-N (v5litepod-N), v5p-N, v6e-N'
  [[ $1 =~ ^(v4|v5e|v5litepod|v5p|v6e)-([1-9][0-9]*)$ ]] || case $1 in
    *7x*) die "'$1': TPU7x is only available on GKE; see gke_job.yaml" ;;
    *) die "'$1' is not a known slice: $known" ;;
  esac
  generation=${BASH_REMATCH[1]} size=${BASH_REMATCH[2]}
  case $generation in
    v4 | v5p)
      [ $((size % 8)) = 0 ] || die "'$1': $generation counts cores and comes in multiples of 8 (4 chips)"
      CHIPS=$((size / 2))
      ;;
    *)
      case $size in
        1 | 4 | 8 | 16 | 32 | 64 | 128 | 256) CHIPS=$size ;;
        *) die "'$1': $generation counts chips and comes as 1, 4, 8, 16, 32, 64, 128 or 256" ;;
      esac
      ;;
  esac
  case $generation in
    v4) ACCELERATOR=v4-$size RUNTIME=tpu-ubuntu2204-base ;;
    v5p) ACCELERATOR=v5p-$size RUNTIME=v2-alpha-tpuv5 ;;
    v6e) ACCELERATOR=v6e-$size RUNTIME=v2-alpha-tpuv6e ;;
    *) ACCELERATOR=v5litepod-$size RUNTIME=v2-alpha-tpuv5-lite ;;
  esac
}

# Checks the command that every worker will run.
check_program() {
  [ $# -gt 0 ] || die "no command: give it after --, such as: -- python -m isheep_jax.train --config=llama_70b_v4"
  if [ "${1:-}" != python ] || [ "${2:-}" != -m ] || [[ ! ${3:-} =~ ^isheep_jax\. ]]; then
    die "after -- comes a command of the package, 'python -m isheep_jax...', not '$*'"
  fi
}

# Reads VARIABLE or VARIABLE=VALUE; sets variable and value.
read_variable() {
  variable=$1
  case $variable in
    *=*)
      value=${variable#*=}
      variable=${variable%%=*}
      ;;
    *) value=${!variable-} ;;
  esac
  [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "--env=$variable: not a valid variable name"
  [ -n "$value" ] || die "--env=$variable: not set on this machine"
}

# Tests whether the run directory of a program outlives the slice.
workdir_is_remote() { [[ " $* " =~ \ --workdir[=\ ]gs://[^\ ] ]]; }

# Prints the path of the lock of this slice's supervisor.
lock_path() { printf '%s/%s.%s.%s.lock' "$STATE_DIRECTORY" "$KNOWN_PROJECT" "$KNOWN_ZONE" "$NAME"; }

# Prints the process id of a running supervisor.
supervisor_pid() {
  local pid
  pid=$(readlink "$(lock_path)") && kill -0 "$pid" 2>/dev/null && printf '%s' "$pid"
}

# Command for the status of a worker; works before install.sh, too.
STATUS_COMMAND='test ! -f isheep_jax/worker.sh || bash isheep_jax/worker.sh status'

# Sets STATUS to one line per worker and RUN_STATE to their summary: running, finished (all with exit code 0), failed
# (any other exit code), stopped (by stop.sh), none (nothing was started), bare (install.sh has not run), or unreachable
# (with the reason, if known, in RUN_ERROR). EXIT_CODE is the first exit code other than 0, by worker.
read_run_state() {
  local lines errors reached=1
  EXIT_CODE=0
  errors=$(mktemp)
  lines=$(on_workers all "$STATUS_COMMAND" 2>"$errors") || reached=0
  RUN_ERROR=$(grep -m1 ERROR "$errors" || true)
  rm -f "$errors"
  STATUS=$(printf '%s\n' "$lines" | grep '^worker=' | sort -t= -k2 -n || true)
  if [ "$reached" = 0 ]; then
    RUN_STATE=unreachable
  elif [ "$(printf '%s\n' "$STATUS" | grep -c '^worker=')" -lt "$WORKERS" ]; then
    RUN_STATE=bare
  elif grep -q ' state=stopped ' <<<"$STATUS"; then
    RUN_STATE=stopped
  elif grep -Eq ' state=(failed|killed) ' <<<"$STATUS"; then
    RUN_STATE=failed
    EXIT_CODE=$(sed -nE 's/^worker=[0-9]+ state=(failed|killed) run=[^ ]+ code=([0-9]+) .*/\2/p' <<<"$STATUS" |
      head -n1)
  elif grep -q ' state=running ' <<<"$STATUS"; then
    RUN_STATE=running
  elif grep -q ' state=none ' <<<"$STATUS"; then
    RUN_STATE=none
  else
    RUN_STATE=finished
  fi
}
