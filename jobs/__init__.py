"""The commands: each reads a configuration, calls one pipeline and sets the exit code."""
