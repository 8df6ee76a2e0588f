# What is the same in every cluster. Every key: docs/nodeproxy.hcl. The node's name and address come from the downward API.

workloads {
  kubernetes { enabled = true } # and the namespaces of mesh.hcl
}

admin {
  # For Prometheus, on every address of the node.
  metrics = "0.0.0.0:20210"
}
