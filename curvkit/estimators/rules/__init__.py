"""How parameters enter the calls of a forward pass, example by example."""
