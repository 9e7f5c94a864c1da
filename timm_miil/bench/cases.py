"""What is measured: one network in one form at one size, and which of them are compared."""
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from timm_miil._checks import check_choice, check_positive, check_text

__all__ = ['CASE_COLUMNS', 'LAYOUTS', 'MODES', 'PHASES', 'PRECISIONS', 'VARIANTS', 'Case', 'plan_groups']

PHASES = 'inference', 'training'
VARIANTS = 'plain', 'optimized'
PRECISIONS = 'fp32', 'tf32', 'amp_bf16', 'bf16'
LAYOUTS = 'nchw', 'nhwc'
MODES = 'eager', 'compile', 'graphs'
CASE_COLUMNS = 'phase', 'model', 'variant', 'precision', 'layout', 'mode', 'image_size', 'batch_size'


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement to be made.

    Attributes:
        model: timm name; our networks are registered with timm.
        model_args: Arguments of `timm.create_model` beside the name, as (name, value) pairs.
        phase: 'inference' is a forward pass without gradients; 'training' a step: forward, backward, SGD.
        variant: 'plain' as timm builds it; 'optimized' by the function that is given to the measurement.
        precision: 'fp32'; 'tf32' on an accelerator; 'amp_bf16' by autocast; 'bf16' weights and images.
        layout: Memory format of weights and images: 'nchw', or 'nhwc' (torch's channels_last).
        mode: 'eager', 'compile' (torch.compile), or 'graphs' (a captured CUDA graph).
        image_size: Height and width in pixels.
        batch_size: Images.
    """

    model: str
    model_args: tuple[tuple[str, object], ...] = ()
    phase: str = 'inference'
    variant: str = 'plain'
    precision: str = 'fp32'
    layout: str = 'nchw'
    mode: str = 'eager'
    image_size: int = 224
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_text(model=self.model)
        check_choice(phase=self.phase, choices=PHASES)
        check_choice(variant=self.variant, choices=VARIANTS)
        check_choice(precision=self.precision, choices=PRECISIONS)
        check_choice(layout=self.layout, choices=LAYOUTS)
        check_choice(mode=self.mode, choices=MODES)
        check_positive(image_size=self.image_size, batch_size=self.batch_size)

    @property
    def form(self) -> str:
        """The words by which contestants of a group differ, such as 'plain fp32 nchw eager'."""
        return f'{self.variant} {self.precision} {self.layout} {self.mode}'

    @property
    def columns(self) -> dict[str, object]:
        """The case as cells of a table; arguments of the model stand behind its name."""
        args = ', '.join(f'{name}={value}' for name, value in self.model_args)
        cells = {column: getattr(self, column) for column in CASE_COLUMNS}
        return cells | {'model': f'{self.model}({args})' if args else self.model}


def plan_groups(
        models: Iterable[str | Case],
        *,
        phases: Sequence[str] = ('inference',),
        variants: Sequence[str] = ('plain',),
        precisions: Sequence[str] = ('fp32',),
        layouts: Sequence[str] = ('nchw',),
        modes: Sequence[str] = ('eager',),
        image_sizes: Sequence[int] = (),
        batch_sizes: Sequence[int] = (1,),
) -> list[list[Case]]:
    """All combinations, in the groups whose members take turns.

    Args:
        models: timm names, or cases of which model, arguments and image size are taken.
        phases: Of `PHASES`.
        variants: Of `VARIANTS`; training is of the plain one alone.
        precisions: Of `PRECISIONS`; the first is the baseline's.
        layouts: Of `LAYOUTS`.
        modes: Of `MODES`.
        image_sizes: Pixels; none for the size of each case, 224 for a name.
        batch_sizes: Images.

    Returns:
        One list a model, image size, batch size and phase. Its first case is the plain network, eager, in nchw and
        the first precision, which ratios refer to; it is there whether or not it was asked for.

    Raises:
        ValueError: If a word is not one of those above, or a size is below 1.

    Example:
        >>> [group] = plan_groups(['resnet50'], layouts=('nchw', 'nhwc'))
        >>> [case.form for case in group]
        ['plain fp32 nchw eager', 'plain fp32 nhwc eager']
    """
    groups = []
    for model, phase, batch_size in itertools.product(models, phases, batch_sizes):
        start = model if isinstance(model, Case) else Case(model=model)
        for image_size in image_sizes or (start.image_size,):
            first = dataclasses.replace(
                start, phase=phase, variant='plain', precision=precisions[0], layout='nchw', mode='eager',
                image_size=image_size, batch_size=batch_size)
            forms = itertools.product(
                variants if phase == 'inference' else ('plain',), precisions, layouts, modes)
            cases = [
                dataclasses.replace(first, variant=variant, precision=precision, layout=layout, mode=mode)
                for variant, precision, layout, mode in forms]
            groups.append(list(dict.fromkeys([first, *cases])))
    return groups
