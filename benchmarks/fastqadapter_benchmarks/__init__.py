"""The benchmarks of fastqadapter: every claim against a real peer, on the reader's own machine.

`fastqadapter bench` runs the suites (`test_*.py`, pytest-benchmark) and writes a table and plots; each also runs alone,
`pytest benchmarks/fastqadapter_benchmarks/test_loss.py`. `race.py` has the protocol of all of them.
"""
