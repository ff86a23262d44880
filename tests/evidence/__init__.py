"""What the kernels have been shown to do without a GPU, per room and layer, kept with a hash of what it rests on.

`./run evidence` makes what is stale; tests/evidence/test_evidence.py fails on what is.
"""
