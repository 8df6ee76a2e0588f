#!/bin/sh
# Enables and starts nothing. A daemon that runs is replaced.
set -e
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload
# Ready again may take as long as the control plane does.
if ! timeout 60 systemctl try-reload-or-restart nodeproxy.service; then
	echo "nodeproxy: the daemon of this version is not ready yet: see \"systemctl status nodeproxy\"" >&2
fi
