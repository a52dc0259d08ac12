#!/usr/bin/env bash
# Installs the package on every worker of a slice and checks that all have the same versions.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<EOF
Usage: install.sh NAME [--ref=REF] [--python=VERSION] [options]

Copies the package to every worker, installs it with its [tpu] extra in a virtual environment, and checks that all
workers have the same versions and see the whole slice. Workers need PyPI; they need no access to the repository.

  --ref=REF         a commit, tag or branch of this checkout; default: the tracked files, including edits
  --python=VERSION  default: 3.11
EOF
}

ref='' python=3.11
while [ $# -gt 0 ]; do
  case $1 in
    --ref=?*) ref=${1#*=} ;;
    --python=?*) python=${1#*=} ;;
    *) common_option "$1" || unknown_option "$1" ;;
  esac
  shift
done
[[ $python =~ ^3\.[0-9]+(\.[0-9]+)?$ ]] || die "--python=$python: a version such as 3.11"
check_common
set_target

checkout=$(dirname "$HERE")
git -C "$checkout" rev-parse --git-dir >/dev/null 2>&1 ||
  die "$checkout is not a git checkout, which defines the files to send"
if [ -n "$ref" ]; then
  label=$(git -C "$checkout" rev-parse --verify --quiet --short "$ref^{commit}") ||
    die "--ref=$ref: no such commit, tag or branch in $checkout"
else
  label=$(git -C "$checkout" describe --always --dirty=-edited --exclude='*')
fi
directory=$STATE_DIRECTORY/$NAME
archive=$directory/source.tar.gz

pack() {
  if [ -n "$ref" ]; then
    run git -C "$checkout" archive --format=tar.gz "--output=$archive" "$label"
  elif [ "$DRY_RUN" = 1 ]; then
    printf '%s | %s\n' "$(quoted git -C "$checkout" ls-files -z)" \
      "$(quoted tar -czf "$archive" -C "$checkout" --null -T -)"
  else
    git -C "$checkout" ls-files -z | tar -czf "$archive" -C "$checkout" --null -T -
  fi
}

[ "$DRY_RUN" = 1 ] || say "$NAME: sending $label"
run mkdir -p "$directory"
pack || fail "the tracked files could not be packed; see the lines above"
read_slice
on_workers all 'mkdir -p isheep_jax' ||
  fail "not every worker answers; several need ssh's key in the agent: ssh-add ~/.ssh/google_compute_engine"
copy_to_workers "$archive" "$HERE/worker.sh" || fail "not every worker got the files; run the same command to try again"
on_workers all "bash isheep_jax/worker.sh install $python $label" ||
  fail "the installation failed on at least one worker; see the lines above. Run the same command to try again"

# Every worker prints a line; versions must be equal, and the number of devices must be that of the chips of the slice.
command='bash isheep_jax/worker.sh check'
if [ "$DRY_RUN" = 1 ]; then
  on_workers all "$command"
  exit 0
fi
say "$NAME: checking $WORKERS workers"
lines=$(on_workers all "$command") || fail "JAX does not start on every worker; see the lines above"
lines=$(printf '%s\n' "$lines" | grep '^worker=' | sort -t= -k2 -n || true)
count=$(printf '%s\n' "$lines" | grep -c '^worker=' || true)
[ "$count" = "$WORKERS" ] || fail "$count of $WORKERS workers answered"
different=$(printf '%s\n' "$lines" | sed 's/^worker=[0-9]* //' | sort | uniq -c | sort -rn)
if [ "$(printf '%s\n' "$different" | wc -l)" -gt 1 ]; then
  printf '%s\n' "$lines" >&2
  fail "the workers differ; see the lines above"
fi
facts=${lines%%$'\n'*}
facts=${facts#* }
[[ " $facts " == *" source=$label "* ]] || fail "the workers have another version than $label: $facts"
[[ " $facts " == *" platform=tpu devices=$CHIPS "* ]] ||
  fail "the slice has $CHIPS chips, but JAX says: $facts"
say "$NAME: all $WORKERS workers: $facts"
