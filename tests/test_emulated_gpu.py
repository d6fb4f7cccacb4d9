"""The emulated GPU: it computes as PTX says, and it finds what a GPU would not forgive."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux alone")
from emulated_gpu import Launcher
from ptx_program import Fault

PROGRAM = """
.visible .entry f(
	.param .u64 .ptr .global .align 1 f_param_0,
	.param .u64 .ptr .global .align 1 f_param_1,
	.param .u64 .ptr .global .align 1 f_param_2
)
{
	ld.param.b64 %rd0, [f_param_0];
	mov.u32 %r0, %tid.x;
	mad.wide.u32 %rd1, %r0, 4, %rd0;
BODY
	ret;
$L__func_end0:
}
"""
"""%rd0 is the address of a tensor, %r0 the number of the thread, and %rd1 the address of the thread's element, of four bytes."""


class Compiled:
    """What a launch knows of its kernel: it has a pointer, two warps and some shared memory."""

    signature = {"out": "*i32"}  # noqa: RUF012
    num_warps, shared = 2, 1024


def launched(body: str, elements: int = 64) -> np.ndarray:
    """Returns the tensor, of zeros, after one program has run."""
    out = torch.zeros(elements, dtype=torch.int32)
    lines = "".join(f"\t{line};\n" if not line.endswith(":") else f"{line}\n" for line in body.split("; "))
    Launcher(Compiled, Compiled)(1, 1, 1, None, PROGRAM.replace("BODY\n", lines), None, None, None, None, out)
    return out.numpy()


THREADS = np.arange(64)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mul.lo.s32 %r1, %r0, -3; st.global.b32 [ %rd1 + 0 ], { %r1 }", -3 * THREADS),
        ("shfl.sync.bfly.b32 %r1, %r0, 8, 31, -1; st.global.b32 [%rd1], %r1", THREADS ^ 8),
        ("shr.u32 %r1, %r0, 40; sub.s32 %r1, %r1, 1; shr.s32 %r1, %r1, 40; st.global.b32 [%rd1], %r1", -np.ones(64)),
        ("bfe.u32 %r1, %r0, 1, 3; st.global.b32 [%rd1], %r1", THREADS >> 1 & 7),
        ("prmt.b32 %r1, %r0, 0x81, 0x4C00; st.global.b32 [%rd1], %r1", 0x81 << 24 | 255 * 65536 | THREADS * 257),
        ("setp.lt.u32 %p1, %r0, 40; @!%p1 st.global.b32 [%rd1], %r0", THREADS * (THREADS >= 40)),
        # 0x3F808000 lies halfway between two numbers of bf16, of which the even one is taken.
        ("cvt.rn.bf16x2.f32 %r1, 0f3F808000, 0f3F818000; st.global.b32 [%rd1], %r1", np.full(64, 0x3F803F82)),
        # −0 is below 0, and of NaN and a number the number is the larger one.
        ("max.f32 %r1, 0f80000000, 0f00000000; max.f32 %r1, %r1, 0f7FC00000; st.global.b32 [%rd1], %r1", np.zeros(64)),
        # The ways of the threads part, and they meet again before they exchange something.
        (
            "mov.b32 %r1, 5; setp.lt.u32 %p1, %r0, 40; @%p1 bra $L__BB0_1; add.s32 %r1, %r0, %r1; $L__BB0_1:; "
            "shfl.sync.idx.b32 %r2, %r1, 9, 31, -1; st.global.b32 [%rd1], %r2",
            np.where(THREADS < 32, 5, 41 + 5),
        ),
        (
            "mul.lo.s32 %r1, %r0, 4; st.shared.b32 [%r1], %r0; bar.sync 0; xor.b32 %r1, %r1, 128; ld.shared.b32 %r2, [%r1]; "
            "st.global.b32 [%rd1], %r2",
            THREADS ^ 32,
        ),
    ],
)  # fmt: skip
def test_what_instructions_compute(body, expected):
    assert launched(body).tolist() == expected.astype(np.int64).astype(np.int32).tolist()


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("st.global.b32 [%rd1+4], %r0", "outside of the tensors"),
        ("ld.global.b32 %r1, [%rd1+-4]", "outside of the tensors"),
        ("st.global.b32 [%rd1+2], %r0", "no multiple of it"),
        ("st.global.b32 [%rd0], %r0", "tensor 0 of the launch is written that another warp touches"),
        ("ld.global.b32 %r1, [%rd0]; st.global.b32 [%rd1], %r0", "tensor 0 of the launch is written that another warp"),
        ("st.global.b32 [%rd1], %r0; ld.global.b32 %r1, [%rd0+128]", "tensor 0 of the launch is read that another warp"),
        ("mul.lo.s32 %r1, %r0, 4; st.shared.b32 [%r1], %r0; xor.b32 %r1, %r1, 128; ld.shared.b32 %r2, [%r1]", "shared memory is read"),
        ("st.shared.b32 [1024], %r0", "outside of shared memory"),
        ("setp.lt.u32 %p1, %r0, 40; @%p1 bra $L__BB0_1; bar.sync 0; $L__BB0_1:", "never reach a barrier"),
        ("setp.lt.u32 %p1, %r0, 40; @%p1 shfl.sync.bfly.b32 %r1, %r0, 8, 31, -1", "only some of the threads of a warp"),
        ("dance.b32 %r1, %r0", "not known here"),
        ("mul.hi.u32 %r1, %r0, %r0", "not known here"),
    ],
)  # fmt: skip
def test_what_a_gpu_does_not_forgive(body, fault):
    with pytest.raises(Fault, match=fault):
        launched(body)
