"""How a command reaches a host: this machine, SSH, or a scripted stand-in for many hosts."""
