#!/bin/sh
# The mesh directory stays: it may be other nodes' too.
set -e
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
if [ "$1" = purge ]; then
	rm -rf /var/lib/nodeproxy
fi
