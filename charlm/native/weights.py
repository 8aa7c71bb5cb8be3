"""The weights of a GPT in the layout of `kernel.c`, packed again after each change.

They are stored in the fewest bits that hold them exactly (`storage.py`).

Packing copies the weights once for each model, not for each generation. A write to a parameter increases its
version, which is checked before every pass. A digest of the values, computed at the beginning of a
generation, also detects writes that bypass the version. Parameters are found by their names, which are
GPT-2's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.errors import InputError
from charlm.locks import ForkLock
from charlm.native.library import LayerStruct, MatrixStruct, ModelStruct
from charlm.native.storage import STORAGES, storage_of, to_int8

if TYPE_CHECKING:
    from charlm.models.gpt import GPT

__all__ = ["PANEL", "PackedWeights", "Weights", "padded"]

PANEL = 64
"""Columns in a panel of a packed matrix, as in `kernel.c`."""
_MATRICES = ("lm_head.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight")
_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "relu2", "swiglu")
_QK_EPS = 1e-6  # of the norm of queries and keys, in models/ops.py

Rotary = Callable[[], tuple[Tensor, Tensor]]
"""Returns cosine and sine of all positions of the window, (block_size, D / 2) each."""


class PackedWeights:
    """The weights of a GPT in the kernel's layout; `struct` is the argument for the kernel.

    Args:
        model: untouched, in float32 or bfloat16.
        rotary: for a model with rotary positions.
    """

    def __init__(self, model: GPT, rotary: Rotary) -> None:
        self._kept: list[Tensor] = []  # the structures point to them
        config = model.config
        named = dict(model.named_parameters(remove_duplicate=False))
        C, H, D, V = config.n_embd, config.n_head, config.head_size, config.vocab_size
        self._storage = storage_of(parameter for name, parameter in named.items() if name.endswith(_MATRICES))
        head = self._linear(named, "lm_head")
        self._layers = (LayerStruct * config.n_layer)()
        for i, layer in enumerate(self._layers):
            self._pack_layer(layer, named, f"transformer.h.{i}", (H, D, C), config.activation)
        norm = model.get_submodule("transformer.ln_f")
        cos, sin = rotary() if config.position == "rotary" else (None, None)
        self.multiplications: int = sum(p.numel() for p in model.parameters())  # about, for one id
        self.struct: ModelStruct = ModelStruct(
            C=C,
            Cp=padded(C),
            H=H,
            D=D,
            Dp=padded(D),
            V=V,
            Vp=padded(V),
            n_layer=config.n_layer,
            norm=int(config.norm == "rmsnorm"),
            activation=_ACTIVATIONS.index(config.activation),
            qk_norm=int(config.qk_norm),
            storage=STORAGES.index(self._storage),
            earlier=config.conv_width - 1,
            norm_eps=norm.eps,
            qk_eps=_QK_EPS,
            token_embedding=self._vector(named["transformer.wte.weight"]),
            position_embedding=self._vector(named.get("transformer.wpe.weight")),
            convolution=self._vector(named.get("transformer.conv.weight")),
            cos=self._vector(cos),
            sin=self._vector(sin),
            gain=self._vector(named.get("transformer.ln_f.weight")),
            shift=self._vector(named.get("transformer.ln_f.bias")),
            head=head,
            layers=ctypes.cast(self._layers, ctypes.POINTER(LayerStruct)),
        )
        self.struct.kept = self._kept  # as long as a call in another thread has the structure

    def _pack_layer(
        self,
        layer: LayerStruct,
        named: Mapping[str, Tensor],
        name: str,
        sizes: tuple[int, int, int],
        activation: str,
    ) -> None:
        """Fill the structure of one block. The D channels of a head are padded to Dp, for whole vectors."""
        H, D, C = sizes
        for number, norm in ((1, "ln_1"), (2, "ln_2")):
            setattr(layer, f"gain{number}", self._vector(named.get(f"{name}.{norm}.weight")))
            setattr(layer, f"shift{number}", self._vector(named.get(f"{name}.{norm}.bias")))
        qkv, bias = named[f"{name}.attn.c_attn.weight"], named.get(f"{name}.attn.c_attn.bias")
        heads = _wider(qkv.view(3, H, D, C), 2, padded(D))  # (3, H, Dp, C)
        biases = None if bias is None else _wider(bias.view(3, H, D), 2, padded(D))
        layer.query = self._matrix(heads[0].flatten(0, 1), None if biases is None else biases[0].flatten())
        layer.key_value = self._matrix(
            heads[1:].flatten(0, 2), None if biases is None else biases[1:].flatten()
        )
        project = named[f"{name}.attn.c_proj.weight"].view(C, H, D)
        layer.project = self._matrix(
            _wider(project, 2, padded(D)).flatten(1), named.get(f"{name}.attn.c_proj.bias")
        )
        up, bias = named[f"{name}.mlp.c_fc.weight"], named.get(f"{name}.mlp.c_fc.bias")
        if activation == "swiglu":  # gates first
            gates, up = up.chunk(2)
            gate_bias, bias = (None, None) if bias is None else bias.chunk(2)
            layer.gate = self._matrix(gates, gate_bias)
        layer.up = self._matrix(up, bias)
        down = named[f"{name}.mlp.c_proj.weight"]
        layer.down = self._matrix(_wider(down, 1, padded(down.size(1))), named.get(f"{name}.mlp.c_proj.bias"))

    def _vector(self, values: Tensor | None) -> int | None:
        if values is None:
            return None
        return self._keep(values.detach().float().contiguous().clone())

    def _linear(self, named: Mapping[str, Tensor], name: str) -> MatrixStruct:
        return self._matrix(named[f"{name}.weight"], named.get(f"{name}.bias"))

    def _matrix(self, weights: Tensor, bias: Tensor | None) -> MatrixStruct:
        """Pack an (N, K) matrix: panels of 64 outputs, each with the K inputs in order."""
        N, K = padded(weights.size(0)), padded(weights.size(1))
        wide = _wider(_wider(weights.detach(), 0, N), 1, K)  # (N, K)
        matrix = MatrixStruct(bias=self._vector(None if bias is None else _wider(bias, 0, N)), K=K, N=N)
        if self._storage == "int8":
            integers, scales = to_int8(wide)
            matrix.scales = self._vector(scales)
            matrix.starts = self._keep((-128 * integers.sum(dim=1)).to(torch.int32))
            columns = integers.view(N, K // 4, 4).transpose(0, 1)  # (K / 4, N, 4)
        else:
            columns = wide.to(getattr(torch, self._storage)).t()  # (K, N)
        panels = [panel.reshape(-1) for panel in columns.split(PANEL, dim=1)]
        matrix.weights = self._keep(torch.cat(panels))
        return matrix

    def _keep(self, values: Tensor) -> int:
        self._kept.append(values)
        return values.data_ptr()


_Form = list[tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]]
_Seen = tuple[object, _Form, list[int]]
"""The settings of a model, and the shapes and digests of its parameters."""

_packed: WeakKeyDictionary[nn.Module, tuple[_Seen, PackedWeights]] = WeakKeyDictionary()
_packing = ForkLock()


class Weights:
    """The present packed weights of a model, for one generation.

    Args:
        kernel: the compiled library.
        model: as for `PackedWeights`.
        rotary: as for `PackedWeights`.

    Attributes:
        kernel: as given.
        packed: the weights at the last check.
    """

    def __init__(self, kernel: ctypes.CDLL, model: GPT, rotary: Rotary) -> None:
        self.kernel = kernel
        self._model, self._rotary = model, rotary
        self._look()

    def refresh(self) -> None:
        """Check the values if there was a write to them.

        Raises:
            InputError: sizes or type of the weights have changed since the generation began.
        """
        if [p._version for p in self._parameters] != self._versions:
            if _form(self._model) != self._form:
                raise InputError(
                    "the model's weights must keep their type and shape during a generation. Begin a new one."
                )
            self._look()

    def _look(self) -> None:
        """Take the present weights, packed before or now."""
        parameters, form = list(self._model.parameters()), _form(self._model)
        versions = [p._version for p in parameters]
        digest = self.kernel.charlm_digest
        values = [digest(p.data_ptr(), p.numel() * p.element_size()) for p in parameters]
        seen = self._model.config, form, values
        with _packing.lock:
            cached = _packed.get(self._model)
            if cached is None or cached[0] != seen:
                cached = _packed[self._model] = seen, PackedWeights(self._model, self._rotary)
        self.packed: PackedWeights = cached[1]
        self._parameters, self._form = parameters, form
        self._versions = versions  # last: whatever interrupts this, the next refresh looks again


def _form(model: GPT) -> _Form:
    return [(p.dtype, p.device, p.shape, p.stride()) for p in model.parameters()]


def padded(width: int) -> int:
    """Return a width padded with zeros: the next multiple of 16."""
    return -(-width // 16) * 16


def _wider(values: Tensor, dim: int, width: int) -> Tensor:
    """Pad one dimension with zeros."""
    missing = width - values.size(dim)
    return F.pad(values, [0, 0] * (values.ndim - 1 - dim) + [0, missing])
