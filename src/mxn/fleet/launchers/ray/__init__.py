"""Replicas on a Ray cluster: Ray Serve keeps and scales them, mxn plans them and speaks to them. Needs `mxn[ray]`."""
