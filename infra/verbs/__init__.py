"""The verbs of the command line: each parses, calls its room, and prints what came back."""
