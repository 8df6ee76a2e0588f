#!/bin/sh
# dpkg says "remove", "upgrade" or "deconfigure", rpm how many versions will be left.
set -e
case "$1" in
remove | 0) ;;
*) exit 0 ;;
esac
if [ -d /run/systemd/system ]; then
	systemctl disable --now nodeproxy.service nodeproxy-boot.service
fi
# What Consul's agent does not take back turns critical by itself: it may be gone. What is in the kernel must not stay.
nodeproxy cleanup || [ ! -e /sys/fs/bpf/nodeproxy ]
