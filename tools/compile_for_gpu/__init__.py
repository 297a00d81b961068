"""Compiles for GPUs that are not there, and lists what a decode step and a chunk of a prompt will launch.

devices.py lets PyTorch and Triton believe in a GPU. inspector.py takes the place of the engine's StepCompiler: it
calls `torch.compile` as the engine does and keeps what Inductor makes of each part. steps.py runs a decode step and a
chunk on tensors without memory. kernels.py compiles our own Triton kernels, binaries.py and slots.py read machine code,
main.py writes the record. emulator/ runs the fused step's kernels as PTX, for tests.
"""
