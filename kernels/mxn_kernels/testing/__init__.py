"""What tests, ahead-of-time compilation and benchmarks of the ops share, shipped so that a chip's vendor can run it too."""
