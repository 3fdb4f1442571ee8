"""Energy: readers of counters and sensors, and windows over them. Unavailable is never zero."""
