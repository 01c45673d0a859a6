"""A controlled study on generated data: how fast models learn, queries, the decoder's self-attention, and scales.

``study.yaml`` is the table of what is trained; the rest runs it cell by cell, and puts results together.
"""
