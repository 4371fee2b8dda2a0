"""Images for benchmarks, made from Debian and PyPI packages on a machine without other images."""
