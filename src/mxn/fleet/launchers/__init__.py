"""Ways to start a replica process."""
