#!/usr/bin/env bash
# Checks on node-1, against the real node-2, what `make demo` shows on one machine. Exits 1 if a claim does not hold.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=lab.sh
. "$here/lab.sh"
: "${ADDRESS:=192.168.56.11}" "${PEER_ADDRESS:=192.168.56.12}"
: "${WIRE:=$(ip -o route get "$PEER_ADDRESS" | sed -n 's/.* dev \([^ ]*\).*/\1/p')}"
secret='the recipe of the house'
failed=0

claim() { # claim TEXT COMMAND...
	if "${@:2}"; then echo "  ✓ $1"; else echo "  ✗ $1"; failed=1; fi
}
get() { (within "$1" timeout 20 "$NODEPROXY" demo-app get "$2") 2>/dev/null; }
answers() { [[ $(get "$1" "$2") == *"$secret"* ]]; }
refuses() { ! answers "$@"; }
sees() { [ "$(get web "$1" | sed -n 's/^caller=//p')" = "$2" ]; }
explained() { "$NODEPROXY" explain batch api --socket "$SOCKET" | grep -qi 'den'; }
virtual_ip() {
	"$NODEPROXY" status --json --socket "$SOCKET" | tr -d ' \n' |
		sed -n 's/.*"name":"api","virtual_ips":\["\([0-9.]*\)".*/\1/p'
}
stopped() { grep -q '^stopped=' "$scratch/stream"; }

scratch=$(mktemp -d)
capture= stream=
trap 'kill $capture $stream 2>/dev/null; wait; rm -rf "$scratch"; "$here/intention.sh" allow' EXIT
tcpdump -Z root -i "$WIRE" --immediate-mode -U -s 0 -w "$scratch/wire" tcp and host "$PEER_ADDRESS" and not port 22 2>"$scratch/tcpdump" &
capture=$!
eventually 10 grep -q 'listening on' "$scratch/tcpdump"

virtual=$(virtual_ip)
claim "api has a virtual IP: $virtual" test -n "$virtual"
claim "web reaches api by its virtual IP" eventually 20 answers web "http://$virtual/"
claim "web reaches api by the instance's own address" answers web "http://$PEER_ADDRESS:$API_PORT/"
claim "api sees its caller's own address" sees "http://$virtual/" "$ADDRESS"
claim "batch gets nothing from api" refuses batch "http://$virtual/"
claim "node-1 explains why" explained

(within web "$NODEPROXY" demo-app stream "http://$virtual/stream") >"$scratch/stream" 2>&1 &
stream=$!
claim "web receives a stream from api" eventually 10 grep -q receiving "$scratch/stream"
"$here/intention.sh" deny
claim "the stream is cut when the intention says deny" eventually 10 stopped

kill "$capture"
wait "$capture" 2>/dev/null
capture=
records() { LC_ALL=C grep -qaP '\x17\x03\x03' "$scratch/wire"; }
silent() { [ -s "$scratch/wire" ] && ! LC_ALL=C grep -qaF "$secret" "$scratch/wire"; }
claim "the wire carries TLS" records
claim "and none of the payload" silent
exit $failed
