"""``LoRAConv1d``, ``LoRAConv2d``, ``LoRAConv3d``, and the same with DoRA: frozen convolutions, corrected."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import dora_linear, lora_linear, under_autocast
from .base_only import runs_base_alone
from .dora import DoRALayer, column_scale
from .frozen import is_tracked_view, must_be_called, why_not_plain
from .lora import LoRALayer, add_bias, start_
from .matrix import matrix_shape


def _onednn_has(dtype: str) -> bool:
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", None)
    return supported is None or bool(supported())


_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_ON_CPU = {torch.bfloat16: _onednn_has("bf16"), torch.float16: _onednn_has("fp16")}
_MOST_WINDOWS = 1 << 30  # bytes of windows that are laid out as rows, where each element of x is in several


class _LoRAConv(LoRALayer):
    """y = conv(x, W + s B A) + bias: of x's windows as rows, x Wᵀ + s (drop(x) Aᵀ) Bᵀ + bias."""

    kind: ClassVar[Any]

    @classmethod
    def from_conv(cls, conv: nn.Module, r: int = 8, **settings: Any) -> Any:
        """Wrap ``conv``, sharing and freezing its weight and bias. Settings are those of the class."""
        return cls(conv, r, **settings)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        if not isinstance(module, cls.kind):
            return f"not an {cls.wraps} but a {type(module).__name__}"
        conv: Any = module
        if conv.groups != 1:
            return f"its groups={conv.groups}: PEFT's factors mix all channels, and are no correction of its weight"
        if any(step != 1 for step in conv.dilation):
            return f"its dilation={tuple(conv.dilation)}: PEFT's factors have none, and are no correction of its weight"
        if conv.padding_mode != "zeros":
            return (
                f"its padding_mode={conv.padding_mode!r}: PEFT's factors pad with zeros, and are no correction of its "
                f"weight"
            )
        return why_not_plain(conv, cls.kind)

    @classmethod
    def shapes(cls, base_layer: Any, r: int, lora_bias: bool = False) -> dict[str, tuple[int, ...]]:
        n, _ = matrix_shape(base_layer)
        size = base_layer.kernel_size
        found: dict[str, tuple[int, ...]] = {
            "lora_A.weight": (r, base_layer.in_channels, *size),
            "lora_B.weight": (n, r, *(1 for _ in size)),
        }
        return found | {"lora_B.bias": (n,)} if lora_bias else found

    def make_factors(self, init: str, train: str, lora_bias: bool, **options: Any) -> None:
        base: Any = self.base_layer
        empty: Any = torch.nn.utils.skip_init
        like: Any = {key: getattr(base, key) for key in ("kernel_size", "stride", "padding")}
        self.lora_A = empty(self.kind, base.in_channels, self.r, bias=False, **like, **options)
        self.lora_B = empty(self.kind, self.r, base.out_channels, kernel_size=1, bias=lora_bias, **options)
        start_(self, train)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.weight.flatten(1), self.gated(self.lora_B.weight).flatten(1)

    def over_ranks(self, vector: Tensor) -> Tensor:
        return _over_channels(vector, self.base_layer)

    @property
    def lora_bias(self) -> Tensor | None:
        return self.lora_B.bias

    @property
    def kernel_size(self) -> Any:
        """The convolution's own, as ``stride`` and ``padding``, which models (Whisper) ask their modules for."""
        return self.base_layer.kernel_size

    @property
    def stride(self) -> Any:
        return self.base_layer.stride

    @property
    def padding(self) -> Any:
        return self.base_layer.padding

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base_layer
        if self._merged is not None or (self.base_only_depth is not None and runs_base_alone(self)):
            return base(x)
        if must_be_called(base, self.lora_A, self.lora_B) or is_tracked_view(base.weight):
            return self._call_submodules(x)
        return self.convolve(x)

    def convolve(self, x: Tensor) -> Tensor:
        """The layer's formula, without calls of the modules in it."""
        dropout_p = self.dropout if self.training else 0.0
        lora_b = self.gated(self.lora_B.weight)
        return lora_conv(x, self.base_layer, self.lora_A.weight, lora_b, self.lora_B.bias, self.scaling, dropout_p)


class _DoRAConv(DoRALayer, _LoRAConv):
    """y = g ∘ conv(x, W + s B A) + bias with g = m / n, n_i = ‖W_i + s B_i A‖₂ over the weight of output channel i."""

    @classmethod
    def along_n(cls, base_layer: Any) -> tuple[int, ...]:
        return (1, base_layer.out_channels, *(1 for _ in base_layer.kernel_size))

    def over_output(self, vector: Tensor) -> Tensor:
        return _over_channels(vector, self.base_layer)

    def convolve(self, x: Tensor) -> Tensor:
        return dora_conv(
            x,
            self.base_layer,
            self.lora_A.weight,
            self.gated(self.lora_B.weight),
            self.lora_magnitude_vector,
            scaling=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
            dropout_base=self.dropout_base,
            detach_norm=self.detach_norm,
        )


