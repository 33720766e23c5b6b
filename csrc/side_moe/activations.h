// The experts' activation functions and their derivatives.
#pragma once

#include "cpu/vec.h"
#include "side_moe/kernels.h"

namespace xsmoe::XSMOE_ISA {
namespace {

using side_moe::Activation;

// Call body<activation>() for the activation that a call names.
template <class Body>
void with_activation(Activation activation, const Body& body) {
    switch (activation) {
        case Activation::gelu:
            return body.template operator()<Activation::gelu>();
        case Activation::gelu_tanh:
            return body.template operator()<Activation::gelu_tanh>();
        case Activation::relu:
            return body.template operator()<Activation::relu>();
    }
}

// Return the cumulative distribution function of the standard normal at x: 1/2 + x P(x^2) / Q(x^2), a minimax fit
// (error 1.2e-8 before rounding) whose terms are all positive. Beyond 5.6 it is 0 or 1 in float32.
XSMOE_INLINE Vec normal_distribution(Vec x) {
    const Vec w = x * x;
    Vec p = w * 2.1580270015419956e-08f + 6.3740499172126874e-06f;
    p = p * w + 0.0001793865958461538f;
    p = p * w + 0.004740784410387278f;
    p = p * w + 0.03494051471352577f;
    p = p * w + 0.3989422023296356f;
    Vec q = w * 1.1649514135569916e-06f + 7.676506356801838e-05f;
    q = q * w + 0.001944512827321887f;
    q = q * w + 0.02926030568778515f;
    q = q * w + 0.25424835085868835f;
    q = q * w + 1.0f;
    const Vec inside = x * (p * reciprocal(q)) + 0.5f;
    return x > 5.6f ? splat(1.0f) : x < -5.6f ? Vec{} : inside;
}

XSMOE_INLINE Vec normal_density(Vec x) { return exp_negative(x * x * -0.5f) * 0.39894228f; }

// a = activation(x) and its derivative at x.
struct Activated {
    Vec value, slope;
};

template <Activation activation>
XSMOE_INLINE Activated activate(Vec x) {
    if constexpr (activation == Activation::relu) {
        return {x < 0.0f ? Vec{} : x, x > 0.0f ? splat(1.0f) : Vec{}};  // NaN stays NaN
    } else if constexpr (activation == Activation::gelu) {
        const Vec share = normal_distribution(x);
        return {x * share, share + x * normal_density(x)};
    } else {
        // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3)
        const Vec square = x * x;
        const Vec twice_u = x * (1.5957691216f + square * 0.0713548162726f);
        const Vec slope_of_twice_u = 1.5957691216f + square * 0.2140644488178f;
        const Vec magnitude = bit_cast<Vec>(bit_cast<BitVec>(twice_u) & 0x7fffffffu);
        const Vec decayed = exp_negative(-magnitude);
        const Vec half = reciprocal(1.0f + decayed);
        const Vec gate = twice_u < 0.0f ? decayed * half : half;
        const Vec bend = decayed * half * half;  // gate (1 - gate), computed without cancellation
        // For large |x| `bend` is 0 and its factors may be infinite.
        return {x * gate, bend == 0.0f ? gate : gate + x * bend * slope_of_twice_u};
    }
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA
