"""What a checkpoint may refer to beside tensors: plain containers and numbers, none of which runs anything."""

from __future__ import annotations

STORAGES = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
}
"""Class of a storage in torch -> dtype, and bytes of one number."""
QUANTISED = {
    "QInt8Storage": ("qint8", 1),
    "QUInt8Storage": ("quint8", 1),
    "QInt32Storage": ("qint32", 4),
    "QUInt4x2Storage": ("quint4x2", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
}
"""The same for numbers that are refused; they are known so that the refusal can say what they are."""
WIDTHS = {
    **dict(STORAGES.values()),
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "complex32": 4,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}
"""Every dtype that is read -> bytes of one number."""

NUMPY_TYPES = ("Float64", "Float32", "Float16", "Int64", "Int32", "Int16", "Int8", "UInt32", "UInt8", "Bool")
ALLOWED = frozenset(
    (
        "argparse.Namespace",
        "types.SimpleNamespace",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "pathlib.PureWindowsPath",
        *(
            f"pathlib._local.{name}"
            for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
        ),
        "collections.OrderedDict",
        "collections.defaultdict",
        "collections.Counter",
        "collections.deque",
        "datetime.datetime",
        "datetime.timedelta",
        "datetime.date",
        "datetime.time",
        "datetime.timezone",
        "builtins.list",
        "builtins.dict",
        "builtins.set",
        "builtins.frozenset",
        "builtins.int",
        "builtins.float",
        "builtins.str",
        "builtins.bool",
        "builtins.complex",
        "builtins.bytes",
        "builtins.bytearray",
        "_codecs.encode",
        "numpy.dtype",
        "numpy.ndarray",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
        *(f"numpy.dtypes.{name}DType" for name in NUMPY_TYPES),
        "torch.torch_version.TorchVersion",
        "torch.Size",
        "torch.device",
        "torch.Tensor",
        "torch._tensor.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
        "torch.serialization._get_layout",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._tensor._rebuild_from_type_v2",
        "torch.storage.UntypedStorage",
        "torch.UntypedStorage",
        *(f"torch.{name}" for name in STORAGES),
        *(f"torch.{name}" for name in WIDTHS),
    )
)
"""Names that a file may refer to. They are not imported either: each is read by its form."""

EXPLAINED = (
    (
        "torch._utils._rebuild_qtensor",
        "quantised weights, which have no curvature of their own: pass the checkpoint before quantisation",
    ),
    ("torch._utils._rebuild_sparse_tensor", "sparse tensors: save them with .to_dense()"),
    ("torch._utils._rebuild_nested_tensor", "nested tensors: save the weights as ordinary tensors"),
    (
        "torch._utils._rebuild_meta_tensor",
        "tensors of the meta device, whose numbers were never saved: take another checkpoint",
    ),
    (
        "torch._utils._rebuild_device_tensor",
        "tensors of a device that saves them in a way of its own: save them after .cpu()",
    ),
    ("torch._utils._rebuild_xla_tensor", "tensors of an XLA device: save them after .cpu()"),
    (
        "torch.distributed.",
        "tensors that are spread over several processes: save a full state dict (get_model_state_dict with full_state_dict=True), "
        "or pass the directory that torch.distributed.checkpoint wrote",
    ),
    ("torchao.", "quantised weights of torchao: pass the checkpoint before quantisation"),
    ("bitsandbytes.", "quantised weights of bitsandbytes: pass the checkpoint before quantisation"),
    ("deepspeed.", "objects of DeepSpeed: run its own zero_to_fp32.py, and pass the file that it writes"),
)
"""How names begin that stand for a kind of tensor which is not read -> what it is, and what to do."""


def refused(names: set[str]) -> tuple[str, ...]:
    """Which names are not on the list.

    Args:
        names: That a file refers to.

    Returns:
        Those that would have to be imported, in alphabetical order.

    Example:
        >>> refused({"collections.OrderedDict", "train.Config"})
        ('train.Config',)
    """
    return tuple(sorted(names - ALLOWED))


def explained(names: tuple[str, ...]) -> str | None:
    """What a refused name stands for, where it is known.

    Args:
        names: As of `refused`.

    Returns:
        A clause for a message, or None.

    Example:
        >>> explained(("train.Config",)) is None
        True
    """
    return next((text for start, text in EXPLAINED if any(name.startswith(start) for name in names)), None)
