"""The only way charlm writes and reads files: whole or not at all, and nothing read on trust."""
