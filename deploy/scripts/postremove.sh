#!/bin/sh
# The mesh directory stays: it may be other nodes' too.
set -e
case "$1" in
purge) rm -rf /var/lib/nodeproxy ;;
remove | 0) [ ! -d /run/systemd/system ] || systemctl daemon-reload ;;
esac
