"""What a teacher beside the student costs: seconds and memory of a training step.

    python benchmarks/distillation.py                  # one thread of the processor, about 4 minutes
    python benchmarks/distillation.py --device cuda    # the USI pair: ResNet-50 learns from TResNet-L (v2), 224 pixels
    python benchmarks/distillation.py --device cuda --eager

A step is forward, loss, backward and AdamW, on batches that lie ready; weights are random. The student's pictures have
ImageNet's statistics and the teacher's none, so every teacher re-normalises. "By hand" is the loop one writes down: the
teacher in float32, without gradients or, if that was forgotten, with them. timm's is its task, under the student's
autocast. "From disk" has the answers to all its pictures, of the likeliest classes. The others have the same loss, and
that is looked at before they are timed.
"""
import argparse
import contextlib
import functools
import itertools
import multiprocessing
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from run import save
from timm.task import LogitDistillationTask
from torch import Tensor, nn
from torch.nn import functional as F

from timm_miil.bench import compare, device_events, place, processor
from timm_miil.tasks import SingleLabelTask, SupervisedDistillationTask, Teacher, TeacherCache

ALPHA = 5.0               # weight of the teacher's term, the paper's
NUM_CLASSES = 1000
NUM_BATCHES = 4
CACHE_TOPK, CACHE_BYTES = 100, 1 << 30
WEIGHT_DECAY, LEARNING_RATE = 2e-2, 1e-6  # small: random pictures must not spoil the networks
OPINION = 20.0  # factor on the random teacher's classifier: else all classes are alike to it
TOLERANCE = {None: 1e-4, torch.bfloat16: 5e-2}
COMPILED = ', compiled'

Loss = Callable[[Tensor, Tensor], Tensor]
Build = Callable[[nn.Module], Loss]


