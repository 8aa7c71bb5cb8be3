"""The compiled engine: the C sources, and what builds, loads and calls them.

Without a compiler everything works, slower: `LanguageModel.why_not_native` tells whether it is used.
"""
