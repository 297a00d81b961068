// The operations of this folder; each is described where it is defined.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace qwen3fast {

using Factors = std::optional<at::Tensor>;  // of an int8 cache

at::Tensor matvec(const at::Tensor& x, const at::Tensor& weight);
at::Tensor quantized_linear(const at::Tensor& x, at::TensorList packed, at::TensorList scale);
at::Tensor quantized_rows(const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& row);
at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& position,
                            const Factors& k_scale, const Factors& v_scale);
at::Tensor prefill_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& position,
                             const at::Tensor& row, const Factors& k_scale, const Factors& v_scale);
at::Tensor decode_layers(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& position,
                         at::TensorList keys, at::TensorList values, at::TensorList key_scales,
                         at::TensorList value_scales, at::TensorList norms, at::TensorList weights,
                         at::TensorList scales, double eps);

}  // namespace qwen3fast
