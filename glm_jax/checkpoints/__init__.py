"""Model folders on disk: reading, writing, checksums."""
