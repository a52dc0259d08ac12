#!/usr/bin/env bash
# Requests a TPU slice as a queued resource and waits until it is active.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
Usage: create.sh NAME --type=TYPE [--spot | --reserved] [options] [-- GCLOUD_FLAGS...]

Requests a TPU slice as a queued resource and waits until it is ACTIVE. Run again, it waits for the same request.

  --type=TYPE             v4-256, v5e-16 (or v5litepod-16), v5p-128, v6e-8, ...; v4 and v5p count cores, two to a chip
  --spot                  cheaper, but can be preempted at any time; see supervise.sh
  --reserved              from the project's reservation; default: on demand
  --runtime-version=NAME  default, by generation: v4 tpu-ubuntu2204-base, v5e v2-alpha-tpuv5-lite, v5p v2-alpha-tpuv5,
                          v6e v2-alpha-tpuv6e
  --no-wait               return as soon as the request is made
  -- GCLOUD_FLAGS         further flags of 'gcloud compute tpus queued-resources create', such as --network=NAME,
                          --service-account=EMAIL, --internal-ips, --valid-until-duration=6h
EOF
}

type='' tier='' runtime='' wait=1
while [ $# -gt 0 ]; do
  case $1 in
    --type=?*) type=${1#*=} ;;
    --spot | --reserved)
      [ -z "$tier" ] || [ "$tier" = "$1" ] || die "either --spot or --reserved"
      tier=$1
      ;;
    --runtime-version=?*) runtime=${1#*=} ;;
    --no-wait) wait=0 ;;
    --)
      shift
      break
      ;;
    *) common_option "$1" || unknown_option "$1" ;;
  esac
  shift
done
[ -n "$type" ] || [ -z "$NAME" ] || die "which slice? Give --type=TYPE, such as --type=v4-256"
[ -z "$type" ] || slice_facts "$type"
check_common
set_target

request() {
  queued create "--node-id=$NAME" "--accelerator-type=$ACCELERATOR" "--runtime-version=${runtime:-$RUNTIME}" \
    ${tier:+"$tier"} "$@" --quiet
}

# Prints the reason why a request failed.
reason() {
  local text
  text=$(queued describe '--format=value(state.failedData.error.message)' 2>/dev/null || true)
  printf '%s' "${text:-Google gives no reason}"
}

wait_until_active() {
  local began state='' unknown=0 checks=0
  began=$(date +%s)
  while :; do
    read_queued_state
    # Prints a line when the state changes, and at every tenth check.
    if [ "$QUEUED_STATE" != "$state" ] || [ $((checks % 10)) = 0 ]; then
      say "$NAME ($ACCELERATOR, $CHIPS chips): $QUEUED_STATE, $((($(date +%s) - began) / 60)) min"
    fi
    checks=$((checks + 1))
    state=$QUEUED_STATE
    case $state in
      ACTIVE) return ;;
      FAILED) fail "the request failed: $(reason). delete.sh $NAME removes it" ;;
      SUSPENDING | SUSPENDED)
        fail "the slice was taken away (preempted, or its time was up), and this request will not get another." \
          "delete.sh $NAME, then create.sh; supervise.sh does both by itself"
        ;;
      ABSENT | DELETING) fail "the request was deleted" ;;
      UNKNOWN)
        unknown=$((unknown + 1))
        [ "$unknown" -lt 10 ] || fail "gcloud does not answer: ${QUEUED_ERROR:-no state}"
        ;;
      *) unknown=0 ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

if [ "$DRY_RUN" = 1 ]; then
  note "$ACCELERATOR has $CHIPS chips"
  request "$@"
  if [ "$wait" = 1 ]; then
    note "every $POLL_SECONDS seconds, until it says ACTIVE:"
    queued describe '--format=value(state.state)'
  fi
  exit 0
fi

read_queued_state
case $QUEUED_STATE in
  ABSENT)
    say "requesting $NAME: $ACCELERATOR, $CHIPS chips${tier:+, ${tier#--}}"
    request "$@" || fail "the request was refused; see the lines above"
    ;;
  UNKNOWN) fail "gcloud does not answer: ${QUEUED_ERROR:-no state}" ;;
  *)
    existing=$(queued describe '--format=value(tpu.nodeSpec[0].node.acceleratorType)' || true)
    [ "$existing" = "$ACCELERATOR" ] || fail "$NAME exists as ${existing:-another type}, not $ACCELERATOR"
    say "$NAME exists: $QUEUED_STATE"
    ;;
esac
[ "$wait" = 1 ] || exit 0
say "waiting; Ctrl-C stops waiting but keeps the request"
wait_until_active
say "$NAME is active and charged from now on: $CHIPS chip-hours every hour, until delete.sh $NAME"
