"""What a training loop does with a stream: every worker of every process is a process to it."""
from torch.utils.data import IterableDataset, get_worker_info

from timm_miil.data import ImageStream


class WorkerShares(IterableDataset):
    """The grey of each picture, and its targets."""

    def __init__(self, stream: ImageStream, rank: int, world: int) -> None:
        self.stream, self.rank, self.world = stream, rank, world

    def __iter__(self):
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        for image, targets, _ in self.stream.iterate(
                seed=3, epoch=1, process=self.rank * workers + number, num_processes=self.world * workers):
            yield image.getpixel((0, 0))[0], targets
