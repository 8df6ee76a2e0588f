workloads {
  kubernetes {
    cni { enabled = true } # in /etc/cni/net.d and /opt/cni/bin, as daemonset.yaml mounts them
  }
}
