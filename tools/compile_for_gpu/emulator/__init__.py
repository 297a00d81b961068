"""Runs the PTX that Triton compiles, on a CPU: a kernel's numbers without a GPU, compiler and inline assembly included.

Triton's interpreter runs the kernel's Python; this runs the compiler's output, and so finds wrong code of the compiler,
wrong inline assembly, and missing barriers. device.py stands in for a GPU; program.py reads PTX; block.py runs the
threads of a block in lockstep, branches included; memory.py holds global and shared memory; numbers.py gives registers
a type; transfers.py, arithmetic.py, bits.py and warps.py hold the instructions that the fused step's kernels have.

An `EmulatorError` is raised
- for an instruction or a modifier that is not known;
- for an access outside of the buffers, misaligned, or of bytes that nothing wrote, and for a write to a constant;
- for an address, a branch, a tensor core's operand or a stored number that depends on a register that nothing wrote;
- for an access to anything but constants before the kernel has waited for the previous one;
- for shared memory that one warp writes and another accesses without a barrier between them. Asynchronous copies arrive
  when they are waited for, and not before.

Not modelled: time, banks, caches and clusters; the order of warps between barriers, and of threads in a warp; the few
bits by which approximate instructions (ex2.approx, div.full) and the order of sums in tensor cores differ from exact
arithmetic, rounded once, which is used here; what the assembler makes of PTX.
Source of all semantics: NVIDIA, Parallel Thread Execution ISA.
"""
