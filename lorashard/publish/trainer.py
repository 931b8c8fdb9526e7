"""A callback for transformers' Trainer, and TRL's: what it trains is published while it trains.

In: the trainer's events, on every rank. Out: a shard directory for each version, written by all
ranks together, and on rank 0 the call that brings it to the servers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, runtime_checkable

from lorashard.adapter.options import LayoutOptions
from lorashard.errors import ShardError
from lorashard.publish.peft_models import process_group, save_sharded
from lorashard.publish.versions import version_name
from lorashard.publish.wrapped import unwrap_peft_model
from lorashard.shards.expert_map import ExpertMap
from lorashard.storage.packages import import_package
from lorashard.vllm_options import Strategy

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    TrainerCallback = object  # until the first callback is made: `PublishCallback.__new__`

_DEFAULT_OPTIONS = LayoutOptions()
_Done = TypeVar("_Done")


@runtime_checkable
class VersionPublisher(Protocol):
    """Knows where a version's directory belongs, and what to do once it is there."""

    def path(self, version: int, /) -> str | os.PathLike[str]:
        """Where the version is to be written."""

    def publish(self, version: int, /) -> object:
        """Called on rank 0 when the directory is complete."""


class PublishCallback(TrainerCallback):
    """Publishes a PEFT model's adapter at each save, or every n steps. Every rank's trainer has one.

        trainer = GRPOTrainer(..., callbacks=[PublishCallback(publisher, ep_size=8, every=10)])

    The version is the trainer's global step. What goes wrong is raised, on every rank, and ends the
    training: a version that is silently missing is worse. The training itself is not changed.
    """

    def __new__(cls, *_: Any, **__: Any) -> PublishCallback:  # noqa: PYI034 - of a class made here
        """An instance of transformers' TrainerCallback, which importing lorashard must not import."""
        Base = import_package("transformers", "PublishCallback").TrainerCallback  # noqa: N806
        made = cls
        if not issubclass(cls, Base):
            made = type(cls.__name__, (cls, Base), {"__module__": cls.__module__})
        return super().__new__(made)

    def __init__(
        self,
        to: VersionPublisher | Callable[[int], str | os.PathLike[str]] | str | os.PathLike[str],
        *,
        ep_size: int,
        every: int | None = None,
        name: str | None = None,
        publish: Callable[[int], object] | None = None,
        strategy: Strategy = "linear",
        expert_map: ExpertMap | None = None,
        options: LayoutOptions = _DEFAULT_OPTIONS,
        adapter_name: str = "default",
        force: bool = False,
        sync: bool = True,
    ) -> None:
        """to: a publisher; or where a version goes, by its number; or a directory for all of them.

        every: so many steps, and at no other, be it the last; None = whenever the trainer saves.
        name: if `to` is a directory: version 7 is `name-v00007` in it.
        publish: called on rank 0 with a version that is complete, if `to` is not a publisher.
        The others: as for `save_sharded`. A version that is there already is refused without `force`,
        for example where a training is resumed from an earlier step.
        """
        if every is not None and every < 1:
            raise ValueError(f"every {every} steps")
        self._path_of, self._publish = _targets(to, name, publish)
        self._every = every
        self._adapter_name = adapter_name
        self._save_options: dict[str, Any] = {
            "ep_size": ep_size,
            "strategy": strategy,
            "expert_map": expert_map,
            "options": options,
            "adapter_name": adapter_name,
            "force": force,
            "sync": sync,
        }
        self._last: int | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the trainer gives it by position
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Refuse a model that could not be published, before a step is trained."""
        unwrap_peft_model(kwargs.get("model"), self._adapter_name)
        self._last = None

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """After the optimizer's step."""
        if self._every is not None and state.global_step % self._every == 0:
            self._publish_version(state.global_step, kwargs.get("model"))

    def on_save(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """After a checkpoint, on the ranks that have written nothing of it as well."""
        if self._every is None:
            self._publish_version(state.global_step, kwargs.get("model"))

    def _publish_version(self, version: int, model: Any) -> None:
        if version == self._last:  # a trainer can save twice after one step
            return
        peft_model = unwrap_peft_model(model, self._adapter_name)
        # Where one rank alone has no path, the others would wait for it.
        path = _run_on_ranks(lambda _: self._path_of(version), f"has no path for {version}")
        save_sharded(peft_model, path, **self._save_options)
        publish = self._publish
        if publish is not None:
            _run_on_ranks(
                lambda rank: publish(version) if rank == 0 else None, f"could not publish {version}"
            )
        self._last = version


def _targets(
    to: Any, name: str | None, publish: Callable[[int], object] | None
) -> tuple[Callable[[int], str | os.PathLike[str]], Callable[[int], object] | None]:
    """Where a version goes, and what is called then."""
    is_directory = isinstance(to, (str, os.PathLike))
    if is_directory != (name is not None):
        raise ValueError("name is for a directory, and a directory needs it")
    if is_directory:
        directory = Path(to)
        return (lambda version: directory / version_name(str(name), version)), publish
    if isinstance(to, VersionPublisher):
        if publish is not None:
            raise ValueError("publish is for what is not a publisher")
        return to.path, to.publish
    return to, publish


def _run_on_ranks(work: Callable[[int], _Done], failure: str) -> _Done:
    """Do it on every rank, given its number. If one fails, it raises its error, and the others ShardError."""
    rank, world_size, _ = process_group()
    done: _Done | None = None
    error: Exception | None = None
    try:
        done = work(rank)
    except Exception as err:  # noqa: BLE001 - raised again when the others know
        error = err
    if world_size > 1:
        from torch.distributed import all_gather_object

        said: list[str | None] = [None] * world_size
        all_gather_object(said, None if error is None else f"{type(error).__name__}: {error}")
        for other, message in enumerate(said):
            if message is not None and error is None:
                raise ShardError(
                    f"Rank {other} {failure}: {message}", hint="See that rank's own error."
                )
    if error is not None:
        raise error
    return cast("_Done", done)
