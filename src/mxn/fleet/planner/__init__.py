"""Places deployments on chips: which options, how many replicas, and how far from the best possible that can be."""
