"""A GPT's weights in the layout that `kernel.c` reads, and when they have to be packed anew.

Packing copies the weights once for each model, not for each generation. A write to a parameter raises its
version, which is looked at before every pass; a digest of the values, taken when a state is made, also tells
of writes that went around it.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.errors import InputError
from charlm.generation.native import Layer, Matrix, Model, library

__all__ = ["PANEL", "DecoderWeights", "LayerWeights", "PackedModel", "Source", "find_source"]

PANEL = 64
"""Columns of a packed matrix that stand together, as in kernel.c."""
_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "relu2", "swiglu")


_Form = tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One block. Matrices are (out, in) as in `nn.Linear`; a bias or a gain may be missing."""

    norm_1: tuple[Tensor | None, Tensor | None]
    """Gain and shift (C,) of the norm before attention."""
    qkv: tuple[Tensor, Tensor | None]
    """(3 C, C), queries, keys and values below each other."""
    project: tuple[Tensor, Tensor | None]
    norm_2: tuple[Tensor | None, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    """(F, C); with swiglu (2 F, C), gates first."""
    down: tuple[Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """A GPT as numbers: everything that a pass needs."""

    n_head: int
    block_size: int
    norm: str
    """layernorm or rmsnorm."""
    norm_eps: float
    qk_eps: float | None
    """None: queries and keys are not normalised."""
    activation: str
    token_embedding: Tensor
    position_embedding: Tensor | None
    rotary: tuple[Tensor, Tensor] | None
    """Cosine and sine (block_size, D / 2)."""
    layers: Sequence[LayerWeights]
    norm_out: tuple[Tensor | None, Tensor | None]
    head: tuple[Tensor, Tensor | None]


class PackedModel:
    """The weights in the kernel's layout, and what they were copied from."""

    kernel: ctypes.CDLL
    parameters: Sequence[nn.Parameter]
    settings: object
    forms: list[_Form]
    versions: list[int]
    digest: list[tuple[int, int]]
    block_size: int
    multiplications: int
    layers: ctypes.Array[Layer]
    model: Model

    def __init__(
        self,
        kernel: ctypes.CDLL,
        weights: DecoderWeights,
        parameters: Sequence[nn.Parameter],
        settings: object,
    ) -> None:
        self.kernel = kernel
        self.parameters = parameters
        self.settings = settings
        self.forms = _forms(parameters)
        self._kept: list[Tensor] = []  # what the structures point to
        self._half = weights.head[0].dtype == torch.bfloat16
        self.versions = self.current_versions()
        self.digest = self.current_digest()
        V, C = weights.token_embedding.shape
        H = weights.n_head
        D, Dp, Cp = C // H, _padded(C // H), _padded(C)
        layers = (Layer * len(weights.layers))()
        for packed, layer in zip(layers, weights.layers, strict=True):
            packed.gain1, packed.shift1 = map(self._vector, layer.norm_1)
            packed.gain2, packed.shift2 = map(self._vector, layer.norm_2)
            qkv, qkv_bias = layer.qkv
            heads = _wider(qkv.view(3, H, D, C), 2, Dp)  # (3, H, Dp, C)
            biases = None if qkv_bias is None else _wider(qkv_bias.view(3, H, D), 2, Dp)
            packed.query = self._matrix(
                heads[0].flatten(0, 1), None if biases is None else biases[0].flatten()
            )
            packed.key_value = self._matrix(
                heads[1:].flatten(0, 2), None if biases is None else biases[1:].flatten()
            )
            project, project_bias = layer.project
            packed.project = self._matrix(_wider(project.view(C, H, D), 2, Dp).flatten(1), project_bias)
            up, up_bias = layer.up
            if weights.activation == "swiglu":
                gates, up = up.chunk(2)
                gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
                packed.gate = self._matrix(gates, gate_bias)
            packed.up = self._matrix(up, up_bias)
            down, down_bias = layer.down
            packed.down = self._matrix(_wider(down, 1, _padded(down.size(1))), down_bias)
        gain, shift = map(self._vector, weights.norm_out)
        cos, sin = map(self._vector, weights.rotary or (None, None))
        self.block_size = weights.block_size
        self.multiplications = sum(p.numel() for p in parameters)  # about, for one id
        self.layers = layers
        self.model = Model(
            *(C, Cp, H, D, Dp, V, _padded(V), len(layers)),
            *(int(weights.norm == "rmsnorm"), _ACTIVATIONS.index(weights.activation)),
            *(int(weights.qk_eps is not None), int(self._half), weights.norm_eps, weights.qk_eps or 0.0),
            *(self._vector(weights.token_embedding), self._vector(weights.position_embedding)),
            *(cos, sin, gain, shift, self._matrix(*weights.head)),
            ctypes.cast(layers, ctypes.POINTER(Layer)),
        )

    def current_versions(self) -> list[int]:
        """Tell whether there was a write."""
        return [p._version for p in self.parameters]

    def current_digest(self) -> list[tuple[int, int]]:
        """Tell the values apart, also where a write to `.data` left the version as it was."""
        return [
            (p.data_ptr(), self.kernel.charlm_digest(p.data_ptr(), p.numel() * p.element_size()))
            for p in self.parameters
        ]

    def _vector(self, values: Tensor | None) -> int | None:
        if values is None:
            return None
        self._kept.append(values.detach().float().contiguous().clone())
        return self._kept[-1].data_ptr()

    def _matrix(self, weights: Tensor, bias: Tensor | None) -> Matrix:
        """Pack an (N, K) matrix: panels of 64 outputs, in each the K inputs one after the other."""
        N, K = weights.shape
        columns = _wider(weights.detach(), 0, _padded(N)).t()  # (K, Np)
        panels = [panel.contiguous().flatten() for panel in columns.split(PANEL, dim=1)]
        self._kept.append(torch.cat(panels))
        pointer = self._kept[-1].data_ptr()
        return Matrix(
            pointer, self._vector(None if bias is None else _wider(bias, 0, _padded(N))), K, _padded(N)
        )


_packed: WeakKeyDictionary[nn.Module, PackedModel] = WeakKeyDictionary()
_packing = Lock()


def find_source(model: nn.Module, weights: Callable[[], DecoderWeights], settings: object) -> Source | None:
    """Return where the packed weights of a model come from; None where the kernel cannot read them.

    Args:
        model: whose parameters all belong to `weights`; they are watched for changes.
        weights: called when they have to be packed.
        settings: what else `weights` depends on.
    """
    kernel = library()
    parameters = list(model.parameters())
    first = parameters[0]
    if (
        kernel is None
        or first.dtype not in {torch.float32, torch.bfloat16}
        or any(p.device.type != "cpu" or p.dtype != first.dtype or not p.is_contiguous() for p in parameters)
        # Not what only looks like a tensor, such as a quantised one.
        or any(type(p) is not nn.Parameter or p.is_inference() for p in parameters)
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    source = Source(model, weights, settings, kernel)
    source.refresh()
    return source


@dataclass
class Source:
    """Gives the packed weights of a model, packed anew when they have changed."""

    model: nn.Module
    weights: Callable[[], DecoderWeights]
    settings: object
    kernel: ctypes.CDLL
    packed: PackedModel = field(init=False)

    def refresh(self) -> None:
        """Look at all values."""
        with _packing:
            packed = _packed.get(self.model)
            if packed is None or packed.current_digest() != packed.digest or not self._same(packed):
                parameters = list(self.model.parameters())
                packed = PackedModel(self.kernel, self.weights(), parameters, self.settings)
                _packed[self.model] = packed
            packed.versions = packed.current_versions()
            self.packed = packed

    def look_for_changes(self) -> None:
        """Look at the values if there was a write to them.

        Raises:
            InputError: the weights are no longer of the sizes and the type that the state was made for.
        """
        if self.packed.current_versions() != self.packed.versions:
            if _forms(list(self.model.parameters())) != self.packed.forms:
                raise InputError(
                    "the model's weights must keep their type and shape during a generation. Begin a new one."
                )
            self.refresh()

    def _same(self, packed: PackedModel) -> bool:
        now = list(self.model.parameters())
        same = len(now) == len(packed.parameters) and all(map(operator.is_, now, packed.parameters))
        return same and self.settings == packed.settings and _forms(now) == packed.forms


def _forms(parameters: Sequence[Tensor]) -> list[_Form]:
    return [(p.dtype, p.device, p.shape, p.stride()) for p in parameters]


def _padded(width: int) -> int:
    return -(-width // 16) * 16


def _wider(values: Tensor, dim: int, width: int) -> Tensor:
    """Pad one dimension with zeros."""
    missing = width - values.size(dim)
    return F.pad(values, [0, 0] * (values.ndim - 1 - dim) + [0, missing])
