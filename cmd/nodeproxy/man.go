package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// newMan writes the man pages that packages bring along. $SOURCE_DATE_EPOCH dates them.
func newMan(_ *env) *cobra.Command {
	return &cobra.Command{
		Use:     "man",
		Hidden:  true,
		Short:   "Write the man pages into a directory",
		Example: "  nodeproxy man /usr/local/share/man/man1",
		Args:    exactly("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return fmt.Errorf("write man pages: %w", err)
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			header := &doc.GenManHeader{Section: "1", Source: "nodeproxy", Manual: "nodeproxy"}
			if err := doc.GenManTree(root, header, args[0]); err != nil {
				return fmt.Errorf("write man pages: %w", err)
			}
			return nil
		},
	}
}
