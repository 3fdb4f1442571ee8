"""The engine: sequences, KV blocks, prefix cache and step scheduler. No torch; any executor."""
