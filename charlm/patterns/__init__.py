"""Regular expressions and choices as automata: tables of the tokens that may come next.

Nothing here needs torch or a model. `charlm.patterns.syntax` parses a regular expression as Python does,
`charlm.patterns.automaton` makes the tables, and `charlm.patterns.wishes` makes them for the ids of a
tokenizer.
"""
