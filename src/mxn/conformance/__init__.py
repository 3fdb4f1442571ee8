"""The conformance kit: what a backend must do to be trusted with any model, proven by doing it.

L0 contract, L1 lifecycle, L2 truth of its figures, L3 numerics, L4 a measured profile. Everything above L0 goes through
a real replica process, so that executors and servers are judged by the same checks. Needs no torch: the reference
decoder and the tiny models are the kit's own.
"""
