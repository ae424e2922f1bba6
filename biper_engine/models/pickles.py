"""Find out what a pickle in a `torch.save` file would create, without creating any of it.

`torch.load(weights_only=True)` calls only functions from a list of harmless ones. Some of these
allocate as many bytes as the file says: `bytearray(10**12)`, or a storage of a declared size. A
pickle is therefore walked first, with stand-ins for everything that it names.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from math import prod
from typing import Any, ClassVar

__all__ = ["MOST_PICKLE_BYTES", "RefusedError", "Survey", "survey"]

MOST_PICKLE_BYTES = 16_000_000
"""A pickle names tensors but does not hold them: it needs about 100 bytes for each."""

_OPCODES = (
    *(pickle.PROTO, pickle.GLOBAL, pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD, pickle.STOP),
    *(pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.MARK),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_TUPLE),
    *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET, pickle.NONE),
    *(pickle.NEWFALSE, pickle.NEWTRUE, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.LONG1),
    *(pickle.BINPERSID, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT),
)
# Bytes of an element, by the name of the storage's class; 1 for any other class.
_ELEMENT_BYTES = {
    **dict.fromkeys(("ComplexDoubleStorage",), 16),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
}
_PLAIN = {
    "collections.OrderedDict",
    "collections.Counter",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "torch.nn.parameter.Parameter",
    "argparse.Namespace",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "complex")),
}
_REBUILD = "torch._utils._rebuild_"
# Functions whose third argument is the tensor's shape.
_SHAPED = {f"{_REBUILD}{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "qtensor")}


class RefusedError(Exception):
    """The pickle would create something too large, or neither a tensor nor a plain value."""


class Survey:
    """What a pickle holds.

    Attributes:
        storages: bytes by key, as declared.
        largest_tensor_bytes: bytes of the tensor with the largest declared shape.
        foreign: the first class or function that makes neither a tensor nor a plain value.
        top: the name of the pickle's own type or function, None for a plain value.
    """

    def __init__(self) -> None:
        self.storages: dict[str, int] = {}
        self.largest_tensor_bytes = 0
        self.foreign: str | None = None
        self.top: str | None = None

    def called(self, label: str, args: tuple[Any, ...]) -> None:
        """Record a call.

        Raises:
            RefusedError: it allocates memory by a number.
        """
        if label == "torch._tensor._rebuild_from_type_v2" and len(args) > 2:
            self.called(_label(args[0]) or "a function", tuple(args[2]))
        elif label == "_codecs.encode":
            if len(args) != 2 or args[1] not in ("latin1", b"latin1"):
                raise RefusedError(f"an encoding by {_label(args[-1:]) or 'a codec'}")
        elif label in _SHAPED:
            storage, _, shape = args[:3]
            if not all(type(size) is int and size >= 0 for size in shape):
                raise RefusedError("a tensor without a shape")
            declared = prod(shape) * getattr(storage, "element_bytes", 1)
            self.largest_tensor_bytes = max(self.largest_tensor_bytes, declared)
        elif label in _PLAIN:
            for argument in args:
                _check_keys(argument if isinstance(argument, list | tuple | set) else ())
        elif not label.startswith(_REBUILD):
            self.foreign = self.foreign or label

    def stored(self, identity: Any) -> _Thing:
        """Record a storage, and return a stand-in for it."""
        kind, storage_class, key, _, count = identity[:5]
        if kind not in ("storage", b"storage") or type(count) is not int or count < 0:
            raise RefusedError("a storage without a size")
        name = (_label(storage_class) or "").rpartition(".")[2]
        storage = _Thing()
        storage.element_bytes = _ELEMENT_BYTES.get(name, 1)
        key = key.decode() if isinstance(key, bytes) else str(key)
        needed = count * storage.element_bytes
        self.storages[key] = max(self.storages.get(key, 0), needed)
        return storage


class _Thing:
    """A stand-in for an instance of any class: it accepts whatever unpickling does to it."""

    label: ClassVar[str] = ""
    element_bytes = 1

    def ignore(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = update = ignore


def _label(value: Any) -> str | None:
    kind = value if isinstance(value, type) else type(value)
    return kind.label if issubclass(kind, _Thing) else None


def _check_keys(keys: Iterable[Any], depth: int = 0) -> None:
    """Refuse keys whose hash walks over their contents, which may be nested without end."""
    for key in keys:
        if isinstance(key, tuple) and depth < 2:
            _check_keys(key, depth + 1)
        elif isinstance(key, tuple | frozenset):
            raise RefusedError("a key of nested tuples")


class _Walker(pickle._Unpickler):  # in Python: the one in C allocates by numbers, too
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES
    }

    def __init__(self, file: Any, result: Survey) -> None:
        super().__init__(file, encoding="bytes")
        self._result = result
        self._classes: dict[str, type[_Thing]] = {}

    def find_class(self, module: str, name: str) -> Any:
        label = f"{module}.{name}"
        if label not in self._classes:

            def make(cls: type[_Thing], *args: Any) -> _Thing:
                self._result.called(label, args)
                return object.__new__(cls)

            self._classes[label] = type(name, (_Thing,), {"label": label, "__new__": make})
        return self._classes[label]

    def persistent_load(self, identity: Any) -> Any:
        return self._result.stored(identity)

    _set_one: ClassVar[Any] = staticmethod(dispatch[pickle.SETITEM[0]])
    _set_many: ClassVar[Any] = staticmethod(dispatch[pickle.SETITEMS[0]])

    def check_key(self) -> None:
        _check_keys(self.stack[-2:-1])  # type: ignore[attr-defined]
        self._set_one(self)

    def check_keys(self) -> None:
        _check_keys(self.stack[::2])  # type: ignore[attr-defined]
        self._set_many(self)

    dispatch[pickle.SETITEM[0]] = check_key
    dispatch[pickle.SETITEMS[0]] = check_keys


class _Bounded:
    """A file from which at most `MOST_PICKLE_BYTES` bytes are read."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left = MOST_PICKLE_BYTES

    def read(self, count: int) -> bytes:
        return self._taken(self._file.read(self._allowed(count)))

    def readline(self) -> bytes:
        return self._taken(self._file.readline(self._left))

    def readinto(self, buffer: Any) -> int:
        return len(self.read(len(buffer)))

    def _allowed(self, count: int) -> int:
        if count > self._left:
            raise RefusedError(f"more than {MOST_PICKLE_BYTES:,} bytes beside its tensors")
        return count

    def _taken(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


def survey(file: Any) -> tuple[Survey, Any]:
    """Walk one pickle, from a binary file's position to the pickle's end.

    Returns:
        What it holds; and its value, with stand-ins for everything that is not plain.

    Raises:
        RefusedError: it would allocate memory by a number in the file.
        Exception: any kind that unpickling of damaged bytes raises.
    """
    result = Survey()
    value = _Walker(_Bounded(file), result).load()
    result.top = _label(value)
    return result, value
