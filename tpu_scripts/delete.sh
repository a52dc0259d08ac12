#!/usr/bin/env bash
# Deletes a slice.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
Usage: delete.sh NAME [--yes] [options]

Deletes the queued resource and its machines with everything on their disks. Files in gs:// stay.

  --yes  do not ask
EOF
}

yes=0
while [ $# -gt 0 ]; do
  case $1 in
    --yes) yes=1 ;;
    *) common_option "$1" || unknown_option "$1" ;;
  esac
  shift
done
check_common
set_target

if [ "$DRY_RUN" = 0 ]; then
  if pid=$(supervisor_pid); then
    fail "supervise.sh (process $pid) would create $NAME again; end it first: kill $pid"
  fi
  read_queued_state
  case $QUEUED_STATE in
    UNKNOWN) fail "gcloud does not answer: ${QUEUED_ERROR:-no state}" ;;
    ABSENT)
      say "$NAME: there is no such slice"
      exit 0
      ;;
  esac
  if [ "$yes" = 0 ]; then
    [ -t 0 ] || die "there is no terminal to ask; give --yes"
    read -r -p "Delete $NAME ($QUEUED_STATE) and its disks? [y/N] " answer
    [[ $answer =~ ^[yY] ]] || fail "$NAME was not deleted"
  fi
fi
queued delete --force --quiet || fail "$NAME was not deleted; see the lines above"
[ "$DRY_RUN" = 1 ] || say "$NAME is deleted"
