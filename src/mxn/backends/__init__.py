"""Adapters: one package or module for each way of running models on some chips."""
