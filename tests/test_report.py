import json
from dataclasses import replace

import pytest

from biper_engine.report import ConversionReport, LayerReport

PACKED = LayerReport(
    name="layer1.0.conv1",
    kind="conv2d",
    packed=True,
    reason="",
    shape=(16, 16, 3, 3),
    macs=2_359_296,
    weight_bits_before=73_728,
    weight_bits_after=4_608,
    binary=True,
)
FLOAT = LayerReport(
    name="fc",
    kind="linear",
    packed=False,
    reason="its input has more than two values",
    shape=(10, 64),
    macs=640,
    weight_bits_before=20_480,
    weight_bits_after=20_480,
    zero_weights=3,
)
REPORT = ConversionReport(layers=(PACKED, FLOAT), bytes_before=1_234_567, bytes_after=54_321)


def test_totals_count_layers_by_where_they_run() -> None:
    assert REPORT.packed == 1
    assert REPORT.binary_macs == 2_359_296
    assert REPORT.float_macs == 640


def test_a_report_survives_json() -> None:
    again = ConversionReport.from_dict(json.loads(json.dumps(REPORT.to_dict())))
    assert again == REPORT
    assert hash(again) == hash(REPORT)


def test_the_table_has_a_line_per_layer_and_a_total() -> None:
    lines = str(REPORT).splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["layer1.0.conv1", "bits", "16x16x3x3", "2.36"]
    assert lines[2].split(maxsplit=4) == ["fc", "float", "10x64", "0.00", FLOAT.reason]
    assert "1 of 2 layers packed" in lines[3]
    assert "1,234,567 -> 54,321 bytes" in lines[3]
    assert all(line == line.rstrip() for line in lines)


def test_weights_of_0_and_ties_of_a_packed_layer_are_reported() -> None:
    assert replace(PACKED, zero_weights=1).note == "1 weight is 0"
    assert "1,234 weights are 0; sums of 2 output channels can equal" in str(
        ConversionReport(
            layers=(replace(PACKED, zero_weights=1234, ties=2),), bytes_before=1, bytes_after=1
        )
    )
    assert FLOAT.note == FLOAT.reason


def test_columns_are_aligned_under_their_headings() -> None:
    header, *rows = REPORT.table().splitlines()[:3]
    assert all(
        row.index(word) == header.index("runs on")
        for row, word in zip(rows, ("bits", "float"), strict=True)
    )
    assert rows[1].index(FLOAT.reason) == header.index("why float")


def test_an_empty_report_prints() -> None:
    empty = ConversionReport(layers=(), bytes_before=0, bytes_after=0)
    assert empty.table().splitlines()[-1].startswith("0 of 0 layers packed")
    assert ConversionReport.from_dict(json.loads(json.dumps(empty.to_dict()))) == empty


def test_foreign_keys_are_refused() -> None:
    values = REPORT.to_dict()
    with pytest.raises(KeyError, match="bytes_after"):
        ConversionReport.from_dict({k: v for k, v in values.items() if k != "bytes_after"})
    layers = [{**values["layers"][0], "colour": "red"}]
    with pytest.raises(TypeError, match="colour"):
        ConversionReport.from_dict({**values, "layers": layers})
