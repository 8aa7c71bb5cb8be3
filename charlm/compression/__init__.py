"""Lossless compression of texts with a model that predicts them; the bytes are the same on every machine.

A character with a high probability takes few bits (Shannon, "A mathematical theory of communication", 1948).
The model gives the probabilities, and an arithmetic coder turns them into bits. Decompression needs the same
model. The functions work on bytes in memory; `charlm compress` works on files.
"""

from charlm.compression.archive import ArchiveInfo, BlockInfo, archive_info
from charlm.compression.codec import compress, decompress, recover

__all__ = ["ArchiveInfo", "BlockInfo", "archive_info", "compress", "decompress", "recover"]
