"""A network link of known bandwidth and round-trip time between this machine and a registry."""
