"""Tests and measurements on a machine with a GPU, in parts that each end within nine minutes.

parts.py lists what each part runs: variants of a model and of how it is run. runner.py runs a part: one process per
variant, a time limit, a record that is written whenever something new is known. child.py is such a process:
cached.py, uncached.py and peers.py measure, tokens.py checks tokens against float32, replay.py counts kernels, and
settings.py turns what a variant asks for into settings of PyTorch and of the package. pytest_part.py runs the tests,
with at_once.py as pytest's plugin. merge.py joins the records of all parts, targets.py compares them with the project's
targets, report.py shows them.
"""
