"""Every error that a user can meet, by kind.

`exit_code` is what the command line returns. The first line of a message says what is wrong
and where; `hint` says what to do next; `rule` is what it is raised against, if it is one of
`lorashard.rules`.

    LorashardError                 1  unexpected
      AdapterError                 3  the adapter cannot be used
        HeaderError                   a safetensors file is damaged
        UnsupportedAdapterError       a feature that a shard directory cannot represent
        LayoutError                   the expert tensors do not fit together
          UnclearLayoutError          the adapter alone does not say how to read them
        NoExpertsError                nothing to split
        MissingPackageError           reading it takes a package that is not installed
      PlacementError               4  experts and ranks do not fit together
      ShardError                   5  the shard directory cannot be written or trusted
        OutputExistsError             something is in the way of the target
        NoRoomError                   the disk has no room for it
        ManifestError                 lorashard.json is missing or damaged
        UnknownTensorError            a shard file has no tensor of this name; also a KeyError
        PartialShardsError            it has the files of some ranks only
        VerificationError             the shards are not what the manifest or the source says
      ServerError                  1  servers do not answer, or did not take a version
      NotReadyError                5  doctor: something is broken, or would be refused
      BatchError                      some of several adapters failed: the exit code of the first
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lorashard.rules import DAMAGED_BYTES, Rule, with_rule


class LorashardError(Exception):
    """Root of all errors raised on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, rule: Rule | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.rule = rule

    @property
    def first_line(self) -> str:
        """The message, which ends in the id of the rule where there is one."""
        return self.message if self.rule is None else with_rule(self.message, self.rule.id)

    def __str__(self) -> str:
        return self.first_line if self.hint is None else f"{self.first_line}\n  {self.hint}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what the error has become, as `__init__` takes other values than the message.

        Errors cross processes: in Ray, a process pool, or PyTorch's data loader.
        """
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[LorashardError], args: tuple[Any, ...], state: Mapping[str, Any]
) -> LorashardError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class AdapterError(LorashardError):
    """The source adapter cannot be used."""

    exit_code = 3


class HeaderError(AdapterError):
    """A safetensors header is truncated, overlapping, or disagrees with its file."""

    def __init__(
        self, path: str | os.PathLike[str], reason: str, *, rule: Rule | None = DAMAGED_BYTES
    ) -> None:
        super().__init__(
            f"{os.fspath(path)}: not a valid safetensors file: {reason}.",
            hint="Copy or download the file again; its size and header must match.",
            rule=rule,
        )
        self.path = os.fspath(path)
        self.reason = reason


class UnsupportedAdapterError(AdapterError):
    """The adapter uses a feature that a shard directory cannot represent."""

    def __init__(self, feature: str, where: str, *, hint: str, rule: Rule | None = None) -> None:
        super().__init__(f"{where}: {feature} is not supported.", hint=hint, rule=rule)
        self.feature = feature
        self.where = where


class LayoutError(AdapterError):
    """Expert tensors are incomplete, contradictory or ambiguous."""


class UnclearLayoutError(LayoutError):
    """The adapter can be read in several ways; facts about its base model tell them apart."""


class NoExpertsError(AdapterError):
    """The adapter has no expert weights."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(
            f"{os.fspath(path)}: no expert weights, so there is nothing to split.",
            hint="vLLM loads this adapter as it is, with expert parallelism too.",
        )


class MissingPackageError(AdapterError):
    """A package is not installed that only some adapters, places and options need."""


class PlacementError(LorashardError):
    """Experts and expert-parallel ranks do not fit together."""

    exit_code = 4


class ShardError(LorashardError):
    """A shard directory cannot be written, read or trusted."""

    exit_code = 5


class OutputExistsError(ShardError):
    """Something is already there where the output should go."""

    def __init__(self, path: str | os.PathLike[str], *, reason: str, hint: str) -> None:
        super().__init__(f"{os.fspath(path)}: {reason}.", hint=hint)
        self.path = os.fspath(path)


class NoRoomError(ShardError):
    """The disk has no room for what is written, or is about to be."""


class ManifestError(ShardError):
    """lorashard.json is missing, damaged or from another format version."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        reason: str,
        *,
        hint: str | None = None,
        rule: Rule | None = None,
    ) -> None:
        super().__init__(
            f"{os.fspath(path)}: {reason}.",
            hint=hint or "Run `lorashard split` again, or copy the whole directory again.",
            rule=rule,
        )
        self.path = os.fspath(path)


class UnknownTensorError(ShardError, KeyError):
    """A shard file has no tensor of this name."""


class PartialShardsError(ShardError):
    """A directory has only some ranks' files, as `pull` leaves it, and all are needed."""


class VerificationError(ShardError):
    """The shards are not what they claim to be; `findings` names each place."""

    def __init__(self, path: str | os.PathLike[str], findings: tuple[str, ...]) -> None:
        count = len(findings)
        noun = "thing is" if count == 1 else "things are"
        super().__init__(
            f"{os.fspath(path)}: {count} {noun} wrong; first: {findings[0]}",
            hint="Do not serve this directory. Run `lorashard split` again from the source.",
            rule=DAMAGED_BYTES,
        )
        self.findings = findings


class ServerError(LorashardError):
    """vLLM servers do not answer, or did not take a version; `errors` has those of each server."""

    def __init__(
        self, message: str, *, hint: str | None = None, errors: Sequence[LorashardError] = ()
    ) -> None:
        super().__init__(message, hint=hint)
        self.errors = tuple(errors)


class NotReadyError(LorashardError):
    """`doctor` found that something is broken, or would be refused."""

    exit_code = 5


class BatchError(LorashardError):
    """Some of several adapters failed: `errors`, in order; the exit code is that of the first one."""

    def __init__(
        self,
        errors: Sequence[LorashardError],
        count: int,
        *,
        noun: str,
        hint: str,
    ) -> None:
        super().__init__(f"{len(errors)} of {count} {noun} failed.", hint=hint)
        self.errors = tuple(errors)
        self.exit_code = errors[0].exit_code
