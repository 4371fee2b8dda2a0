"""From "run this image" on an empty node to "the workload answers", measured."""
