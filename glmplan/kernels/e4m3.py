"""e4m3 (fp8 e4m3fn) by integer operations, for GPUs and compilers without that type.

Decoding is exact in fp16 and bf16: the 7 magnitude bits are placed at fp16's exponent, and the difference of the
exponent biases (15 - 7) is one multiplication by 256, which also makes subnormals right. Bytes 0x7F and 0xFF are NaN.
Encoding rounds to nearest even, saturates and keeps NaN.
Format: OCP 8-bit floating point specification 1.0, E4M3: largest finite 448, no infinities.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_e4m3(bits):
    """uint8 -> float16, exact; NaN bytes become NaN."""
    wide = bits.to(tl.uint16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), half * 256.0).to(tl.float16)


@triton.jit
def decode_e4m3_finite(bits):
    """uint8 -> float16 for bytes known not to be NaN: one shift, one or, one multiplication less checking."""
    wide = bits.to(tl.uint16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return half * 256.0


@triton.jit
def decode_e4m3_bf16(bits):
    """uint8 -> bfloat16, exact, without a detour through fp32; NaN bytes become NaN.

    The 7 magnitude bits sit at bf16's exponent, so the missing bias (127 - 7) is one multiplication by 2**120.
    """
    wide = bits.to(tl.uint16)
    brain = (((wide & 0x80) << 8) | ((wide & 0x7F) << 4)).to(tl.bfloat16, bitcast=True)
    scaled = brain * tl.full([], 1329227995784915872903807060280344576.0, tl.bfloat16)
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), scaled).to(tl.bfloat16)


@triton.jit
def encode_e4m3(values):
    """float32, bfloat16 or float16 -> uint8: nearest even, saturating to 448 (infinities too), NaN kept with its sign.

    Normal results: rebias the exponent and round at bit 20 by adding half a step less one plus the last kept bit.
    Subnormal results (below 2**-6): adding 2**14 makes fp32's own rounding do it, because its last place is then 2**-9.
    torch's cast agrees bit for bit up to 464; above that some torch releases give NaN and others saturate, so clamp to
    +-448 before comparing.
    """
    bits = values.to(tl.float32).to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    capped = tl.minimum(magnitude, 0x43E00000)
    normal = (capped - 0x3C000000 + 0x7FFFF + ((capped >> 20) & 1)) >> 20
    subnormal = (capped.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    finite = tl.where(capped < 0x3C800000, subnormal, normal)
    return (sign | tl.where(magnitude > 0x7F800000, 0x7F, finite)).to(tl.uint8)
