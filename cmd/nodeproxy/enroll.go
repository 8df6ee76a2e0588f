package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/redirect"
)

func newEnroll(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "enroll CGROUP --service NAME [--service NAME]...",
		Short: "Make a cgroup a workload of a service",
		Long: "Makes a cgroup, with those below it, a workload of a service, until it is un-enrolled. Of several services it has the\n" +
			"identity of the first; others reach each of them on its own port.\n" +
			"CGROUP is a directory of cgroup2, or its path below the mount of cgroup2.",
		Example: "  nodeproxy enroll system.slice/web.service --service web",
		Args:    exactly("CGROUP"),
	}
	client := socketFlag(cmd)
	var req admin.EnrollRequest
	var services []string
	cmd.Flags().StringArrayVar(&services, "service", nil, "the `NAME` of the service that the workload is (required), and again for each further one that others reach in it")
	cmd.Flags().StringVar(&req.Mode, "mode", "", "what plaintext to its ports meets, the `MODE`: strict or permissive; the node's inbound.mode if not given")
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		switch {
		case len(services) == 0 || services[0] == "":
			return &usageError{errors.New("enroll needs --service NAME"), cmd}
		case req.Mode != "" && req.Mode != "strict" && req.Mode != "permissive":
			return &usageError{fmt.Errorf("--mode %q is neither strict nor permissive", req.Mode), cmd}
		}
		req.Service, req.Also = services[0], services[1:]
		if req.Cgroup, err = cgroupPath(args[0]); err != nil {
			return err
		}
		if err := client().Enroll(cmd.Context(), req); err != nil {
			return err
		}
		e.printf("enrolled %s as %s; \"nodeproxy status\" shows when it is protected\n", clean(req.Cgroup), clean(strings.Join(services, ",")))
		return nil
	}
	return cmd
}

func newUnenroll(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "unenroll CGROUP",
		Short: "Take a cgroup that was enrolled by hand out of the mesh",
		Long: "Takes a cgroup that was enrolled by hand out of the mesh: what it sends is not encrypted any more, and its ports are open.\n" +
			"Connections that it has are not cut. CGROUP is as \"nodeproxy status\" shows it, or its path below the mount of cgroup2.",
		Example: "  nodeproxy unenroll system.slice/web.service",
		Args:    exactly("CGROUP"),
	}
	client := socketFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		path, err := cgroupPath(args[0])
		if err != nil {
			return err
		}
		if err := client().Unenroll(cmd.Context(), admin.EnrollRequest{Cgroup: path}); err != nil {
			return err
		}
		e.printf("un-enrolled %s\n", clean(path))
		return nil
	}
	return cmd
}

func cgroupPath(arg string) (string, error) {
	if filepath.IsAbs(arg) {
		return filepath.Clean(arg), nil
	}
	mount, err := redirect.CgroupMount()
	if err != nil {
		return "", err
	}
	return filepath.Join(mount, arg), nil
}
