"""Command lines: thin mains over the package. Import as `kvsink.tools`, never as `tools`."""
