"""The demonstration: its own material from a public-domain portrait, and the whole chain on it."""
