"""A tensor over bytes at an address, through DLPack, which lets us name the device.

CUDA's array interface does not: PyTorch then asks the driver, and the driver says of a peer's
memory that is mapped here that it belongs to the peer's GPU. Structures:
https://dmlc.github.io/dlpack/latest/c_api.html
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

CPU, CUDA = 1, 2
UINT = 1


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("num_dims", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _DLTensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))
_kept: list[tuple[_Managed, ctypes.Array[ctypes.c_int64]]] = []


def raw_tensor(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """The bytes as uint8 `[num_bytes]` on `device`; they must stay mapped until the process ends.

    The few words that describe them stay as long, since nothing tells when the last view has gone.
    """
    kind = CUDA if device.type == "cuda" else CPU
    size = (ctypes.c_int64 * 2)(num_bytes, 1)
    shape = ctypes.cast(size, ctypes.POINTER(ctypes.c_int64))
    strides = ctypes.cast(
        ctypes.addressof(size) + ctypes.sizeof(ctypes.c_int64), ctypes.POINTER(ctypes.c_int64)
    )
    managed = _Managed(
        tensor=_DLTensor(
            data=address,
            device=_Device(kind, device.index or 0),
            num_dims=1,
            dtype=_DataType(UINT, 8, 1),
            shape=shape,
            strides=strides,
        )
    )
    _kept.append((managed, size))
    capsule = _new_capsule(ctypes.addressof(managed), b"dltensor", None)
    return torch.utils.dlpack.from_dlpack(capsule)
