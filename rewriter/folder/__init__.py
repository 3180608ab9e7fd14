"""Models on disk: checkpoints that are read and copied, and the files of a rewritten folder."""
