"""The compiled engine: the C sources, and the code that builds, loads and calls them.

Without a compiler, everything works, but slower. `LanguageModel.why_not_native` returns whether it is used.
"""
