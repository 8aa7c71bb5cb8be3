"""Files of other libraries: import and export for transformers, import from nanoGPT and minGPT, ONNX export.

These libraries need not be installed; the export to ONNX needs the packages onnx and onnxscript. No code in
an imported file is executed.
"""

from charlm.interchange.nanogpt import from_mingpt, from_nanogpt
from charlm.interchange.onnx import to_onnx
from charlm.interchange.transformers import from_transformers, to_transformers

__all__ = ["from_mingpt", "from_nanogpt", "from_transformers", "to_onnx", "to_transformers"]
