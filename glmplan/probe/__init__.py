"""How the hardware of a host is read."""
