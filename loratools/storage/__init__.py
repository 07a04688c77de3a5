"""Bytes on disk: strict reading, streaming writing, and output paths that are never torn."""
