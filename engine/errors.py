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
