"""Files that differ from the output of `save`: all are refused with a reason, and none crashes."""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from biper_engine.engine import Engine, load
from biper_engine.errors import FileFormatError
from biper_engine.serialization.container import read
from biper_engine.serialization.native_program import SEAL, seal_of
from tests.networks_by_hand import classifier

Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]

FEW = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "net.biper"
    classifier().save(path)
    return path


@pytest.fixture(scope="module")
def blob(path: Path) -> bytes:
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "net.biper"


def refuse(scratch: Path, data: bytes, message: str | None = None) -> None:
    scratch.write_bytes(data)
    with pytest.raises(FileFormatError, match=message) as caught:
        load(scratch)
    assert str(scratch) in str(caught.value)


def sealed(header: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """Make a file with right sums, whatever its header says."""
    if SEAL in header:
        header = {**header, SEAL: seal_of(header, tensors)}
    header = {**header, "sha256": "0" * 64}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    data = safetensors.torch.save(tensors, {"biper": text})
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


def edited(path: Path, edit: Edit) -> bytes:
    header, tensors = read(path)
    edit(header, tensors)
    return sealed(header, tensors)


def node(header: dict[str, Any], name: str) -> Any:
    return next(n for n in header["graph"] if n.get("name") == name)


def arguments(header: dict[str, Any], name: str) -> Any:
    return node(header, name)["args"]


def test_an_absent_file_is_the_usual_error(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^Cannot read '.*absent\.biper': there is no such"
    ):
        load(tmp_path / "absent.biper")


def test_a_link_to_itself_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.biper").symlink_to("a.biper")
    with pytest.raises(OSError, match=r"^Cannot read '.*a\.biper': it is a symbolic link that lea"):
        load(tmp_path / "a.biper")


@pytest.mark.parametrize("size", [0, 1, 8])
def test_a_tiny_file_is_refused(scratch: Path, size: int) -> None:
    refuse(scratch, b"\x10" * size, f"is {size} bytes, too short")


def test_a_torch_checkpoint_is_recognised(scratch: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, scratch)
    assert zipfile.is_zipfile(scratch)
    refuse(scratch, scratch.read_bytes(), "this is a torch checkpoint .*run `biper convert` on it")
    torch.save({"weight": torch.zeros(3)}, scratch, _use_new_zipfile_serialization=False)
    refuse(scratch, scratch.read_bytes(), "this is a pickle, .*run `biper convert` on it")


def test_a_pickle_is_never_executed(scratch: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return scratch.with_suffix(".exploded").touch, ()

    refuse(scratch, pickle.dumps(Bomb()), "not a .biper file: this is a pickle")
    assert not scratch.with_suffix(".exploded").exists()


@pytest.mark.parametrize("data", [b"# a README, long enough\n", b"\xff" * 100, b"\0" * 100])
def test_any_other_file_is_refused(scratch: Path, data: bytes) -> None:
    refuse(scratch, data, "not a .biper file: this is of an unknown kind; pass a file that")


def test_plain_safetensors_are_recognised(scratch: Path) -> None:
    data = safetensors.torch.save({"weight": torch.zeros(3)}, {"format": "pt"})
    refuse(scratch, data, "safetensors file without the header `biper`")


def test_missing_bytes_are_counted_in_the_message(scratch: Path, blob: bytes) -> None:
    wanted = f"file is {len(blob) - 5:,} bytes, header promises {len(blob):,}"
    refuse(scratch, blob[:-5], wanted)
    refuse(scratch, blob[:100], "file is 100 bytes, its header alone needs")


def test_bytes_after_the_end_are_counted_in_the_message(scratch: Path, blob: bytes) -> None:
    refuse(scratch, blob + b"abc", f"file is {len(blob) + 3:,} bytes, header promises")


def test_a_newer_format_asks_for_an_upgrade(scratch: Path, path: Path) -> None:
    data = edited(path, lambda h, t: h.update(format=1))
    refuse(scratch, data, "has format 1, .* reads up to 0; upgrade with `pip install -U")


@pytest.mark.parametrize("version", [-1, None, "0", 0.0, True])
def test_a_wrong_format_is_refused(scratch: Path, path: Path, version: Any) -> None:
    refuse(scratch, edited(path, lambda h, t: h.update(format=version)), "format")


def test_an_edited_header_fails_the_checksum(scratch: Path, blob: bytes) -> None:
    assert blob.count(b"MIT") == 1
    refuse(scratch, blob.replace(b"MIT", b"BSD"), "was edited or damaged: its SHA-256 is not")


def test_an_edited_tensor_fails_the_checksum(scratch: Path, blob: bytes) -> None:
    refuse(scratch, blob[:-1] + bytes([blob[-1] ^ 1]), "was edited or damaged")


@MANY
@given(data=st.data())
def test_no_flipped_byte_goes_unseen(scratch: Path, blob: bytes, data: st.DataObject) -> None:
    header_end = 8 + int.from_bytes(blob[:8], "little")
    last = data.draw(st.sampled_from([16, header_end, len(blob)])) - 1
    position = data.draw(st.integers(0, last))
    flip = data.draw(st.integers(1, 255))
    refuse(scratch, blob[:position] + bytes([blob[position] ^ flip]) + blob[position + 1 :])


@MANY
@given(length=st.integers(0, 100_000))
def test_no_truncation_goes_unseen(scratch: Path, blob: bytes, length: int) -> None:
    refuse(scratch, blob[: length % len(blob)])


def _set(name: str, key: str, value: Any) -> Edit:
    return lambda h, t: arguments(h, name).__setitem__(key, value)


def _forward_reference(h: dict[str, Any], t: dict[str, Tensor]) -> None:
    arguments(h, "stem_bits")["x"] = {"node": "total"}


def _cycle(h: dict[str, Any], t: dict[str, Tensor]) -> None:
    arguments(h, "total")["self"] = {"node": "total"}


def _narrower_weight(h: dict[str, Any], t: dict[str, Tensor]) -> None:
    t["layer1.0.conv1.weight"] = t["layer1.0.conv1.weight"][..., :1].contiguous()


def _float_weight(h: dict[str, Any], t: dict[str, Tensor]) -> None:
    t["layer1.0.conv1.weight"] = t["layer1.0.conv1.weight"].float()


def _rename(name: str) -> Edit:
    def rename(h: dict[str, Any], t: dict[str, Tensor]) -> None:
        text = json.dumps(h["graph"]).replace('"stem_bits"', json.dumps(name))
        h["graph"] = json.loads(text)

    return rename


def _rename_tensor(name: str) -> Edit:
    def rename(h: dict[str, Any], t: dict[str, Tensor]) -> None:
        t[name] = t.pop("fc.bias")
        node(h, "fc_bias")["tensor"] = name

    return rename


def _dtype(tensor: str, dtype: torch.dtype) -> Edit:
    return lambda h, t: t.update({tensor: t[tensor].to(dtype)})


def _values(tensor: str, value: Any) -> Edit:
    return lambda h, t: t.update({tensor: torch.full_like(t[tensor], value)})


def _other_channels(h: dict[str, Any], t: dict[str, Tensor]) -> None:
    """A packed map of 40 channels has as many words as one of 64."""
    arguments(h, "layer2_0")["in_channels"] = 64


def _float_operator_on_bits(h: dict[str, Any], t: dict[str, Tensor]) -> None:
    node(h, "shortcut").update(op="abs", args={"self": {"node": "layer1_0_bits"}})


BAD_EDITS: list[tuple[Edit, str]] = [
    (_dtype("fc.weight", torch.bool), "'logits' .*does not fit.*`weight` must be"),
    (_dtype("fc.weight", torch.uint8), "'logits' .*does not fit.*`weight` must be"),
    (_dtype("fc.bias", torch.float64), "'logits' .*does not fit.*`bias` must be"),
    (_dtype("conv1.weight", torch.int64), "'stem' .*does not fit.*`weight` must be"),
    (_dtype("layer1.0.conv1.multiplier", torch.int32), "`multiplier` must be torch.float32"),
    (_dtype("layer1.0.conv1.sense", torch.uint8), "`sense` must be torch.bool"),
    (_values("layer1.0.conv1.multiplier", float("nan")), "`multiplier` .* not finite"),
    (_values("layer1.0.conv1.threshold", float("nan")), "`threshold` .* not finite"),
    (_values("layer1.0.conv1.weight", -1), "`weight` has bits after its 33 channels"),
    (_other_channels, "`bits` must be a packed map of 64 channels, but it is .* of 40 channels"),
    (_float_operator_on_bits, "`self` is a packed map, which only operators on bits take"),
    (_set("layer1_0", "in_channels", True), "`in_channels` must be an integer"),
    (_set("layer1_0", "in_channels", 33.0), "`in_channels` must be an integer"),
    (_set("layer1_0", "dtype", 6), "`dtype` must be float32, float16 or bfloat16"),
    (_set("layer1_0", "dtype", {"dtype": "int8"}), "`dtype` must be float32, float16 or"),
    (
        _set("layer1_0", "clamp_min", {"float": "nan"}),
        "`clamp_min` must be a number that float32 can hold",
    ),
    (_set("layer1_0", "clamp_min", -1e39), "`clamp_min` must be a number that float32 can hold"),
    (_set("total", "other", 1e39), "`other` .=1e.39. is more than 3.4"),
    (_set("total", "alpha", 1e39), "`alpha` .=1e.39. is more than 3.4"),
    (_set("layer1_0", "stride", 1), "`stride` must be 2 integers"),
    (_set("layer1_0", "pool_stride", [1, 1 << 31]), "`pool_stride` must be 2 integers"),
    (_set("layer1_0", "residual", {"node": "stem_bits"}), "`residual` is a packed map"),
    (_set("layer1_0", "gate", {"node": "stem_bits"}), "`gate` is a packed map"),
    (_set("layer1_0", "gate", {"node": "stem"}), "`gate` .* for each image and channel, or for"),
    (
        _set("layer1_0", "offset", {"node": "layer1_0_conv1_multiplier"}),
        "`offset` needs a gate",
    ),
    (_set("stem", "groups", True), "`groups` must be an integer"),
    (_set("stem", "stride", [1 << 40, 1]), "`stride` must be 1 or 2 or 3 integers"),
    (_set("pool", "padding", [2, 2]), "'pool' .*`padding` .* half of `kernel_size`"),
    (_set("total", "alpha", "1"), "`alpha` must be a number"),
    (_set("flat", "shape", [{"node": "mean"}, 33]), "`shape` must be sizes"),
    (_set("flat", "shape", [2, 33]), "'flat' .*does not fit"),
    (_set("mean", "keepdim", 1), "`keepdim` must be true or false"),
    (lambda h, t: h["proof"].update(seed=-1), "wrong proof"),
    (lambda h, t: h["proof"].update(bound=0), "wrong proof"),
    (lambda h, t: h["proof"].update(values=[True]), "wrong proof"),
    (lambda h, t: h["proof"].update(outputs=["0"]), "wrong proof"),
    (lambda h, t: h["report"].update(bytes_after=-1), "wrong entry `report`"),
    (lambda h, t: h["report"].update(bytes_after=10**30), "wrong entry `report`"),
    (lambda h, t: h["metadata"].update(crop_pct=True), "wrong entry `metadata`"),
    (_set("layer1_0", "in_channels", 64 + 1), "'layer1_0' .*does not fit"),
    (_set("layer1_0", "in_channels", -33), "'layer1_0' .*does not fit"),
    (_set("layer1_0", "in_channels", 1 << 62), "'layer1_0' .*does not fit"),
    (_set("layer1_0", "in_channels", 1 << 70), "'layer1_0' has an unknown value"),
    (_set("layer1_0", "in_channels", "33"), "'layer1_0' .*does not fit"),
    (_set("layer1_0", "stride", [-1, 1]), "'layer1_0' .*does not fit"),
    (_set("layer1_0", "stride", [0, 1]), "'layer1_0' .*does not fit"),
    (_set("layer1_0", "stride", {"node": "stem"}), "'layer1_0' .*does not fit"),
    (_set("layer1_0", "padding", [1 << 40] * 4), "'layer1_0' .*does not fit"),
    (_set("layer1_0", "groups", 0), "'layer1_0' .*does not fit"),
    (_set("layer1_0", "dtype", {"dtype": "float64"}), "'layer1_0' .*does not fit"),
    (_set("layer1_0", "dtype", {"dtype": "float128"}), "'layer1_0' has an unknown value"),
    (_set("layer1_0", "dtype", {"float": "huge"}), "'layer1_0' has an unknown value"),
    (_set("layer1_0", "prepacked", {"node": "stem"}), "'layer1_0' has unknown arguments"),
    (_set("pool", "kernel_size", [100, 100]), "'pool' .*does not fit"),
    (_set("stem", "stride", [0, 0]), "'stem' .*does not fit"),
    (_set("stem", "groups", 0), "'stem' .*does not fit"),
    (_set("stem", "padding", [-9, -9]), "'stem' .*does not fit"),
    (_set("shortcut", "kernel_size", [0, 0]), "'shortcut' .*does not fit"),
    (_set("shortcut", "stride", [0, 0]), "'shortcut' .*does not fit"),
    (_set("flat", "shape", [-1, 34]), "'flat' .*does not fit"),
    (_set("mean", "dim", [9]), "'mean' .*does not fit"),
    (_set("total", "other", {"node": "absent"}), "'absent', which is not a node before it"),
    (_forward_reference, "'total', which is not a node before it"),
    (_cycle, "'total', which is not a node before it"),
    (_narrower_weight, "'layer1_0' .*does not fit"),
    (_float_weight, "'layer1_0' .*does not fit"),
    (lambda h, t: t.pop("fc.bias"), "the tensor 'fc.bias', which the file lacks"),
    (lambda h, t: t.update(extra=torch.zeros(1)), "does not use: extra"),
    (lambda h, t: node(h, "stem").update(op="aten.conv2d"), "'aten.conv2d', an operator that"),
    (lambda h, t: node(h, "stem").update(op="biper.prepack"), "'biper.prepack', an operator that"),
    (lambda h, t: node(h, "stem").update(op=["conv2d"]), "an operator that"),
    (lambda h, t: node(h, "stem").update(args=[1]), "'stem' has unknown arguments"),
    (lambda h, t: node(h, "layer1_0_bits").update(item=2), "takes item 2"),
    (lambda h, t: node(h, "layer1_0_bits").update(of="stem"), "takes item 1 of 'stem'"),
    (lambda h, t: node(h, "layer1_0_bits").update(of=None), "takes item 1 of None"),
    (lambda h, t: node(h, "layer1_1").update(name="stem"), "Two nodes .* are called 'stem'"),
    (lambda h, t: h["graph"].pop(), "no output as its last node"),
    (lambda h, t: h["graph"].insert(1, {"output": []}), "one output, a list, as its last node"),
    (lambda h, t: h["graph"].pop(0), "refers to 'image', which is not a node before it"),
    (lambda h, t: h["graph"].insert(0, 7), "Node 0 .* must have one of"),
    (lambda h, t: h.update(graph=[]), "must be a list of nodes"),
    (lambda h, t: h.update(graph=None), "must be a list of nodes"),
    (lambda h, t: h["graph"][-1].update(output=[None, None]), "returns 2 values, its signature 1"),
    (_rename("x y"), "is not a name for a node"),
    (_rename("class"), "is not a name for a node"),
    (_rename("self"), "is not a name for a node"),
    (_rename("print"), "is not a name for a node"),
    (_rename("x = __import__('os')"), "is not a name for a node"),
    (_rename_tensor("fc.b'ias"), "forbidden name"),
    (_rename_tensor("a.class"), "forbidden name"),
    (_rename_tensor("fc..bias"), "forbidden name"),
    (_rename_tensor("forward"), "forbidden name"),
    (_rename_tensor("fc.weight.bias"), "cannot make a network"),
    (lambda h, t: h.pop("signature"), "wrong entry `signature`"),
    (lambda h, t: h["signature"].update({"in": "*"}), "wrong entry `signature`"),
    (lambda h, t: h["signature"].update(out={"set": []}), "wrong entry `signature`"),
    (lambda h, t: h["signature"]["inputs"].append(h["signature"]["inputs"][0]), "signature"),
    (lambda h, t: h["signature"]["inputs"][0].update(name="other"), "signature disagree"),
    (lambda h, t: h["signature"]["inputs"][0].update(dtype="float99"), "wrong entry `signature`"),
    (lambda h, t: h["signature"]["inputs"][0].update(dtype="int32"), "does not fit"),
    (lambda h, t: h["signature"]["inputs"][0].update(shape=[2, 3, 8, 8]), "begins with null"),
    (lambda h, t: h["signature"]["inputs"][0].update(shape=[None, 3, 1, 8]), "does not fit"),
    (lambda h, t: h["signature"]["inputs"][0].update(shape=[None, 3, -8, 8]), "out of range"),
    (
        lambda h, t: h["signature"]["inputs"][0].update(shape=[None, 1 << 39, 1 << 39]),
        "out of range",
    ),
    (lambda h, t: h["signature"]["inputs"][0].update(shape=[None, 1 << 19, 1 << 19]), "impossible"),
    (lambda h, t: h.update(report={}), "wrong entry `report`"),
    (lambda h, t: h["report"].update(bytes_after="9"), "wrong entry `report`"),
    (lambda h, t: h["report"]["layers"][0].update(packed=1), "wrong entry `report`"),
    (lambda h, t: h["report"]["layers"][0].update(color=1), "wrong entry `report`"),
    (lambda h, t: h["metadata"].update(crop_pct=7), "wrong entry `metadata`"),
    (lambda h, t: h["metadata"].update(mean=["0.5"] * 3), "wrong entry `metadata`"),
    (lambda h, t: h["metadata"].update(input_size=[3, 8]), "wrong entry `metadata`"),
    (lambda h, t: h["metadata"].update(class_names=[1]), "wrong entry `metadata`"),
    (lambda h, t: h["provenance"].update(stage="2"), "wrong entry `provenance`"),
    (lambda h, t: h.update(options=[]), "wrong entry `options`"),
    (lambda h, t: h.update(proof=None), "wrong proof"),
    (lambda h, t: h["proof"].update(seed="x"), "wrong proof"),
    (lambda h, t: h["proof"].update(values=[1]), "wrong proof"),
    (lambda h, t: h["proof"].update(maps=["abc"]), "wrong proof"),
]


@pytest.mark.parametrize(("edit", "message"), BAD_EDITS)
def test_a_sealed_but_senseless_file_is_refused(
    scratch: Path, path: Path, edit: Edit, message: str
) -> None:
    refuse(scratch, edited(path, edit), message)


def test_a_deeply_nested_header_is_refused(scratch: Path, path: Path) -> None:
    def nest_options(h: dict[str, Any], t: dict[str, Tensor]) -> None:
        value: Any = 0
        for _ in range(40):
            value = {"a": value}
        h["options"] = value

    def nest(h: dict[str, Any], t: dict[str, Tensor]) -> None:
        value: Any = 0
        for _ in range(400):
            value = [value]
        arguments(h, "flat")["shape"] = value

    refuse(scratch, edited(path, nest), "'flat' has an unknown value")
    refuse(scratch, edited(path, nest_options), "nested more than 32 deep")
    refuse(scratch, (100_000).to_bytes(8, "little") + b'{"a":' + b"[" * 99_995, "not JSON")


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 80), 1 << 80)
    | st.sampled_from([0, -1, 1, 2, 1 << 31, 1 << 62, "stem", "*", "float32", "image"])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4)
    | st.sampled_from(
        [{"node": "stem"}, {"node": "stem_bits"}, {"dtype": "int8"}, {"float": "nan"}]
    ),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=4,
)


