"""Typed errors. Every message names the thing, the limit and what to change."""

from __future__ import annotations


class EngineError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(EngineError, ValueError):
    """A model configuration is missing, inconsistent or not supported."""


class CheckpointError(EngineError, ValueError):
    """A weight file is damaged, incomplete, or does not fit the configuration."""


class TokenizerError(EngineError, ValueError):
    """The tokenizer or chat template is missing, damaged, or refuses its input."""


class InputError(EngineError, ValueError):
    """An argument of a call is not usable."""


class ContextError(InputError):
    """A prompt or a generation does not fit into the planned context."""


class DeviceError(EngineError, RuntimeError):
    """The requested device or instruction set is not available here."""


class DispatchError(EngineError, RuntimeError):
    """`strict=True` and an op would not run on its fastest implementation."""


class PlanError(EngineError, RuntimeError):
    """A step broke a rule of static plans (allocation, read-back, moved address)."""


class MemoryPlanError(EngineError, MemoryError):
    """The memory plan does not fit the device; the message lists the largest parts."""


class BusyError(EngineError, RuntimeError):
    """Another thread is using this model."""


class ClosedError(EngineError, RuntimeError):
    """The model was closed."""


class DeadlineError(EngineError, RuntimeError):
    """Actions were not there by the time that they were due, or clearly will not be."""


class CancelledError(EngineError, RuntimeError):
    """A caller's callback has ended the work; nothing of it is kept."""


class ProtocolError(EngineError, ValueError):
    """A frame from the network is malformed, too large, or not allowed; nothing of it was used."""


class ServerError(EngineError, RuntimeError):
    """The policy server answered with an error."""


class EngineWarning(UserWarning):
    """Base of the warnings of this package; each has a class of its own so that it can be filtered."""


class ScheduleWarning(EngineWarning):
    """A schedule that the checkpoint was not trained for: allowed, but out of distribution."""


class TruncationWarning(EngineWarning):
    """A prompt was longer than the model takes and lost its end."""
