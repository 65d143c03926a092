"""The library BackPACK: a copy of the network, its passes, and what holds them against our own numbers."""
