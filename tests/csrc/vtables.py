"""Objects laid out as those of TensorRT for RTX, whose functions note their slot and arguments.

NVIDIA's Python package takes such an object for one of the library's, by pybind11's protocol for pointers of other
modules (`_pybind11_conduit_v1_`). So a test sees which function of the binary interface a call takes, without a GPU.
"""

import ctypes
from collections.abc import Callable
from ctypes import c_char_p, c_int32, c_void_p, py_object
from typing import Any

SLOTS = 96
# Integer arguments: six in registers of x86-64, then the first words of the stack.
_Function = ctypes.CFUNCTYPE(c_void_p, *[c_void_p] * 9)
_READ: dict[str, Callable[[int], int | bytes]] = {
    "n": int, "i": lambda word: word & 0xFFFFFFFF, "s": ctypes.string_at,
}  # fmt: skip
_DIMS_BYTES = 72  # struct Dims: int32, int64[8]

_api = ctypes.pythonapi
_api.PyCapsule_New.restype, _api.PyCapsule_New.argtypes = py_object, [c_void_p, c_char_p, c_void_p]
_api.PyCapsule_GetName.restype, _api.PyCapsule_GetName.argtypes = c_char_p, [py_object]
_api.PyCapsule_GetPointer.restype, _api.PyCapsule_GetPointer.argtypes = c_void_p, [py_object, c_char_p]


class Recorded:
    """An object of the library: [vtable, implementation], with an implementation [vtable].

    Every function appends its slot and arguments to `calls` and returns `answer`, an integer or address; one that
    returns a Dims writes `sizes`. `kinds` has a letter for each argument behind the object: n number or address,
    i number of 32 bits, s text, - not noted.
    """

    def __init__(self, answer: int = 0, sizes: tuple[int, ...] = (), kinds: str = "") -> None:
        self.calls: list[tuple[int | bytes, ...]] = []
        self._answer, self._sizes, self._kinds = answer, sizes, kinds
        self._functions = [self._function(slot) for slot in range(SLOTS)]
        self._table = (c_void_p * SLOTS)(*[ctypes.cast(function, c_void_p).value for function in self._functions])
        self._implementation = (c_void_p * 2)(ctypes.addressof(self._table), 0)
        self._object = (c_void_p * 2)(0, ctypes.addressof(self._implementation))

    @property
    def address(self) -> int:
        return ctypes.addressof(self._object)

    def _function(self, slot: int) -> Any:
        def called(*words: int | None) -> int:
            given = [word or 0 for word in words]
            itself = ctypes.addressof(self._implementation)
            # A structure of this size is returned through an address in front of the object.
            by_address = given[0] != itself and given[1] == itself
            words_of = zip(self._kinds, given[2 if by_address else 1 :], strict=False)
            self.calls.append((slot, *(_READ[kind](word) for kind, word in words_of if kind in _READ)))
            if not by_address:
                return self._answer
            ctypes.memset(given[0], 0, _DIMS_BYTES)
            c_int32.from_address(given[0]).value = len(self._sizes)
            (ctypes.c_int64 * len(self._sizes)).from_address(given[0] + 8)[:] = self._sizes
            return given[0]

        return _Function(called)

    def _pybind11_conduit_v1_(self, abi: bytes, kind: object, pointer: bytes) -> object:
        return _api.PyCapsule_New(self.address, b"recorded", None)


class Asking:
    """Stands in an argument's place to learn how pybind11 asks for it: `asked` is (ABI, C++ type, kind of pointer)."""

    asked: tuple[bytes, object, bytes]

    def _pybind11_conduit_v1_(self, abi: bytes, kind: object, pointer: bytes) -> None:
        self.asked = abi, kind, pointer


def address_of(value: Any, asked: tuple[bytes, object, bytes]) -> int:
    """The address of the C++ object that an object of a pybind11 module holds."""
    capsule = value._pybind11_conduit_v1_(*asked)
    return _api.PyCapsule_GetPointer(capsule, _api.PyCapsule_GetName(capsule))


def function_at(address: int, slot: int, result: Any) -> Any:
    """The function of an object's own vtable; it takes the object alone."""
    table = ctypes.cast(c_void_p.from_address(address).value or 0, ctypes.POINTER(c_void_p))
    return ctypes.CFUNCTYPE(result, c_void_p)(table[slot] or 0)
