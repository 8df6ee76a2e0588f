module nodeproxy.io/tests/consul/tools

go 1.26.8
