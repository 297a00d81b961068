// Makes the operations known to PyTorch as torch.ops.qwen3fast. In a file of its own: this header takes the compiler as
// long as everything else here.

#include <torch/library.h>

#include "ops.h"

TORCH_LIBRARY_FRAGMENT(qwen3fast, library) {
  library.def("matvec(Tensor x, Tensor weight) -> Tensor");
  library.def("quantized_linear(Tensor x, Tensor[] packed, Tensor[] scale) -> Tensor");
  library.def("quantized_rows(Tensor packed, Tensor scale, Tensor row) -> Tensor");
  library.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor position, Tensor? k_scale=None, Tensor? v_scale=None) -> "
      "Tensor");
  library.def(
      "prefill_attention(Tensor q, Tensor k, Tensor v, Tensor position, Tensor row, Tensor? k_scale=None, "
      "Tensor? v_scale=None) -> Tensor");
  library.def(
      "decode_layers(Tensor x, Tensor cos, Tensor sin, Tensor position, Tensor(a!)[] keys, Tensor(b!)[] values, "
      "Tensor(c!)[] key_scales, Tensor(d!)[] value_scales, Tensor[] norms, Tensor[] weights, Tensor[] scales, float eps) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(qwen3fast, CPU, library) {
  library.impl("matvec", &qwen3fast::matvec);
  library.impl("quantized_linear", &qwen3fast::quantized_linear);
  library.impl("quantized_rows", &qwen3fast::quantized_rows);
  library.impl("decode_attention", &qwen3fast::decode_attention);
  library.impl("prefill_attention", &qwen3fast::prefill_attention);
  library.impl("decode_layers", &qwen3fast::decode_layers);
}
