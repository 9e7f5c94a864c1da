"""What ML-Decoder's evaluation computes once for many batches, and how it is known to be out of date.

`Memo` holds a value made of some tensors for as long as none of them changes. `Evaluation` is that value: the queries
up to their projection, which no image changes, and the weights as the products read them.
"""
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

if TYPE_CHECKING:
    from timm_miil.heads._decoder import QueryDecoder
    from timm_miil.heads.ml_decoder import MLDecoder

__all__ = ['Evaluation', 'Memo', 'any_altered', 'is_plain']

PLAIN_TYPES = Tensor, nn.Parameter
SAMPLES = 16  # a tensor
MANY_POSITIONS = 128
PIECE_BYTES = 12 << 20  # of features: what follows from them stays in caches and in memory that malloc keeps

Value = TypeVar('Value', bound=tuple[object, ...])


def is_plain(tensor: Tensor) -> bool:
    """Whether this is an ordinary tensor in ordinary execution: no compiler, tracer, transform, mode or subclass."""
    # No public name tells whether torch.func.vmap or grad is at work, dual numbers, or a mode that sees all operations.
    return type(tensor) in PLAIN_TYPES and not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()                   # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
        or is_in_torch_dispatch_mode()
        or forward_ad._current_level >= 0
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()))  # a CUDA graph computes nothing yet


