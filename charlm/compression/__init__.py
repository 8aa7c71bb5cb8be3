"""Texts in few bytes, with a model that predicts them: lossless, and the same on every machine.

What is predicted well takes few bits (Shannon, "A mathematical theory of communication", 1948). A model says
how likely each character is, an arithmetic coder turns that into bits, and to decompress takes the same
model. Here are bytes in memory; `charlm compress` does it with files.
"""

from charlm.compression.archive import ArchiveInfo, BlockInfo, archive_info
from charlm.compression.codec import compress, decompress, recover

__all__ = ["ArchiveInfo", "BlockInfo", "archive_info", "compress", "decompress", "recover"]
