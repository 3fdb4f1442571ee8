"""Workloads, load generation, records and reports."""
