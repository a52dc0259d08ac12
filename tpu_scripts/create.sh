#!/usr/bin/env bash
# Requests a TPU slice by a queued resource, and waits until it is there.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
Usage: create.sh NAME --type=TYPE [--spot | --reserved] [options] [-- GCLOUD_FLAGS...]

Requests a TPU slice by a queued resource, and waits until it is ACTIVE. Started again, it waits for the same request.

  --type=TYPE             v4-256, v5e-16 (or v5litepod-16), v5p-128, v6e-8, ...; v4 and v5p count cores, two to a chip
  --spot                  cheaper, and can be taken away at any moment; see supervise.sh
  --reserved              from the project's reservation; default: on demand
  --runtime-version=NAME  default, by generation: v4 tpu-ubuntu2204-base, v5e v2-alpha-tpuv5-lite, v5p v2-alpha-tpuv5,
                          v6e v2-alpha-tpuv6e
  --no-wait               return when the request is made
  -- GCLOUD_FLAGS         to 'gcloud compute tpus queued-resources create' as they are, such as --network=NAME,
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
set_place

request() {
  queued create "--node-id=$NAME" "--accelerator-type=$ACCELERATOR" "--runtime-version=${runtime:-$RUNTIME}" \
    ${tier:+"$tier"} "$@" --quiet
}

# What is known of a request that came to nothing.
reason() {
  local text
  text=$(queued describe '--format=value(state.failedData.error.message)' 2>/dev/null || true)
  printf '%s' "${text:-Google gives no reason}"
}

wait_until_active() {
  local began state='' unknown=0 looks=0
  began=$(date +%s)
  while :; do
    read_queued_state
    # A line when the state changes, and now and then in between.
    if [ "$QUEUED_STATE" != "$state" ] || [ $((looks % 10)) = 0 ]; then
      say "$NAME ($ACCELERATOR, $CHIPS chips): $QUEUED_STATE, $((($(date +%s) - began) / 60)) min"
    fi
    looks=$((looks + 1))
    state=$QUEUED_STATE
    case $state in
      ACTIVE) return ;;
      FAILED) fail "the request failed: $(reason). delete.sh $NAME removes it" ;;
      SUSPENDING | SUSPENDED)
        fail "the slice was taken away (preempted, or its time was up), and this request will not get another." \
          "delete.sh $NAME, then create.sh; supervise.sh does both by itself"
        ;;
      ABSENT | DELETING) fail "the request is gone: somebody deleted it" ;;
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
    there=$(queued describe '--format=value(tpu.nodeSpec[0].node.acceleratorType)' || true)
    [ "$there" = "$ACCELERATOR" ] || fail "$NAME is there already, as ${there:-something else}, not $ACCELERATOR"
    say "$NAME is there already: $QUEUED_STATE"
    ;;
esac
[ "$wait" = 1 ] || exit 0
say "waiting; Ctrl-C ends the waiting, not the request"
wait_until_active
say "$NAME is there. It is charged from now on: $CHIPS chip-hours every hour, until delete.sh $NAME"
