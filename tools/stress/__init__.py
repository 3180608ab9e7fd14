"""kvsink.tools.stress: long random trials of what must never lose anything; see `python -m kvsink.tools.stress --help`."""
