#!/usr/bin/env bash
# within.sh WORKLOAD COMMAND... runs a command in the cgroup of a workload.
set -euo pipefail
# shellcheck source=lab.sh
. "$(dirname "${BASH_SOURCE[0]}")/lab.sh"
within "$@"
