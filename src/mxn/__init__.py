"""mxn: run M models on N kinds of chips and say what every pair yields in tokens/s, watts and tokens per watt."""

__version__ = "0.1.0"
