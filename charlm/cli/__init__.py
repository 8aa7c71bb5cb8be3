"""The command `charlm`: one module per subcommand, and the only part of charlm that prints.

`__main__` runs it, `parser` declares what it understands, `settings` puts presets, files, variables and
flags together. None of these needs torch, so help and mistakes are answered at once.
"""
