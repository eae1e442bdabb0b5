"""What is known: frozen schemas of hardware, checkpoints and engines; files are read, nothing is computed."""
