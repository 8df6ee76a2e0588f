# What provision.sh and claims.sh share: where things are, and how a program is started in a workload's cgroup. Every
# path comes from the environment, so that both run in network namespaces as they do on a machine of their own.

: "${NODE:=$(hostname)}"
: "${PREFIX:=/usr/local}" "${ETC:=/etc/nodeproxy}" "${RUN:=/run/nodeproxy}" "${STATE:=/var/lib/nodeproxy}"
: "${PINS:=/sys/fs/bpf/nodeproxy}" "${MESH:=$ETC/mesh.d}" "${INIT:=systemd}"
: "${CGROUP:=$(awk '{ for (i = 7; i < NF; i++) if ($i == "-" && $(i + 1) == "cgroup2") { print $5; exit } }' /proc/self/mountinfo)/nodeproxy-lab}"
: "${API_PORT:=8080}"

NODEPROXY=$PREFIX/bin/nodeproxy
SOCKET=$RUN/admin.sock

# within WORKLOAD COMMAND... replaces this shell by the command, in the workload's cgroup.
within() {
	echo "$BASHPID" >"$CGROUP/$1/cgroup.procs"
	exec "${@:2}"
}

# eventually SECONDS COMMAND... repeats the command until it succeeds.
eventually() {
	local until=$((SECONDS + $1))
	until "${@:2}"; do
		[ "$SECONDS" -lt "$until" ] || { echo "not within $1 s: ${*:2}" >&2; return 1; }
		sleep 0.1
	done
}
