# What is your cluster's: replace this file in an overlay (docs/kubernetes.md).

source "consul" {
  mode              = "servers"                               # nodes have no agent
  addresses         = ["https://consul-server.consul.svc:8501"]
  ca_file           = "/var/run/secrets/nodeproxy/ca.pem"     # of the Secret consul-ca-cert, if there is one
  auth_method       = "nodeproxy"
  bearer_token_file = "/var/run/secrets/nodeproxy/token"      # of the service account, for the audience consul
}

# What pods may be: a label asks, this grants. A pod is what its service account is called.
# workloads {
#   kubernetes {
#     namespace "shop" { services = ["web", "cart"] }
#   }
# }
