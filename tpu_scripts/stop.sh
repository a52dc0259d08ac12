#!/usr/bin/env bash
# Stops the run on a slice. The slice stays and is charged.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
Usage: stop.sh NAME [options]

Asks the processes of the run on every worker to exit, and kills those that have not exited after a minute. A supervisor
does not start the run again. The slice stays and is charged; see delete.sh.
EOF
}

while [ $# -gt 0 ]; do
  common_option "$1" || unknown_option "$1"
  shift
done
check_common
set_target
on_workers all 'bash isheep_jax/worker.sh stop' || fail "not every worker answered; see the lines above"
