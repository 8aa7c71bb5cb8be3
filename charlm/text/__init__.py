"""From text to ids and back: tokenizers, and where texts come from."""
