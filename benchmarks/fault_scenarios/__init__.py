"""What breaks in a fleet, and what its clients see of it."""
