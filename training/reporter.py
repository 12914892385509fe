"""A worker's checkpoints on their way to the store: written here, uploaded beside the training.

The upload is ours, by create-only writes with the file that makes it whole at the end; Ray Train's
own is a plain copy, of which a half looks like a whole. Ray Train keeps as many as the spec says of
those that it knows; what workers that died had uploaded behind its back is deleted here.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from cluster.errors import StoreError
from cluster.store import Store
from training import runs
from training.place import Place
from training.scratch import Scratch

if TYPE_CHECKING:
    import ray.train


class Reporter:
    """Hands checkpoints to Ray Train. Made before the first of them, inside a training worker."""

    def __init__(self, store: Store, job_id: str, place: Place, scratch: Scratch) -> None:
        self._store, self._job_id, self._place, self._scratch = store, job_id, place, scratch
        self._uploaded = threading.Event()
        self._uploaded.set()
        # What was there before this worker: it goes as soon as there is a newer checkpoint.
        self._unknown: list[str] = []
        self._bests: set[str] = set()
        if place.rank == 0 and (before := runs.own_checkpoints(store, job_id)):
            known = _known_to_ray_train()
            self._unknown = [key for key in before if key.rsplit("/", 1)[-1] not in known]
            self._bests = set(runs.own_bests(store, job_id))

    def report(self, step: int, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Collective; the first worker writes. Waits for the last checkpoint's upload, not for
        this one's."""
        import ray.train

        if self._place.rank != 0:
            ray.train.report(metrics, checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC)
            return
        self._uploaded.wait()
        self._uploaded.clear()
        # Ray Train deletes the folder when its upload has ended well.
        folder = self._scratch.folder()
        try:
            write(folder)
        except (OSError, SafetensorError) as error:  # the second is what tensors' files raise
            shutil.rmtree(folder, ignore_errors=True)
            raise StoreError(
                f"checkpoint {folder}: cannot be written ({error}); free room there, or set TMPDIR "
                "to a folder with more"
            ) from error
        ray.train.report(
            metrics,
            ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=runs.checkpoint_name(step),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._upload,
        )

    def _upload(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Called by Ray Train in a thread of its own."""
        import ray.train

        try:
            self._store_whole(Path(checkpoint.path), name)
        except BaseException:
            shutil.rmtree(checkpoint.path, ignore_errors=True)
            raise
        finally:
            self._uploaded.set()
        storage: Any = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(
            f"{storage.experiment_fs_path}/{name}", filesystem=storage.storage_filesystem
        )

    def _store_whole(self, folder: Path, name: str) -> None:
        """Upload a checkpoint; then what nobody needs any more may go."""
        key = f"runs/{self._job_id}/{name}"
        self._bests |= runs.upload_checkpoint(self._store, key, folder)
        while self._unknown:
            runs.delete_folder(self._store, self._unknown.pop())
        self._bests = runs.delete_unused(self._store, self._job_id, self._bests)


def _known_to_ray_train() -> set[str]:
    """The names of the checkpoints that it keeps and will delete."""
    import ray.train

    committed = ray.train.CheckpointConsistencyMode.COMMITTED
    reported = ray.train.get_all_reported_checkpoints(consistency_mode=committed)
    return {Path(each.checkpoint.path).name for each in reported}
