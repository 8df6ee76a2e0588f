# What is the same in every cluster. Every key: docs/nodeproxy.hcl. The node's name and address come from the downward API.

workloads {
  kubernetes { enabled = true } # and the namespaces of mesh.hcl
}

admin {
  # For Prometheus, on every address of the node; "127.0.0.1:20210" is enough for the probes.
  metrics = "0.0.0.0:20210"
}
