#!/bin/sh
# Before files are replaced, while what runs still runs: a version with another map ABI cannot take over what is pinned.
set -e
for pins in /sys/fs/bpf/nodeproxy/*/v[0-9]*; do
	if [ -d "$pins" ] && [ "${pins##*/}" != "v@MAP_ABI@" ]; then
		echo "nodeproxy: $pins is of map ABI ${pins##*/}, and this version has v@MAP_ABI@: keep the installed version, or stop it and run \"nodeproxy cleanup\" before" >&2
		exit 1
	fi
done
