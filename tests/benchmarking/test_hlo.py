import textwrap

import pytest

from pixart_jax.benchmarking import hlo

TEXT = textwrap.dedent("""
    HloModule jit_step

    %fused (p: f32[4]) -> f32[4] {
      %p = f32[4]{0} parameter(0)
      ROOT %neg = f32[4]{0} negate(%p)
    }

    %body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
      %kernel = ((f32[4]{0:T(8,128)}), u32[]) custom-call(%x, /*index=5*/%y.q), attributes={metadata={
    "blocks":"{\\"size\\": 512}"
    }}, metadata={op_name="jit(step)/kernel"}
      ROOT %f = f32[4]{0} fusion(%kernel), kind=kLoop, calls=%fused
    }

    %condition (state: (s32[], f32[4])) -> pred[] {
      %bound = s32[] constant(7)
      ROOT %lt = pred[] compare(%i, %bound), direction=LT
    }

    ENTRY %main (p0: f32[4]) -> f32[4] {
      %p0 = f32[4]{0} parameter(0)
      ROOT %w = (s32[], f32[4]{0}) while(%p0), condition=%condition, body=%body
    }
""")


def test_a_complex_instruction_is_parsed():
    """It has nested tuples, parentheses in a layout, and metadata that spans several lines."""
    kernel = hlo.parse(TEXT).computations["body"]["kernel"]
    assert kernel.opcode == "custom-call" and kernel.operands == ("x", "y.q")
    assert kernel.result == "((f32[4]{0:T(8,128)}), u32[])" and kernel.computation == "body"
    assert kernel.text.endswith('metadata={op_name="jit(step)/kernel"}')


def test_operands_are_looked_up_in_the_same_computation():
    program = hlo.parse(TEXT)
    (operand,) = program.operands(program.computations["main"]["w"])
    assert operand.opcode == "parameter" and operand.computation == "main"


def test_a_body_runs_once_per_iteration_and_a_condition_is_not_entered():
    found = {one.name: times for one, times in hlo.executed(hlo.parse(TEXT))}
    assert found == {"p0": 1, "w": 1, "kernel": 7, "f": 7, "p": 7, "neg": 7}
    entered = {one.name for one, _ in hlo.executed(hlo.parse(TEXT), lambda one: one.opcode == "while")}
    assert entered == {"p0", "w", "kernel", "f"}


def test_the_trip_count_of_the_compiler_takes_precedence():
    told = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert {one.name: times for one, times in hlo.executed(hlo.parse(told))}["kernel"] == 3
    endless = TEXT.replace("constant(7)", "parameter(0)")
    assert {one.name: times for one, times in hlo.executed(hlo.parse(endless))}["kernel"] is None


def test_bytes_of_types():
    assert (
        hlo.type_bytes("(f32[2,3]{1,0}, bf16[4]{0:T(8,128)}, pred[5]{0}, s32[], token[])") == 24 + 8 + 5 + 4
    )
    assert hlo.shapes("bf16[2,3]{1,0}") == [("bf16", (2, 3))]


def test_text_that_is_not_hlo_raises():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule nothing")
