"""The terminal: the only room that knows Typer and Rich. A command parses, calls and prints."""