class LoRAConv1d(_LoRAConv):
    """y = conv(x, W + s B A) + bias, where s B A (N, K), K = C · elements of the kernel, takes the shape of W.

    Parameters, named as in a file of PEFT's: ``base_layer.weight`` (N, C, kernel) and ``base_layer.bias`` (N,), those
    of the wrapped convolution, frozen and not copied; ``lora_A.weight`` (R, C, kernel); ``lora_B.weight`` (N, R, 1,
    ...); with ``lora_bias`` also ``lora_B.bias`` (N,), which enters as s · bias.

    Args:
        base_layer: a plain convolution of float32, bfloat16, float16 or float64, of any kernel, stride and padding
            ("same" and "valid", too).
        (the others as for ``LoRALinear``)

    x is (..., C, length), y (..., N, length'), with one leading dimension or none. Where no two windows of x overlap
    (kernel = stride, as in patch embeddings), they are the rows of one ``lora_linear``. Where they do, the library
    convolves x with W, and with A, and the result with B. In half precision on a CPU whose library has no convolution
    of that dtype, windows are laid out as rows as long as they take less than 1 GiB.

    Raises:
        TypeError: a convolution with ``groups``, ``dilation`` or a ``padding_mode`` other than zeros: PEFT gives its
            factors none of these, so that what they compute is no correction of W, and could not be merged.
        ValueError: as ``LoRALinear``.

    Sources: Hu et al., arXiv 2106.09685; PEFT for the shapes.
    """

    kind, wraps = nn.Conv1d, "nn.Conv1d"


class LoRAConv2d(_LoRAConv):
    """As :class:`LoRAConv1d`, over (..., C, height, width); ``lora_A.weight`` (R, C, kernel, kernel)."""

    kind, wraps = nn.Conv2d, "nn.Conv2d"


class LoRAConv3d(_LoRAConv):
    """As :class:`LoRAConv1d`, over (..., C, depth, height, width)."""

    kind, wraps = nn.Conv3d, "nn.Conv3d"


class DoRAConv1d(_DoRAConv, LoRAConv1d):
    """y = g ∘ conv(x, W + s B A) + bias with g = m / n, n_i = ‖W_i + s B_i A‖₂ over all of output channel i's weight.

    Parameters are those of :class:`LoRAConv1d` and ``lora_magnitude_vector`` (1, N, 1), PEFT's name and shape, which
    starts at the norm of W + s B A, and always trains. Settings are those of ``LoRAConv1d`` and ``DoRALinear``, without
    ``lora_bias``.

    Source: Liu et al., "DoRA", arXiv 2402.09353; PEFT for convolutions.
    """


class DoRAConv2d(_DoRAConv, LoRAConv2d):
    """As :class:`DoRAConv1d`, over (..., C, height, width); ``lora_magnitude_vector`` (1, N, 1, 1)."""


class DoRAConv3d(_DoRAConv, LoRAConv3d):
    """As :class:`DoRAConv1d`, over (..., C, depth, height, width); ``lora_magnitude_vector`` (1, N, 1, 1, 1)."""


def lora_conv(
    x: Tensor, conv: Any, lora_a: Tensor, lora_b: Tensor, lora_bias: Tensor | None, scaling: float, dropout_p: float
) -> Tensor:
    """conv(x) + s (conv1(conv(drop(x), A), B) + lora_bias), where conv1 has a kernel of one element."""
    if lies_in_rows(x, conv):
        y = lora_linear(
            _as_rows(x, conv),
            conv.weight.flatten(1),
            lora_a.flatten(1),
            lora_b.flatten(1),
            add_bias(conv.bias, lora_bias, scaling, conv.weight.dtype),
            scaling=scaling,
            dropout_p=dropout_p,
        )
        return _from_rows(x, y, conv)
    y = _convolve(x, conv, conv.weight, conv.bias)
    return y + _correction(F.dropout(x, dropout_p), conv, lora_a, lora_b, lora_bias, scaling)


