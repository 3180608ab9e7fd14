"""Ways out of the rewriter. Import as `kvsink.export`, never as `export`."""
