"""The SASS parser on hand-written listings."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs the extra triton")

from rhythm.kernels.inspect.sass import AMD_KINDS, NVIDIA_KINDS, Binary, Loop, amd_line, nvidia_line, parse

pytestmark = pytest.mark.triton

NVIDIA = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0020*/                   FFMA R4, R4, UR8, -R2 ;
        /*0030*/                   MUFU.EX2 R5, R4 ;
        /*0040*/              @!P0 FADD.FTZ R6, R6, R5 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/               @P2 BRA `(.L_x_3) ;
.L_x_2:
        /*0070*/                   FSETP.GEU.AND P2, PT, R4, RZ, PT ;
        /*0080*/                   MUFU.EX2 R5, R4 ;
        /*0090*/                   FMUL R5, R5, R7 ;
        /*00a0*/                   STL [R1], R5 ;
        /*00b0*/                   SHFL.BFLY PT, R9, R8, 0x1, 0x1f ;
        /*00c0*/                   FMNMX R9, R9, R8, !PT ;
        /*00d0*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*00e0*/                   EXIT ;
.L_x_4:
        /*00f0*/                   BRA `(.L_x_4) ;
"""

AMD = """
kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	v_exp_f32_e32 v4, v4
	v_fma_f32 v5, v4, s2, v6
	v_cndmask_b32_e32 v7, v7, v8, vcc
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	s_endpgm
"""


def test_nvidia_loops() -> None:
    opcodes, loops = parse(NVIDIA, nvidia_line)
    assert len(opcodes) == 16
    assert [len(loop.opcodes) for loop in loops] == [5, 7, 1]
    assert loops[0].opcodes[0] == "HGMMA.64x128x16.F32.BF16"
    binary = Binary(registers=0, spills=0, matrix={}, loops=loops, kinds=NVIDIA_KINDS)
    # The loop with the fewest instructions per exponential, not the shortest loop.
    assert binary.steady is loops[0]
    assert loops[0].mix(NVIDIA_KINDS) == {
        "exp2": 1, "fma": 1, "add": 1, "multiply": 0, "max": 0, "select": 0, "matrix": 1, "load": 0, "shuffle": 0,
        "other": 1,
    }  # fmt: skip
    mix = loops[1].mix(NVIDIA_KINDS)
    assert (mix["select"], mix["multiply"], mix["shuffle"], mix["max"], mix["other"]) == (1, 1, 1, 1, 2)
    assert binary.leanest("max") is loops[1]


def test_amd_loop() -> None:
    opcodes, loops = parse(AMD, amd_line)
    assert opcodes[0] == "s_load_dwordx2"
    (loop,) = loops
    mix = loop.mix(AMD_KINDS)
    assert (mix["matrix"], mix["exp2"], mix["fma"], mix["select"], mix["other"]) == (1, 1, 1, 1, 1)


def test_without_exponentials_there_is_no_steady_loop() -> None:
    _, loops = parse(NVIDIA, nvidia_line)
    assert Binary(0, 0, {}, loops[2:], NVIDIA_KINDS).steady is None


def loop_of(lines: str) -> Loop:
    _, (loop,) = parse(f".L_x_1:\n{lines}\n /*0f0*/ BRA `(.L_x_1) ;\n", nvidia_line)
    return loop


HGMMA = " /*010*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT, gsb0 ;\n"
WAIT = " /*020*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
KEEP = " /*030*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;\n"
MATH = " /*040*/ FFMA R4, R4, UR8, -R2 ;\n"
MOVE = " /*050*/ UIADD3 UR4, UR4, 0x2, URZ ;\n"
BARRIER = " /*060*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;\n"


def test_products_waited_for_at_once() -> None:
    """A wait counts if no arithmetic stands between the product and it; address arithmetic is not counted as such."""
    assert loop_of(HGMMA + HGMMA + MOVE + WAIT + MATH).immediate_waits == 1
    assert loop_of(HGMMA + MATH + WAIT).immediate_waits == 0
    assert loop_of(HGMMA + KEEP + MATH + WAIT).immediate_waits == 0
    assert loop_of(HGMMA + WAIT + MATH + HGMMA + WAIT + MATH).immediate_waits == 2
    assert loop_of(MATH + WAIT).immediate_waits == 0


def test_barriers() -> None:
    assert loop_of(BARRIER + MATH + BARRIER + WAIT).barriers == 2
    _, (amd,) = parse(AMD.replace("v_exp_f32_e32 v4, v4", "s_barrier"), amd_line)
    assert amd.barriers == 1