def dora_conv(
    x: Tensor,
    conv: Any,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    dropout_p: float,
    dropout_base: bool,
    detach_norm: bool,
) -> Tensor:
    """g ∘ (conv(x) + s conv1(conv(drop(x), A), B)) + bias; with ``dropout_base`` and dropout, PEFT's form:
    conv(x) + (g - 1) ∘ conv(drop(x)) + g ∘ s conv1(conv(drop(x), A), B) + bias."""
    weight, a, b = conv.weight.flatten(1), lora_a.flatten(1), lora_b.flatten(1)
    if lies_in_rows(x, conv):
        y = dora_linear(
            _as_rows(x, conv),
            weight,
            a,
            b,
            magnitude.flatten(),
            conv.bias,
            scaling=scaling,
            dropout_p=dropout_p,
            dropout_base=dropout_base,
            detach_norm=detach_norm,
        )
        return _from_rows(x, y, conv)
    scale = _over_channels(column_scale(weight, a, b, magnitude, scaling=scaling, detach_norm=detach_norm), conv)
    dropped = F.dropout(x, dropout_p)
    y = _convolve(x, conv, conv.weight, None)
    correction = _correction(dropped, conv, lora_a, lora_b, None, scaling)
    if dropout_base and dropout_p > 0.0:
        scaled = y + (scale - 1) * _convolve(dropped, conv, conv.weight, None) + scale * correction
    else:
        scaled = scale * (y + correction)
    if conv.bias is not None:
        scaled = scaled + _over_channels(conv.bias, conv)
    return scaled.to(y.dtype)


def _over_channels(vector: Tensor, conv: Any) -> Tensor:
    """(N,) as (N, 1, ...)."""
    return vector.view(-1, *(1 for _ in conv.kernel_size))


def _convolve(x: Tensor, conv: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _CONVOLVE[len(conv.kernel_size)](x, weight, bias, conv.stride, conv.padding)


def _correction(
    x: Tensor, conv: Any, lora_a: Tensor, lora_b: Tensor, lora_bias: Tensor | None, scaling: float
) -> Tensor:
    """s conv1(conv(x, A), B) + s lora_bias, in x's dtype."""
    p = _convolve(x, conv, lora_a.to(x.dtype), None)
    bias = None if lora_bias is None else (scaling * lora_bias).to(p.dtype)
    return _CONVOLVE[len(conv.kernel_size)](p, (scaling * lora_b).to(p.dtype), bias)


def lies_in_rows(x: Tensor, conv: Any) -> bool:
    """Whether one linear over the windows of x, one a row, computes a convolution and its correction best.

    It does for patches, whose windows hold no more than x does; and where the library has no convolution of the dtype,
    which takes it tens of times as long as the product, up to 1 GiB of windows.
    """
    d = len(conv.kernel_size)
    if x.dim() not in (d + 1, d + 2):
        return False
    if is_patch(conv):
        return True
    dtype = torch.get_autocast_dtype(x.device.type) if under_autocast(x) else x.dtype
    if library_convolves(dtype, x.device):
        return False
    elements = math.prod(conv.kernel_size) * math.prod(x.shape[:-d])
    for size, step in zip(x.shape[-d:], conv.stride, strict=True):
        elements *= size // step + 1
    return 2 * elements < _MOST_WINDOWS


def is_patch(conv: Any) -> bool:
    """Whether the windows of a convolution are patches: of several elements, side by side, none of them padding."""
    size = tuple(conv.kernel_size)
    return math.prod(size) > 1 and size == tuple(conv.stride) and not any(map(sum, _padding(conv)))


def library_convolves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the library has a convolution of this dtype: for half precision on a CPU, oneDNN's instructions."""
    return device.type != "cpu" or _ON_CPU.get(dtype, True)


def _padding(conv: Any) -> list[tuple[int, int]]:
    """Elements before and after each dimension, the first one first."""
    if conv.padding == "valid":
        return [(0, 0) for _ in conv.kernel_size]
    if conv.padding == "same":
        return [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in conv.kernel_size]
    return [(p, p) for p in conv.padding]


def _as_rows(x: Tensor, conv: Any) -> Tensor:
    """The windows of x (..., C, L₁, ...) that the kernel meets, flattened: (..., L₁', ..., K)."""
    d = len(conv.kernel_size)
    padding = [p for before_and_after in reversed(_padding(conv)) for p in before_and_after]
    if any(padding):
        x = F.pad(x, padding)
    lead = x.dim() - d - 1
    for i, (size, step) in enumerate(zip(conv.kernel_size, conv.stride, strict=True)):
        x = x.unfold(lead + 1 + i, size, step)
    return x.movedim(lead, lead + d).flatten(lead + d)


def _from_rows(x: Tensor, y: Tensor, conv: Any) -> Tensor:
    """The convolution's output (..., N, L₁', ...) from that of the rows of x, (..., L₁', ..., N)."""
    return y.movedim(-1, x.dim() - len(conv.kernel_size) - 1)
