"""Shows the main job on this machine: `firstbyte demo`."""
