"""Which task, and its options: the section of a configuration."""

from __future__ import annotations

from pydantic import BaseModel, Field, SerializeAsAny, ValidationInfo, field_validator

from rhythm.tasks.base import TASKS, task_class


class _NoOptions(BaseModel):
    """Stands in for the options of a task that can't be imported."""


class TaskConfig(BaseModel, extra="forbid", frozen=True):
    """The task's name, and its own keys under `options`."""

    name: str = Field(
        default="countdown",
        description=f"{', '.join(TASKS)}, reasoning_gym:GENERATOR, or module:Class for your own task",
    )
    options: SerializeAsAny[BaseModel] = Field(
        default_factory=dict, validate_default=True, description="the task's own keys"
    )

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        try:
            task_class(name)
        except (ImportError, AttributeError, TypeError) as error:  # TypeError: a relative name, ..x:y
            raise ValueError(f"cannot be imported: {type(error).__name__}: {error}") from error
        return name

    @field_validator("options", mode="wrap")
    @classmethod
    def _of_the_task(cls, value: object, handler: object, info: ValidationInfo) -> BaseModel:
        if "name" not in info.data:  # its error is reported already, and without the task no option can be checked
            return _NoOptions()
        kind: type[BaseModel] = task_class(info.data["name"]).config_class
        # Options that are built already aren't checked again: those that --help shows need not be complete.
        return value if isinstance(value, kind) else kind.model_validate(value)