class Memo(Generic[Value]):
    """Holds what was computed from some tensors for as long as none of them changes.

    A change is seen by the tensor's identity, memory, layout, dtype and version counter. What is written past the
    counter (`parameter.data.add_(1)`) is seen in host memory by comparing a sample of every tensor, which finds what
    changes whole tensors, and elsewhere not at all: call `clear`. A fused optimizer writes past the counter too, so
    nothing is remembered while a gradient waits for its step. Reading and replacing are one step each, so that threads
    may share it. Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._entry: _Entry[Value] | None = None

    def clear(self) -> None:
        """Forget the value."""
        self._entry = None

    def get(self, sources: Sequence[Tensor], build: Callable[[], Value], settings: object = None) -> Value | None:
        """The value of `build()`, computed when sources or settings are not those of last time.

        Returns:
            None where nothing may be remembered: a gradient can flow to a source or has, a source is no ordinary tensor
            or has no version counter, or a process group exists, as sharding rewrites weights behind all that is looked
            at.
        """
        if not _may_be_remembered(sources):
            self.clear()
            return None
        stamp = [settings, *_stamp(sources)]
        entry = self._entry
        if entry is None or not entry.holds(sources, stamp):
            # Neither the caller's inference mode nor its autocast may mark what later callers get.
            with torch.inference_mode(False), torch.no_grad():
                entry = self._entry = _Entry(sources, stamp, build())
        return entry.value

    def __deepcopy__(self, memo: dict[int, object]) -> 'Memo[Value]':
        return type(self)()

    def __reduce__(self) -> tuple[type['Memo[Value]'], tuple[()]]:
        return type(self), ()


class _Entry(Generic[Value]):
    def __init__(self, sources: Sequence[Tensor], stamp: list[object], value: Value) -> None:
        self.sources, self.stamp, self.value = tuple(sources), stamp, value
        self.aliases = [x.detach() for x in sources]  # while they live, no other tensor gets their address
        self.views = [x.flatten()[::max(1, x.numel() // SAMPLES)] for x in self.aliases if x.is_cpu]
        self.sample = torch.cat(self.views) if self.views else None

    def holds(self, sources: Sequence[Tensor], stamp: list[object]) -> bool:
        return (
            len(sources) == len(self.sources) and all(map(operator.is_, sources, self.sources)) and stamp == self.stamp
            and (self.sample is None or torch.equal(self.sample, torch.cat(self.views))))


def _may_be_remembered(sources: Sequence[Tensor]) -> bool:
    needs_grad = torch.is_grad_enabled()
    return is_plain(sources[0]) and not (
        torch.distributed.is_available() and torch.distributed.is_initialized()
    ) and all(
        type(x) in PLAIN_TYPES and x.is_contiguous() and not x.is_meta and not x.is_inference()
        and x.is_leaf and x.grad is None and not (needs_grad and x.requires_grad) for x in sources)


def _stamp(sources: Sequence[Tensor]) -> list[object]:
    device = sources[0].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return [autocast, *((x.data_ptr(), x._version, x.dtype, x.shape) for x in sources)]


class Evaluation(NamedTuple):
    """Logits of features as `MLDecoder` gives them in evaluation, from tensors that no image changes.

    The bias of the keys adds the same to every score of a query, which the softmax does not see; that of the values
    comes out of the attention as it is, as the weights sum to 1, and goes into the bias behind.
    """

    num_heads: int
    query: Tensor              # (1, G, D), normed
    projected: Tensor          # (1, heads, G, D / heads)
    embed: tuple[Tensor, Tensor]
    memory: Tensor             # (2 D, D), keys and values
    out: tuple[Tensor, Tensor]
    norm2: nn.LayerNorm
    linear1: tuple[Tensor, Tensor]
    linear2: tuple[Tensor, Tensor]
    norm3: nn.LayerNorm
    group: Tensor              # (G, D, F)
    bias: Tensor               # (K)

    @staticmethod
    def sources(head: 'MLDecoder') -> list[Tensor]:
        """All weights that a call reads: those of a replaced part are others."""
        decoder = head.decoder
        parts = (
            decoder.norm1, decoder.norm2, decoder.norm3, head.embed, decoder.attn.out_proj, decoder.linear1,
            decoder.linear2, head.group_fc)
        return [
            head.query_embed, decoder.attn.in_proj_weight, decoder.attn.in_proj_bias,
            *(x for part in parts for x in (part.weight, part.bias))]

    @staticmethod
    def settings(decoder: 'QueryDecoder') -> tuple[float, ...]:
        """What the queries depend on besides the weights; all else is read anew."""
        return decoder.attn.num_heads, decoder.norm1.eps

    @classmethod
    def fits(cls, head: 'MLDecoder') -> bool:
        """Whether all parts evaluate, and are of the classes that `of` knows (LoRA puts in others), as those are.

        That the decoder, its attention and the last layer are of their classes, the head has asked.
        """
        decoder = head.decoder
        linears = head.embed, decoder.attn.out_proj, decoder.linear1, decoder.linear2
        norms = decoder.norm1, decoder.norm2, decoder.norm3
        return (
            not (head.training or decoder.training or decoder.attn.training)
            and all(type(x) is nn.Linear for x in linears) and all(type(x) is nn.LayerNorm for x in norms)
            and not any_altered(*linears, *norms, decoder, decoder.attn, head.group_fc))

    @classmethod
    def of(cls, head: 'MLDecoder') -> 'Evaluation':
        """Prepare for the autocast at hand."""
        decoder, attn = head.decoder, head.decoder.attn
        dim = head.embed.out_features
        device = head.query_embed.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

        def cast(x: Tensor) -> Tensor:
            return x.detach() if low is None or x.dtype == torch.float64 else x.detach().to(low)

        with torch.autocast(device, enabled=False):
            query = decoder.norm1(2 * head.query_embed).unsqueeze(0)
            weight, bias = attn.in_proj_weight, attn.in_proj_bias
            projected = F.linear(cast(query), cast(weight[:dim]), cast(bias[:dim]))
            out = attn.out_proj
            return cls(
                num_heads=attn.num_heads,
                query=query,
                projected=projected.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2),
                embed=(cast(head.embed.weight), cast(head.embed.bias)),
                memory=cast(weight[dim:]),
                out=(cast(out.weight), cast(out.bias + out.weight @ bias[2 * dim:])),
                norm2=decoder.norm2,
                linear1=(cast(decoder.linear1.weight), cast(decoder.linear1.bias)),
                linear2=(cast(decoder.linear2.weight), cast(decoder.linear2.bias)),
                norm3=decoder.norm3,
                group=cast(head.group_fc.weight),
                bias=head.group_fc.bias.detach(),
            )

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, K) of tokens (B, N, C), which may be the transposed view of a map."""
        pieces = -(-tokens.nbytes // PIECE_BYTES) if tokens.is_cpu else 1
        if pieces > 1 and len(tokens) > 1:
            return torch.cat([self._logits(piece) for piece in tokens.split(-(-len(tokens) // pieces))])
        return self._logits(tokens)

    def _logits(self, tokens: Tensor) -> Tensor:
        # In place is only what was made here: no product and no norm needs its output for a gradient.
        memory = F.linear(self._embedded(tokens).relu_(), self.memory)
        key, value = memory.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(self.projected.expand(len(tokens), -1, -1, -1), key, value)
        x = F.linear(x.transpose(1, 2).flatten(2), *self.out)
        x = self.norm2(x.to(self.query.dtype).add_(self.query))
        hidden = F.linear(x, *self.linear1).relu_()
        x = self.norm3(F.linear(hidden, *self.linear2).to(x.dtype).add_(x))
        return torch.bmm(x.transpose(0, 1), self.group).transpose(0, 1).flatten(1)[:, :len(self.bias)] + self.bias

    def _embedded(self, tokens: Tensor) -> Tensor:
        weight, bias = self.embed
        if weight.dtype != tokens.dtype and torch.is_autocast_enabled(tokens.device.type):
            tokens = tokens.to(weight.dtype)
        if not tokens.is_contiguous() and tokens.dtype.itemsize >= 4 and tokens.shape[1] >= MANY_POSITIONS:
            # The product reads the map in place: a copy of many positions costs more than a product an image.
            return torch.baddbmm(bias, tokens, weight.t().expand(len(tokens), -1, -1))
        return F.linear(tokens.contiguous(), weight, bias)


def any_altered(*modules: nn.Module) -> bool:
    """Whether a call does more than the class says: by hooks, or by a `forward` of the instance."""
    return nn.modules.module._has_any_global_hook() or any(
        x._forward_hooks or x._forward_pre_hooks or x._backward_hooks or x._backward_pre_hooks or 'forward' in vars(x)
        for x in modules)
