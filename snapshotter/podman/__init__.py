"""podman and CRI-O: stores that containers/storage reads beside its own."""
