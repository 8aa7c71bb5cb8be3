"""Files of other libraries: transformers' both ways, nanoGPT's and minGPT's in, ONNX out.

None of these libraries is needed for their files; ONNX takes the packages onnx and onnxscript. Nothing that
is read is executed.
"""

from charlm.interchange.nanogpt import from_mingpt, from_nanogpt
from charlm.interchange.onnx import to_onnx
from charlm.interchange.transformers import from_transformers, to_transformers

__all__ = ["from_mingpt", "from_nanogpt", "from_transformers", "to_onnx", "to_transformers"]
