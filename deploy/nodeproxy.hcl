# The configuration of nodeproxy on this node. As it is, the daemon starts and does nothing: no workload is enrolled.
# Every key: /usr/share/doc/nodeproxy/nodeproxy.hcl. Try a change with "nodeproxy check".

# Who this node is. Set both before a workload is enrolled: its name in the mesh, and the address by which other nodes reach
# it; until then it has one that nobody has.
node {
  name    = "unnamed"
  address = "192.0.2.1"
}

# A directory of Consul's service definitions and config entries, with a built-in certificate authority.
source "file" {
  path = "/etc/nodeproxy/mesh.d"
}

# Or the Consul agent of this node, in the place of the directory:
# source "consul" {}

workloads {
  systemd {
    enabled = true # services with a section [X-NodeProxy] in their unit or a drop-in
  }
  xattr {
    enabled = true # cgroups with extended attributes trusted.nodeproxy.*
  }
  # with source "consul", instances with meta nodeproxy = "enabled", tasks of Nomad among them:
  # consul {
  #   enabled = true
  # }
  # containers with labels nodeproxy.io/<key>, of Docker or podman:
  # containers {
  #   enabled = true
  #   allow   = ["web"] # what they may be
  # }
}
