"""The models: a bigram table and the GPT family, one interface for both, and how they are saved."""
