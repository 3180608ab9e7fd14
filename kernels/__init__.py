"""The ops of kvsink, one per file, each with its reference in plain torch. Imported as `kvsink.kernels`.

transformers looks for an unrelated package called `kernels` and, with a checkout's root on sys.path, imports this folder
under that name. It is then left empty: a second import would register every op again, in place of the working one.
"""

if __name__ == "kvsink.kernels":
    from .anchors import release_, settle_
    from .append import append_
    from .append_attend import append_attend_
    from .attend import attend
    from .base import Cost, OpSpec, op_specs
    from .decode import decode
    from .dequantize import dequantize
    from .encode import encode
    from .hadamard import hadamard
    from .observe import observe
    from .quantize import quantize
    from .read import read
    from .select_sinks import select_sinks

    __all__ = [
        "Cost",
        "OpSpec",
        "append_",
        "append_attend_",
        "attend",
        "decode",
        "dequantize",
        "encode",
        "hadamard",
        "observe",
        "op_specs",
        "quantize",
        "read",
        "release_",
        "select_sinks",
        "settle_",
    ]