@dataclass(frozen=True)
class Case:
    """A pair of networks on a device; `precision` is that of the student's autocast."""

    device: torch.device
    student: str
    teacher: str
    image_size: int
    batch_size: int
    steps: int                     # of one measured run
    repeats: int
    precision: torch.dtype | None

    def student_network(self) -> nn.Module:
        """Equal at every call, and so is the teacher's."""
        torch.manual_seed(0)
        model = timm.create_model(self.student, num_classes=NUM_CLASSES, device=self.device)
        return model.to(memory_format=torch.channels_last)

    def teacher_network(self) -> nn.Module:
        torch.manual_seed(1)
        model = timm.create_model(self.teacher, num_classes=NUM_CLASSES, device=self.device)
        with torch.no_grad():
            model.get_classifier().weight.mul_(OPINION)
        return model.to(memory_format=torch.channels_last)

    @functools.cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Pictures and mixed labels."""
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(NUM_BATCHES):
            images = torch.randn(self.batch_size, 3, self.image_size, self.image_size, generator=generator)
            one, two = torch.randint(NUM_CLASSES, (2, self.batch_size), generator=generator)
            targets = 0.3 * F.one_hot(one, NUM_CLASSES) + 0.7 * F.one_hot(two, NUM_CLASSES)
            found.append((
                images.to(self.device, memory_format=torch.channels_last), targets.to(self.device)))
        return found

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not None)


CPU = Case(
    torch.device('cpu'), 'resnet18', 'tresnet_m', image_size=96, batch_size=8, steps=1, repeats=15, precision=None)
GPU = Case(
    torch.device('cuda'), 'resnet50', 'tresnet_v2_l', image_size=224, batch_size=128, steps=3, repeats=12,
    precision=torch.bfloat16)


# ---- contestants: a student gives the loss of a batch


def alone(case: Case, student: nn.Module, *, compiled: bool = False) -> Loss:
    task = SingleLabelTask(student)
    if compiled:
        task.compile()
    return lambda images, targets: task(images, targets)['loss']


def ours(
        case: Case,
        student: nn.Module,
        *,
        precision: torch.dtype | None,
        compiled: bool = False,
        folder: Path | None = None,
) -> Loss:
    cfg = student.pretrained_cfg
    teacher = Teacher(
        case.teacher_network(), mean=cfg['mean'], std=cfg['std'], image_size='student', precision=precision)
    if folder is not None:
        teacher.cache = TeacherCache(
            folder, num_classes=NUM_CLASSES, topk=CACHE_TOPK, max_bytes=CACHE_BYTES, teacher=teacher.fingerprint())
        for images, _ in case.batches:
            teacher(images)
    task = SupervisedDistillationTask(student, teacher, distill_loss_weight=ALPHA)
    if compiled:
        task.compile()
    return lambda images, targets: task(images, targets)['loss']


def timms(case: Case, student: nn.Module) -> Loss:
    task = LogitDistillationTask(
        student, case.teacher_network(), nn.CrossEntropyLoss(), distill_loss_weight=ALPHA, task_loss_weight=1.0,
        device=case.device, verbose=False)
    return lambda images, targets: task(images, targets)['loss']


def by_hand(case: Case, student: nn.Module, *, records: bool) -> Loss:
    teacher = case.teacher_network().eval()
    cfg, teacher_cfg = student.pretrained_cfg, teacher.pretrained_cfg
    mean, std, teacher_mean, teacher_std = (
        torch.tensor(numbers, device=case.device).view(3, 1, 1)
        for numbers in (cfg['mean'], cfg['std'], teacher_cfg['mean'], teacher_cfg['std']))

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        output = student(images)
        with torch.autocast(case.device.type, enabled=False), torch.set_grad_enabled(records):
            teacher_logits = teacher((images * std + mean - teacher_mean) / teacher_std)
        divergence = F.kl_div(
            output.float().log_softmax(1), teacher_logits.detach().softmax(1), reduction='batchmean')
        return F.cross_entropy(output, targets) + ALPHA * divergence

    return loss


def contestants(case: Case, folder: Path) -> dict[str, Build]:
    found: dict[str, Build] = {
        'student alone': functools.partial(alone, case),
        'ours': functools.partial(ours, case, precision=case.precision),
        'ours, from disk': functools.partial(ours, case, precision=case.precision, folder=folder),
        'timm': functools.partial(timms, case),
        'by hand': functools.partial(by_hand, case, records=False),
        'by hand, with gradients': functools.partial(by_hand, case, records=True)}
    if case.precision is None:
        found['ours, teacher in bfloat16'] = functools.partial(ours, case, precision=torch.bfloat16)
    return found


def compiling(case: Case) -> dict[str, Build]:
    return {
        'student alone': functools.partial(alone, case),
        f'student alone{COMPILED}': functools.partial(alone, case, compiled=True),
        f'ours{COMPILED}': functools.partial(ours, case, precision=case.precision, compiled=True)}


# ---- measuring


class Steps:
    """Training steps of one contestant, on batches in turn."""

    def __init__(self, case: Case, build: Build) -> None:
        self.case = case
        student = case.student_network().train()
        self.loss = build(student)
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.batches = itertools.cycle(case.batches)
        self.first_loss = self.step().item()

    def step(self) -> Tensor:
        images, targets = next(self.batches)
        with self.case.autocast():
            loss = self.loss(images, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def __call__(self) -> None:
        for _ in range(self.case.steps):
            self.step()


def built(case: Case, builds: dict[str, Build]) -> tuple[dict[str, Steps], dict[str, float]]:
    """Contestants that have taken their first steps, and the most MiB that each had at once, its weights included."""
    if case.device.type == 'cpu':
        peaks = {name: peak_of_a_process(case, build) for name, build in builds.items()}
        return {name: Steps(case, build) for name, build in builds.items()}, peaks
    found, peaks = dict[str, Steps](), dict[str, float]()
    _ = case.batches
    for name, build in builds.items():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found[name] = Steps(case, build)
        found[name].step()
        torch.cuda.synchronize()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return found, peaks


def peak_of_a_process(case: Case, build: Build) -> float:
    """MiB that a process which takes two steps holds at most, beyond what it starts with."""
    context = multiprocessing.get_context('fork')  # no step was taken here, so that it can
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        Steps(case, build).step()
        sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)

    child = context.Process(target=run)
    child.start()
    peak: float = receiver.recv()
    child.join()
    return peak


def check_losses(case: Case, found: dict[str, Steps]) -> None:
    """Raise AssertionError unless all that ask the teacher itself have the same loss."""
    want = found['by hand'].first_loss
    for name, steps in found.items():
        if name not in ('student alone', 'ours, from disk'):
            tolerance = TOLERANCE[torch.bfloat16 if 'bfloat16' in name else case.precision]
            torch.testing.assert_close(steps.first_loss, want, rtol=tolerance, atol=0, msg=f'{name} {steps.first_loss}')


def measure(case: Case, builds: dict[str, Build]) -> list[dict[str, object]]:
    found, peaks = built(case, builds)
    if 'by hand' in found:
        check_losses(case, found)
    rows = compare(
        found, repeats=case.repeats, warmup=2, clock=processor if case.device.type == 'cpu' else device_events,
        student=case.student, teacher=case.teacher, image_size=case.image_size, batch_size=case.batch_size,
        steps=case.steps)
    for row in rows:
        row['images_per_second'] = round(1e3 * case.batch_size * case.steps / float(str(row['median_ms'])), 1)
        row['peak_mib'] = round(peaks[str(row['contestant'])])
        print(*(f'{name}={row[name]}' for name in ('contestant', 'ratio', 'images_per_second', 'peak_mib')), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', type=torch.device, default=torch.device('cpu'))
    parser.add_argument('--eager', action='store_true', help='leave out what compiles; on the CPU it always is')
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    case = CPU if options.device.type == 'cpu' else GPU
    name = f'distillation-{place(options.device)}'
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(case, contestants(case, Path(folder)))
    save(name, rows, device=options.device, quiet=True)  # so far
    if case is GPU and not options.eager:
        save(
            name, rows + measure(case, compiling(case)), device=options.device, quiet=True)


if __name__ == '__main__':
    main()
