"""Counting in disassembled kernels, on machine code written by hand."""

import pytest
from offline.sass import Instruction, counts, main_loops, parse

LOOP = """
.L_x_1:
    /*0010*/                   LDGSTS.E.BYPASS.128 [R1], [R2] ;
    /*0020*/                   HMMA.16816.F32.BF16 R0, R0, R1, R2 ;
    /*0030*/              @P0 BRA `(.L_x_1) ;
    /*0040*/                   EXIT ;
"""


def test_a_loop_runs_from_its_label_to_its_branch():
    (body,) = main_loops(LOOP)
    assert counts(body) == {"LDGSTS": 1, "HMMA": 1, "BRA": 1}


def test_a_loop_without_matrix_products_is_none():
    assert main_loops(LOOP.replace("HMMA", "FFMA")) == []


def test_blocks_that_wait_behind_the_loop_are_not_counted():
    sass = """
.L_x_1:
    /*0010*/                   HGMMA.64x16x16.F32.BF16 R0 ;
    /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
    /*0030*/                   FFMA R0, R0, R0, R0 ;
    /*0040*/              @P1 BRA `(.L_x_1) ;
    /*0050*/                   EXIT ;
.L_x_3:
    /*0060*/                   SYNCS.PHASECHK R0 ;
    /*0070*/              @!P0 BRA `(.L_x_3) ;
    /*0080*/                   BRA `(.L_x_2) ;
"""
    (body,) = main_loops(sass)
    assert [i.op for i in body] == ["HGMMA", "BRA", "FFMA", "BRA"]


def test_of_nested_loops_the_inner_one_counts():
    sass = """
.L_x_1:
    /*0010*/                   MOV R0, R0 ;
.L_x_2:
    /*0020*/                   HMMA.16816.F32 R0 ;
    /*0030*/              @P0 BRA `(.L_x_2) ;
    /*0040*/              @P1 BRA `(.L_x_1) ;
    /*0050*/                   EXIT ;
"""
    (body,) = main_loops(sass)
    assert [i.op for i in body] == ["HMMA", "BRA"]


def test_a_uniform_branch_may_fall_through():
    sass = """
    /*0010*/                   BRA.U !UP0, `(.L_x_2) ;
.L_x_1:
    /*0020*/                   HMMA.16816.F32 R0 ;
    /*0030*/              @P0 BRA `(.L_x_1) ;
.L_x_2:
    /*0040*/                   EXIT ;
"""
    assert len(main_loops(sass)) == 1


def test_two_loops_are_two():
    second = LOOP.replace(".L_x_1", ".L_x_9").replace("LDGSTS", "LDS")
    first = LOOP.replace("    /*0040*/                   EXIT ;\n", "")
    assert [len(body) for body in main_loops(first + second)] == [3, 3]


@pytest.mark.parametrize(
    "line, size",
    [
        ("LDGSTS.E.BYPASS.128 [R1], [R2]", 16),
        ("LDGSTS.E.64 [R1], [R2]", 8),
        ("LDS R0, [R1]", 4),
        ("STS.U16 [R1], R0", 2),
        ("LDG.E.U8 R0, [R1]", 1),
    ],
)
def test_widths_of_loads_and_stores(line, size):
    (instruction,) = parse(f"    /*0010*/                   {line} ;")
    assert isinstance(instruction, Instruction) and instruction.bytes == size
