"""Texts that obey a pattern: from a regular expression or some choices to tables of what may come next.

Nothing here needs torch, or knows models. `charlm.patterns.syntax` reads a regular expression as Python does,
`charlm.patterns.automaton` makes the tables, `charlm.patterns.wishes` asks for them in a tokenizer's ids.
"""
