"""FirstByte as a snapshotter of containerd: the gRPC service, its records and its directories."""
