"""How people start things: the command line, the demonstration, the checks of a machine."""
