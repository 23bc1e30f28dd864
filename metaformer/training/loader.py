"""Loaders of training and validation batches, from processes that decode or from memory."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from timm.data.readers.reader import Reader
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset
from torchvision.transforms import PILToTensor

from metaformer.errors import InputError, MachineError
from metaformer.training.batches import Images, Stream, TrainBatches, collate, seed_everything, transform
from metaformer.training.config import Config
from metaformer.training.distributed import STOP_SIGNALS, Processes
from metaformer.training.memory import InMemory, load_pictures

IN_MEMORY = {"collate_fn": lambda batch: batch}
"""Options of a DataLoader of :class:`InMemory`."""


def train_loader(
    config: Config, dataset: Dataset, batches: TrainBatches, processes: Processes, workers: int
) -> DataLoader:
    options = loader_options(processes, workers)
    if config.data_in_memory:
        images = InMemory(load_pictures(dataset, PILToTensor(), options), processes.device, config)
        return DataLoader(images, batch_sampler=batches, **IN_MEMORY)
    if isinstance(dataset, IterableDataset):  # a stream shuffles and shards itself
        dataset.reader.batch_size = batches.device_batch  # each loader process yields whole batches
        seed_everything(config.seed, processes.rank)  # else every device would draw the same numbers
        stream = Stream(dataset, transform(config, is_training=True))
        return DataLoader(stream, batches.device_batch, drop_last=True, **options)
    images = Images(dataset, transform(config, is_training=True), config.seed)
    return DataLoader(images, batch_sampler=batches, **options)


def val_loader(config: Config, dataset: Dataset, processes: Processes, workers: int) -> DataLoader:
    """Every picture exactly once over all processes."""
    options, prepare = loader_options(processes, workers), transform(config, is_training=False)
    if config.data_in_memory:
        images, options = InMemory(load_pictures(dataset, prepare, options), processes.device), IN_MEMORY
    elif isinstance(dataset, IterableDataset):
        share_shards(dataset.reader, processes)
        return DataLoader(Stream(dataset, prepare), config.device_batch, **options)
    else:
        images = Images(dataset, prepare)
    keys = [(0, index) for index in range(processes.rank, len(dataset), processes.world)]
    batches = BatchSampler(keys, config.device_batch, drop_last=False)
    return DataLoader(images, batch_sampler=batches, **options)


def share_shards(reader: Reader, processes: Processes) -> None:
    """Give each process the shards of a WebDataset that the others do not have, once each.

    timm itself would give all processes equally many pictures, and repeat or leave out some for that.
    """
    from timm.data.readers.reader_wds import ReaderWds  # imports webdataset

    if isinstance(reader, ReaderWds):
        shards = reader.split_info.filenames
        if len(shards) < processes.world:
            raise InputError(
                f"the validation split has {len(shards)} shards, too few for {processes.world} processes: make more "
                "shards, or use fewer processes"
            )
        reader.split_info.filenames = shards[processes.rank :: processes.world]
        reader.dist_rank, reader.dist_num_replicas = 0, 1


def loader_options(processes: Processes, workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "pin_memory": processes.device.type == "cuda",
        "persistent_workers": workers > 0,
        "collate_fn": collate,
        "worker_init_fn": ignore_signals,
    }


def ignore_signals(worker: int) -> None:
    """A stop signal may reach every process. Workers ignore it so that the main process can save first."""

    def ignore_once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the interpreter's exit sends another SIGTERM at the latest

    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, ignore_once)


@contextmanager
def loader_processes(*loaders: DataLoader) -> Iterator[None]:
    """End the processes of the loaders after the block, and name the cause of its error if one of them has died."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        if not isinstance(error, RuntimeError):
            # The death also makes PyTorch raise a moment later. Wait for that here, before it interrupts other code.
            with suppress(RuntimeError):
                time.sleep(0.2)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MachineError(
            f"a process of the loader has died ({reason}), most often for lack of memory: "
            "continue or repeat the run, with fewer workers= if it happens again"
        ) from error
    finally:  # otherwise a traceback that refers to the processes would keep them until the interpreter's exit
        for loader in loaders:
            if loader.num_workers and loader._iterator is not None:
                loader._iterator._shutdown_workers()
