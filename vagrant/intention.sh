#!/usr/bin/env bash
# intention.sh allow|deny says whether web may connect to api.
set -euo pipefail
# shellcheck source=lab.sh
. "$(dirname "${BASH_SOURCE[0]}")/lab.sh"
mkdir -p "$MESH/config"
cat >"$MESH/.api" <<END
Kind = "service-intentions"
Name = "api"
Sources = [
  {
    Name   = "web"
    Action = "$1"
  },
]
END
mv "$MESH/.api" "$MESH/config/api.hcl"
