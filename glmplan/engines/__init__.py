"""How a server is started: a plan becomes one argv and one environment per node. Pure."""
