#!/usr/bin/env bash
# A job spec from submission to dataset, for cron and systemd timers. Workers must run already.
#   jobs/nightly.sh jobs/nightly.toml [flags of `trbatch submit`]
# The same command again continues the same job; two at a time are refused. The exit code is that of
# the dataset: 0 every row ok, 3 some failed, 5 cancelled, 6 past the deadline; see the README.
set -euo pipefail

spec="${1:?usage: nightly.sh SPEC.toml [flags of trbatch submit]}"
shift
trbatch="${TRBATCH:-trbatch}"

exec 9<"$spec"
flock --nonblock 9 || { echo "error: $spec is being run already" >&2; exit 1; }

job="$("$trbatch" submit "$spec" "$@")"
code=0
"$trbatch" wait "$job" || code=$?
# Failed rows, a cancellation and a deadline leave a dataset that is worth having.
case "$code" in 0 | 3 | 5 | 6) ;; *) exit "$code" ;; esac
exec "$trbatch" collect "$job"
