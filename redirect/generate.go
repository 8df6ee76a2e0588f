package redirect

// The objects are built for both byte-compatible targets by Debian 12's clang and committed; `make check-generate` sees no difference.
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-14 -strip llvm-strip-14 -target amd64,arm64 -type addr -type event -type constant -type reason -type stat -type member_flag -type dest_flag -type range_kind -type origin_flag -type listener_kind -type rule_action -type direct_kind -type event_flag -type probe_key -type probe -type exclusion_bits -type grant_event -type grant_stage -type direct_seen outbound ../bpf/outbound.c -- -O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-14 -strip llvm-strip-14 -target amd64,arm64 -type addr inbound ../bpf/inbound.c -- -O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-14 -strip llvm-strip-14 -target amd64,arm64 -type addr -type dns_constant -type dns_stat dns ../bpf/dns.c -- -O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu
