"""Classifier sharing: a student learns from a teacher whose last layer reads the student's embedding too.

Ben-Baruch et al., "It's All in the Head: Representation Knowledge Distillation through Classifier Sharing",
arXiv:2201.06945. The mathematics is in `timm_miil.losses.classifier_sharing`, with the published weights.

Deviations: the embedding is found by timm's contract, not by a special call; a last layer may read embeddings of
another width through a learned adapter, in both mechanisms; the teacher is not changed.
"""
import torch
from timm.utils import unwrap_model
from torch import Tensor, distributed, nn
from torch.nn.utils import parametrize

from timm_miil._checks import check_range
from timm_miil.losses import (
    ContrastiveDistillationLoss, DistillationLoss, EmbeddingDistillationLoss, mix_probabilities, sample_negatives,
    teacher_head_logits, teacher_head_loss)
from timm_miil.tasks._embedding import embed_and_classify, split_head
from timm_miil.tasks._with_teacher import WithTeacher, check_answer, check_averages, check_teacher
from timm_miil.tasks.single_label import SingleLabelTask
from timm_miil.tasks.teacher import Teacher
from timm_miil.tasks.training_model import TrainingModel, TrainingModelTask

__all__ = ['ClassifierSharingTask', 'SharedHeadModel', 'SharingModel', 'freeze_head', 'merge_adapter']


class SharingModel(TrainingModel):
    """A student, the adapter of its embedding and the contrast of embeddings with its two memories.

    In training mode it gives the student's embedding (B, D), its logits (B, C), and the embedding as wide as the
    teacher's.

    Args:
        network: A timm model with one linear classifier.
        adapter: Maps the student's embedding to the teacher's width; None where they are equally wide.
        contrast: The loss of CRD, whose projections are trained; None without it.
    """

    def __init__(
            self, network: nn.Module, adapter: nn.Linear | None = None,
            contrast: ContrastiveDistillationLoss | None = None) -> None:
        super().__init__(network)
        self.adapter = adapter
        self.contrast = contrast

    def forward_training(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embedding, logits and adapted embedding, as the class says."""
        embedding, logits = embed_and_classify(self.network, x)
        return embedding, logits, embedding if self.adapter is None else self.adapter(embedding)


class ClassifierSharingTask(WithTeacher, TrainingModelTask, SingleLabelTask):
    """TH-KD and what the paper adds to it: labels, a teacher, and the teacher's last layer on the student's embedding.

    loss = task_loss_weight * criterion + distill_loss_weight * KL(student, teacher)
    + head_loss_weight * KL(teacher's head on the student's embedding, teacher)
    + embedding_loss_weight * KDE(embeddings) + contrast_loss_weight * CRD(embeddings),

    both divergences at one temperature and averaged over the batch. The published weights (the code's gamma, alpha,
    beta, delta), of which the defaults are the first row:

    | scheme                | task | distill | head | embedding | contrast |
    |-----------------------|------|---------|------|-----------|----------|
    | TH-KD ('kdth')        | 1    | 1.5     | 0.02 | 0         | 0        |
    | KDE and TH-KD         | not published               | > 0       | 0        |
    | CRD and TH-KD         | 0.9  | 1       | 0.02 | 0         | 0.8      |
    | SH-KD, from a teacher trained with the student's head | 1 | 1 | 0 | 0 | 0.8 |

    With head, embedding and contrast at 0 it is plain distillation. A batch of pictures (B, I, H, W) and float targets
    (B, C), and with contrast the pictures' places in the training set (B,), gives {'loss': scalar, 'output': the
    student's logits (B, C), 'task_loss', 'kd_loss', 'head_loss', 'embedding_loss', 'contrast_loss'}: the terms that
    have a weight, detached and not weighted. What is trained beside the student is not saved with it.

    Args:
        model: Student to train, a timm model with one linear classifier.
        teacher: Who it learns from, made with `shares_head=True`.
        criterion: As of `SingleLabelTask`, averaged over the batch.
        task_loss_weight: Weight of the criterion, at least 0.
        distill_loss_weight: Weight of the divergence of the logits, at least 0; not both of these two 0.
        head_loss_weight: Weight of the divergence through the teacher's head, at least 0.
        embedding_loss_weight: Weight of the distance of the embeddings' directions, at least 0.
        contrast_loss_weight: Weight of contrastive representation distillation (arXiv:1910.10699), at least 0.
        embedding_reduction: 'sum' over the batch (the published one) or 'mean'.
        temperature: Of both divergences, in [0.001, 1000].
        adapter: Whether head and embedding loss read the student's embedding through a linear layer that learns. They
            need it where the teacher's embedding is of another width.
        init_head: Whether the student's last layer starts as the teacher's; the model is changed in place.
        num_train: Pictures of the training set, for the memories of contrast; None without it.
        num_negatives: Pictures that each is contrasted with.
        soft_targets: As of `SingleLabelTask`.
        device: As of `SingleLabelTask`; the teacher is moved by the caller.

    Attributes:
        needs_indices: Whether a batch must come with the pictures' places in the training set.

    Raises:
        TypeError: If teacher is no `Teacher`, the student has no linear classifier on its embedding, or a number is of
            the wrong kind.
        ValueError: If a setting is out of range, the widths differ without an adapter, or the teacher was made without
            `shares_head`; in `forward`, if targets are not float or not (B, C), the teacher has other classes, or
            indices are missing.

    Example:
        >>> import timm
        >>> student, model = (timm.create_model('test_resnet', num_classes=5) for _ in range(2))
        >>> cfg = student.pretrained_cfg
        >>> teacher = Teacher(model, mean=cfg['mean'], std=cfg['std'], image_size='student', shares_head=True)
        >>> task = ClassifierSharingTask(student, teacher)
        >>> sorted(task(torch.randn(2, 3, 32, 32), torch.eye(5)[:2]))
        ['head_loss', 'kd_loss', 'loss', 'output', 'task_loss']
    """

    teacher: Teacher

    def __init__(
            self,
            model: nn.Module,
            teacher: Teacher,
            criterion: nn.Module | None = None,
            *,
            task_loss_weight: float = 1.0,
            distill_loss_weight: float = 1.5,
            head_loss_weight: float = 0.02,
            embedding_loss_weight: float = 0.0,
            contrast_loss_weight: float = 0.0,
            embedding_reduction: str = 'sum',
            temperature: float = 4.0,
            adapter: bool = False,
            init_head: bool = False,
            num_train: int | None = None,
            num_negatives: int = 16384,
            soft_targets: bool = True,
            device: torch.device | None = None,
    ) -> None:
        check_range(
            low=0.0, high=float('inf'), head_loss_weight=head_loss_weight, embedding_loss_weight=embedding_loss_weight,
            contrast_loss_weight=contrast_loss_weight)
        check_teacher(teacher)
        if teacher.head is None:
            raise ValueError('the teacher must be made with shares_head=True, as its last layer is shared.')
        is_read = bool(head_loss_weight or embedding_loss_weight)
        if adapter and not is_read:
            raise ValueError('adapter is for head_loss_weight and embedding_loss_weight, got 0 for both; leave it out.')
        classifier = split_head(model)
        if is_read and not adapter:
            _check_width(classifier, teacher.head)
        if init_head:
            _copy_head(classifier, teacher.head)
        widths = classifier.in_features, teacher.head.in_features
        contrast = None
        if contrast_loss_weight:
            if num_train is None:
                raise ValueError(
                    'num_train must be given with contrast_loss_weight, whose memories have a place for each training '
                    'picture, got None.')
            contrast = ContrastiveDistillationLoss(num_train, *widths)
        super().__init__(
            SharingModel(model, nn.Linear(*widths) if adapter else None, contrast), criterion,
            soft_targets=soft_targets, device=device)
        check_averages(self.criterion)
        self.hold_teacher(teacher, task_loss_weight=task_loss_weight, distill_loss_weight=distill_loss_weight)
        self.head = teacher.head
        self.head_loss_weight = head_loss_weight
        self.embedding_loss_weight = embedding_loss_weight
        self.contrast_loss_weight = contrast_loss_weight
        self.num_negatives = num_negatives
        self.distillation = DistillationLoss(temperature)
        self.embedding_distillation = EmbeddingDistillationLoss(embedding_reduction)

    @property
    def needs_indices(self) -> bool:
        """Whether `forward` needs the pictures' places in the training set."""
        return bool(self.contrast_loss_weight)

    def forward(self, input: Tensor, target: Tensor, indices: Tensor | None = None) -> dict[str, Tensor]:
        """Loss and logits of a batch, as the class says."""
        target = self.criterion_target(target)
        if self.embedding_loss_weight or self.contrast_loss_weight:
            teacher_logits, teacher_embedding = self.teacher.answer_with_embedding(input)
        else:  # logits alone, which a cache may know
            teacher_logits, teacher_embedding = self.teacher(input), input.new_empty(0)
        student: SharingModel = unwrap_model(self.trainable_module)
        run = self.trainable_module if student.training else student.forward_training
        embedding, logits, adapted = run(input)
        check_answer(logits, teacher_logits)
        result = self.combined(
            {'loss': self.criterion(logits, target), 'output': logits}, self.distillation(logits, teacher_logits))
        if self.head_loss_weight:
            head_logits = teacher_head_logits(adapted, self.head.weight, self.head.bias)
            _add(result, self.head_loss_weight, head_loss=teacher_head_loss(
                head_logits, teacher_logits, temperature=self.distillation.temperature))
        if self.embedding_loss_weight:
            _add(result, self.embedding_loss_weight, embedding_loss=self.embedding_distillation(
                adapted, teacher_embedding))
        if student.contrast is not None:
            _add(result, self.contrast_loss_weight, contrast_loss=self._contrast(
                student.contrast, embedding, teacher_embedding, indices))
        return result

    def _contrast(
            self, contrast: ContrastiveDistillationLoss, embedding: Tensor, teacher_embedding: Tensor,
            indices: Tensor | None) -> Tensor:
        if indices is None:
            raise ValueError(
                'indices must be given with contrast_loss_weight: the pictures\' places in the training set, (B,).')
        negatives = sample_negatives(indices, num_samples=contrast.num_samples, num_negatives=self.num_negatives)
        loss: Tensor = contrast(embedding, teacher_embedding, indices, negatives)
        if contrast.training:
            _share_memories(contrast, indices)
        return loss


class SharedHeadModel(nn.Module):
    """A trained student whose probabilities are mixed with those that the teacher's head sees in its embedding.

    (1 - head_weight) softmax(student) + head_weight softmax(teacher's head on the student's embedding), the paper's
    mixed inference.

    Args:
        network: The student, a timm model with one linear classifier; held, not copied.
        head: The teacher's last layer, `Teacher.head`, or `get_classifier()` of a teacher of the same classes.
        head_weight: Share of the teacher's head (v), in [0, 1]; 0 is the student alone.
        adapter: The `adapter` of the student's `SharingModel`, if it had one.

    Raises:
        TypeError: If the network has no linear classifier on its embedding, or head is no linear layer.
        ValueError: If head_weight is out of range, or head has another width or other classes.

    Example:
        >>> import timm
        >>> student, teacher = (timm.create_model('test_resnet', num_classes=5).eval() for _ in range(2))
        >>> model = SharedHeadModel(student, teacher.get_classifier(), head_weight=0.3)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 5])
    """

    def __init__(
            self, network: nn.Module, head: nn.Linear, *, head_weight: float, adapter: nn.Linear | None = None) -> None:
        super().__init__()
        check_range(low=0.0, high=1.0, closed=True, head_weight=head_weight)
        if not isinstance(head, nn.Linear):
            raise TypeError(f'head must be the teacher\'s last layer, a nn.Linear, got {type(head).__name__}.')
        classifier = split_head(network)
        if adapter is None:
            _check_width(classifier, head)
        if classifier.out_features != head.out_features:
            raise ValueError(
                f'head must be of the student\'s {classifier.out_features} classes, got one of {head.out_features}.')
        self.network, self.head, self.head_weight, self.adapter = network, head, head_weight, adapter

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities (B, C), float32 or wider, of pictures (B, I, H, W)."""
        embedding, logits = embed_and_classify(self.network, images)
        adapted = embedding if self.adapter is None else self.adapter(embedding)
        head_logits = teacher_head_logits(adapted, self.head.weight, self.head.bias)
        return mix_probabilities(logits, head_logits, head_weight=self.head_weight)


def freeze_head(model: nn.Module, head: nn.Linear, *, adapter: bool = False) -> None:
    """Make a teacher student-aware, the first half of SH-KD: its last layer is the student's and does not learn.

    Train the model by cross-entropy then, and let the student learn from it by any distillation.

    Args:
        model: The teacher, a timm model with one linear classifier; changed in place.
        head: The last layer of a trained student, `get_classifier()`; copied.
        adapter: Whether a linear layer that learns stands between the teacher's embedding and this layer, which may
            then be of another width. The two are computed as one, their product; call `merge_adapter` after training.

    Raises:
        TypeError: If the model has no linear classifier on its embedding.
        ValueError: If the two layers have other classes or, without an adapter, other shapes.

    Example:
        >>> import timm
        >>> student, teacher = (timm.create_model('test_resnet', num_classes=5) for _ in range(2))
        >>> freeze_head(teacher, student.get_classifier())
        >>> torch.equal(teacher.fc.weight, student.fc.weight), teacher.fc.weight.requires_grad
        (True, False)
    """
    classifier = split_head(model)
    if adapter:
        _put_adapter(classifier, head)
        return
    if classifier.in_features != head.in_features:
        raise ValueError(
            f'the student\'s last layer reads embeddings of width {head.in_features}, and the teacher\'s has width '
            f'{classifier.in_features}; take networks of one width, or put a learned linear layer between by '
            f'adapter=True (in a recipe, sharing.adapter = true).')
    _copy_head(classifier, head)
    classifier.requires_grad_(False)


def merge_adapter(model: nn.Module) -> None:
    """Make the two layers of `freeze_head(adapter=True)` the one that they are computed as; other models stay.

    Args:
        model: The teacher, changed in place: a plain timm model again, whose outputs stay.
    """
    for module in model.modules():
        if parametrize.is_parametrized(module) and isinstance(module, nn.Linear):
            for name, steps in list(module.parametrizations.items()):               # type: ignore[union-attr,operator]
                if isinstance(steps[0], _ThroughHead):
                    parametrize.remove_parametrizations(module, name)


class _ThroughHead(nn.Module):
    """The adapter's weight A (D, D_t), or bias a (D,), as the frozen layer passes it on: W A, or W a + b."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, start: Tensor) -> None:
        super().__init__()
        self.register_buffer('weight', weight.detach().clone())
        self.register_buffer('bias', None if bias is None else bias.detach().clone())
        self._start = start

    def forward(self, own: Tensor) -> Tensor:
        passed = self.weight @ own
        return passed if self.bias is None else passed + self.bias

    def right_inverse(self, _: Tensor) -> Tensor:
        """What the adapter starts with, whatever the classifier was."""
        return self._start.clone()


def _put_adapter(classifier: nn.Linear, head: nn.Linear) -> None:
    if classifier.out_features != head.out_features or classifier.bias is None:
        raise ValueError(
            f'a last layer is put behind an adapter where there is one of the same classes with a bias, got {head} for '
            f'{classifier}.')
    weight = head.weight.to(classifier.weight)
    start = nn.Linear(classifier.in_features, head.in_features).to(classifier.weight)
    bias = torch.zeros_like(classifier.bias) if head.bias is None else head.bias
    classifier.requires_grad_(True)
    for name, through in {
            'weight': _ThroughHead(weight, None, start.weight.detach()),
            'bias': _ThroughHead(weight, bias.to(weight), start.bias.detach())}.items():
        parametrize.register_parametrization(classifier, name, through)


def _check_width(classifier: nn.Linear, head: nn.Linear) -> None:
    """Raise ValueError unless the teacher's head can read the student's embedding."""
    if classifier.in_features != head.in_features:
        raise ValueError(
            f'the teacher\'s last layer reads embeddings of width {head.in_features}, and the student\'s has width '
            f'{classifier.in_features}; take networks of one width, or put a learned linear layer between by '
            f'adapter=True (in a recipe, sharing.adapter = true).')


def _copy_head(classifier: nn.Linear, head: nn.Linear) -> None:
    shapes = [[tuple(parameter.shape) for parameter in layer.parameters()] for layer in (classifier, head)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f'a last layer can be copied to one of the same shape only, got {head} for {classifier}; take networks '
            f'with embeddings of one width.')
    with torch.no_grad():
        for parameter, own in zip(classifier.parameters(), head.parameters()):
            parameter.copy_(own)


def _add(result: dict[str, Tensor], weight: float, **term: Tensor) -> None:
    [(name, loss)] = term.items()
    result['loss'] = result['loss'] + weight * loss
    result[name] = loss.detach()


@torch.no_grad()
def _share_memories(contrast: ContrastiveDistillationLoss, indices: Tensor) -> None:
    """Let each process remember what all saw in this step, so that one's memories may be saved for all."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    places = _gathered(indices)
    for memory in (contrast.student_memory, contrast.teacher_memory):
        memory.index_copy_(0, places, _gathered(memory[indices]))
    distributed.broadcast(contrast.log_normalizers, src=0)


def _gathered(rows: Tensor) -> Tensor:
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
