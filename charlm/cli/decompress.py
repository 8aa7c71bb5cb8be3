"""`charlm decompress`: `charlm compress -d` by another name."""

from charlm.cli.compress import run

__all__ = ["run"]
