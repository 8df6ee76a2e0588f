#!/usr/bin/env bash
# Builds, installs and starts nodeproxy with the file source on one node of the lab, and starts its workloads.
#
# The steps are functions, run in the order of the last line. INIT=none starts the daemon and the workloads as plain
# background processes and installs nothing but files, which is how the tests run it in a network namespace.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=lab.sh
. "$here/lab.sh"
: "${SOURCE:=$here/..}" "${ADDRESS:?the address of this node}" "${PEER_ADDRESS:=}" "${KEY:=}"

say() { echo "[$NODE] $*"; }

install_tools() {
	[ "$INIT" = systemd ] || return 0
	say "installing packages"
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -q
	apt-get install -y -q --no-install-recommends ca-certificates curl make rsync tcpdump
	local wanted
	wanted=$(awk '$1 == "go" { print $2 }' "$SOURCE/go.mod")
	if [ "$(/usr/local/go/bin/go env GOVERSION 2>/dev/null)" != "go$wanted" ]; then
		say "installing Go $wanted"
		rm -rf /usr/local/go
		curl -fsSL "https://go.dev/dl/go$wanted.linux-$(dpkg --print-architecture).tar.gz" | tar -C /usr/local -xz
	fi
	export PATH=$PATH:/usr/local/go/bin
}

build() {
	say "building nodeproxy"
	make -s -C "$SOURCE" build
	install -D "$SOURCE/build/nodeproxy" "$NODEPROXY"
}

# The nodes share mesh.d: its definitions, its CA and what state.json has assigned. node-1 makes it; node-2 copies it and
# returns state.json, to which its daemon has added the ports of its own instances.
fetch_mesh() {
	[ -n "$KEY" ] || return 0
	if [ "$NODE" = node-1 ]; then
		install -D -m 600 "$KEY.pub" /root/.ssh/authorized_keys
		return
	fi
	say "fetching mesh.d from node-1"
	install -m 600 "$KEY" /root/nodeproxy-lab.key
	copy "root@$PEER_ADDRESS:$MESH/" "$MESH/"
}

return_state() {
	[ -n "$KEY" ] && [ "$NODE" != node-1 ] || return 0
	copy "$MESH/state.json" "root@$PEER_ADDRESS:$MESH/state.json"
}

copy() { rsync -a -e "ssh -i /root/nodeproxy-lab.key -o StrictHostKeyChecking=accept-new" "$1" "$2"; }

workloads() { if [ "$NODE" = node-1 ]; then echo web batch; else echo api; fi; }

# define NODE SERVICE ADDRESS
define() {
	mkdir -p "$MESH/nodes/$1"
	cat >"$MESH/nodes/$1/$2.hcl" <<-END
		service {
		  name    = "$2"
		  id      = "$2-1"
		  address = "$3"
		  port    = $API_PORT
		  connect {
		    sidecar_service {}
		  }
		}
	END
}

write_mesh() {
	[ "$NODE" = node-1 ] || return 0
	say "writing mesh.d"
	mkdir -p "$MESH/config"
	chmod 700 "$MESH"
	define node-2 api "$PEER_ADDRESS"
	"$here/intention.sh" allow
	cat >"$MESH/config/default.hcl" <<-'END'
		Kind = "service-intentions"
		Name = "*"
		Sources = [
		  {
		    Name   = "*"
		    Action = "deny"
		  },
		]
	END
}

write_config() {
	say "writing $ETC/nodeproxy.hcl"
	mkdir -p "$ETC" "$RUN" "$STATE"
	{
		cat <<-END
			node {
			  name    = "$NODE"
			  address = "$ADDRESS"
			}
			source "file" {
			  path        = "$MESH"
			  virtual_ips = "240.0.0.0/8"
			}
			admin {
			  socket  = "$SOCKET"
			  metrics = "127.0.0.1:20210"
			}
			state {
			  dir  = "$STATE"
			  pins = "$PINS"
			}
			workloads {
		END
		for name in $(workloads); do
			printf '  cgroup "%s" {\n    path    = "%s"\n    service = "%s"\n  }\n' "$name" "$CGROUP/$name" "$name"
		done
		echo '}'
	} >"$ETC/nodeproxy.hcl"
	"$NODEPROXY" check --help >/dev/null
}

# background NAME COMMAND... starts a program that outlives this script.
background() {
	if [ "$INIT" = systemd ]; then
		systemctl stop "lab-$1" 2>/dev/null || true
		systemd-run --quiet --collect --unit "lab-$1" "${@:2}"
	else
		"${@:2}" >"$STATE/$1.log" 2>&1 &
	fi
}

start_workloads() {
	for name in $(workloads); do
		mkdir -p "$CGROUP/$name"
		local port=$API_PORT
		[ "$name" != batch ] || port=$((API_PORT + 1)) # web and batch share the node's network
		background "$name" "$here/within.sh" "$name" "$NODEPROXY" demo-app serve ":$port"
	done
}

start_nodeproxy() {
	say "starting nodeproxy"
	if [ "$INIT" = systemd ]; then
		mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
		install -m 644 "$SOURCE/deploy/nodeproxy.service" /etc/systemd/system/
		systemctl daemon-reload
		systemctl enable --quiet nodeproxy
		systemctl restart nodeproxy
	else
		mkdir -p "$CGROUP/nodeproxy"
		background nodeproxy "$here/within.sh" nodeproxy "$NODEPROXY" run --config "$ETC/nodeproxy.hcl"
	fi
	eventually 30 protected
	say "all workloads are protected"
}

protected() {
	local status
	status=$("$NODEPROXY" status --json --socket "$SOCKET" 2>/dev/null) || return 1
	[ "$(grep -o '"state": *"protected"' <<<"$status" | wc -l)" = "$(workloads | wc -w)" ]
}

install_tools
build
fetch_mesh
write_mesh
write_config
start_workloads
start_nodeproxy
return_state