def _leaves(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in items:
        found.append((*at, key))
        if isinstance(item, dict | list):
            found.extend(_leaves(item, (*at, key)))
    return found


@MANY
@given(data=st.data())
def test_any_sealed_edit_loads_or_is_refused(
    scratch: Path, path: Path, data: st.DataObject
) -> None:
    header, tensors = read(path)
    *way, key = data.draw(st.sampled_from(_leaves(header)))
    holder: Any = header
    for step in way:
        holder = holder[step]
    holder[key] = data.draw(JSON_VALUES)
    scratch.write_bytes(sealed(header, tensors))
    try:
        engine = load(scratch)
    except FileFormatError:
        return
    assert isinstance(engine, Engine)
    assert str(engine.report)


@FEW
@given(data=st.data())
@example(data=None)
def test_any_sealed_change_of_a_tensor_loads_or_is_refused(
    scratch: Path, path: Path, data: st.DataObject | None
) -> None:
    header, tensors = read(path)
    if data is not None:
        name = data.draw(st.sampled_from(sorted(tensors)))
        dtype = data.draw(st.sampled_from([torch.float32, torch.int32, torch.bool, torch.int64]))
        shape = data.draw(st.lists(st.integers(0, 4), max_size=5))
        tensors[name] = torch.zeros(shape, dtype=dtype)
    scratch.write_bytes(sealed(header, tensors))
    try:
        assert isinstance(load(scratch), Engine)
    except FileFormatError:
        assert data is not None
