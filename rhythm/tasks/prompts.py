"""How a task asks: a system prompt, a text around the question, and whether the model's chat template is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, Field, field_validator

Messages = Sequence[dict[str, str]]
"""Chat messages, each with `role` and `content`."""


class ChatPrompt(str):
    """A prompt that the chat template of the model it is for writes; as a string, its messages one after another."""

    messages: list[dict[str, str]]

    def __new__(cls, messages: Messages) -> Self:
        """A prompt of `messages`."""
        prompt = super().__new__(cls, "\n".join(message["content"] for message in messages))
        prompt.messages = [dict(message) for message in messages]
        return prompt

    def __reduce__(self) -> tuple[type[Self], tuple[Messages]]:
        return type(self), (self.messages,)


class PromptConfig(BaseModel, extra="forbid", frozen=True):
    """The part of a task's options that says how it asks."""

    system: str | None = Field(default=None, description="system prompt; null for none")
    template: str = Field(default="{prompt}", description="what the model is asked; {prompt} stands for the question")
    chat: bool = Field(default=False, description="ask through the chat template of the model, which must have one")

    @field_validator("template")
    @classmethod
    def _has_the_question(cls, template: str) -> str:
        if "{prompt}" not in template:
            raise ValueError(f"is {template!r}: must contain {{prompt}}, where the question goes")
        return template

    def ask(self, question: str | Messages) -> str:
        """The prompt; of messages, the template is put around the last one. Without `chat` the contents stand one after
        another, each on lines of its own.
        """
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        last = messages[-1]
        # Not str.format: questions are full of braces.
        messages[-1] = {**last, "content": self.template.replace("{prompt}", last["content"])}
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *(m for m in messages if m["role"] != "system")]
        prompt = ChatPrompt(messages)
        return prompt if self.chat else str(prompt)


class NoChatTemplateError(ValueError):
    """A prompt is a ChatPrompt, and the tokenizer has no chat template. The message begins with the option, `chat`: put
    in front of it where the task's options stand, `task.options.`.
    """


@dataclass(frozen=True)
class PromptLimit:
    """How long prompts may be.

    longest: tokens; why: the setting that says so, for messages, such as `sampling.max_prompt_tokens is 1024`.
    """

    longest: int
    why: str

    @classmethod
    def of(cls, context: int, named: str, max_prompt_tokens: int | None) -> Self:
        """A prompt has to leave a token of `context` (tokens; `named` in messages) for a response, and may have
        `max_prompt_tokens` where that is less.
        """
        if max_prompt_tokens is not None and max_prompt_tokens < context:
            return cls(max_prompt_tokens, f"sampling.max_prompt_tokens is {max_prompt_tokens}")
        return cls(context - 1, f"{named} is {context}")


def encode_prompt(tokenizer: Any, prompt: str) -> tuple[str, list[int]]:
    """The prompt as the model reads it, and its tokens: a ChatPrompt by the tokenizer's chat template, ready for the
    answer; any other with the special tokens that the tokenizer puts in front.

    Raises NoChatTemplateError where a chat template is asked for and the tokenizer has none.
    """
    if not isinstance(prompt, ChatPrompt):
        return prompt, list(tokenizer.encode(prompt))
    if not getattr(tokenizer, "chat_template", None):
        raise NoChatTemplateError("chat is true: the model's tokenizer has no chat template; leave it out")
    text = tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
    return text, list(tokenizer.encode(text, add_special_tokens=False))
