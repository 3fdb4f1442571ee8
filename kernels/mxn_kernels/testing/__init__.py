"""What tests, compilation ahead of time and benchmarks of the ops share; shipped, so that vendors can use it."""
