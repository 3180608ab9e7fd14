"""Graph rewrites, one per file. Import as `kvsink.passes`, never as `passes`."""
