package main

import (
	"errors"

	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/config"
	"nodeproxy.io/nodeproxy/file"
)

func newCA(e *env) *cobra.Command {
	ca := &cobra.Command{
		Use:     "ca",
		Short:   "Manage the built-in certificate authority of the file source",
		Example: "  nodeproxy ca rotate --config /etc/nodeproxy",
		Args:    noSuchCommand,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	rotate := &cobra.Command{
		Use:   "rotate",
		Short: "Make a new root",
		Long: "Makes a new root for the mesh of the file source, cross-signed by the old one. Every daemon that has the directory\n" +
			"issues from it as soon as it sees it; those that have not seen it yet still verify. No connection fails.",
		Example: "  nodeproxy ca rotate --config /etc/nodeproxy",
		Args:    exactly(),
	}
	path := configFlag(rotate)
	rotate.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := config.Load(*path)
		if err != nil {
			return err
		}
		if cfg.Consul != nil {
			return errors.New("make a new root: the source is Consul, which rotates its CA itself: consul connect ca set-config")
		}
		if err := file.Rotate(cmd.Context(), cfg.Source.Path); err != nil {
			return err
		}
		e.printf("made a new root for %s\n", clean(cfg.Source.Path))
		return nil
	}
	ca.AddCommand(rotate)
	return ca
}
