"""The command `charlm`: one module per subcommand, and the only part of charlm that prints.

`__main__` runs it and `parser` declares what it understands. A training goes through five modules: `train`
reads what was asked for, `settings` puts presets, files, variables and flags together, `plan` works out what
the training is going to be, `fit` does it, and `report` says it. `inspect` describes a text, and `guess` asks
the same plan what a training on it may come to. Help and mistakes are answered at once, without torch.
"""
