"""The only prompt templates: the text before and after the image for each of the four
tasks.

Training, export and runtime all use `render`. The image position is a gap between two
strings, so user text cannot move it. The same table holds the published decoding
settings of each task (beams and lengths).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.contract.errors import PromptError

__all__ = [
    "CHAT_SYSTEM",
    "TASKS",
    "Message",
    "Prompt",
    "Task",
    "checked_text",
    "next_turn",
    "render",
    "render_chat",
]


@dataclass(frozen=True)
class Prompt:
    """The plain text before and after the visual embeddings. `has_image` is False for
    text-only chat, and then all text is in `after`. `turns` are the later turns of a
    conversation: the tokenizer puts the end-of-sequence id, which no text can give,
    before each of them.
    """

    before: str
    after: str
    has_image: bool = True
    turns: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Returns all text of the prompt, without what separates its parts."""
        return "".join((self.before, self.after, *self.turns))


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is "user" or "assistant"."""

    role: str
    content: str


CHAT_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)  # Vicuna v1.1 conversation template
_VQA_STRIP = str.maketrans("", "", '.!"()*#:;~')
_VQA_MAX_WORDS = 50


def _folded(text: str) -> str:
    """Returns text with each run of white space as one space, as in training."""
    return " ".join(text.split())


def _caption(text: str) -> Prompt:
    return Prompt("<image>", _folded(text))


def _vqa(text: str) -> Prompt:
    words = text.lower().translate(_VQA_STRIP).split()
    if not words:
        raise PromptError(
            f"the question {text!r:.40} has no words left after removing punctuation; ask a "
            f"question with words"
        )
    if len(words) > _VQA_MAX_WORDS:  # the published code cuts here, and the rest is unread
        raise PromptError(
            f"the question {_folded(text)!r:.40} has {len(words)} words, expected at most "
            f"{_VQA_MAX_WORDS}; shorten it, or ask it with the task chat"
        )
    return Prompt("<image>", f"Question:{' '.join(words)} Short answer:")


def _ground(text: str) -> Prompt:
    return Prompt("<image>", f"<ref>{_folded(text)}</ref>")


def _chat(text: str) -> Prompt:
    return render_chat([Message("user", text)])


def render_chat(messages: Sequence[Message], has_image: bool = True) -> Prompt:
    """Renders a conversation that ends with a user turn, in Vicuna v1 style. The image
    belongs to the first turn.

    Raises `PromptError` unless the turns alternate, starting and ending with the user.
    """
    roles = [message.role for message in messages]
    if (
        not roles
        or roles != (["user", "assistant"] * len(roles))[: len(roles)]
        or roles[-1] != "user"
    ):
        raise PromptError(
            f"conversation roles are {roles}, expected user and assistant in turns, ending with "
            f"user"
        )
    answers = [f" {message.content}" for message in messages[1::2]] + [""]
    turns = [next_turn(user) + answer for user, answer in zip(messages[::2], answers, strict=True)]
    opening, first = f"{CHAT_SYSTEM} USER: ", turns[0].removeprefix("USER: ")
    return (
        Prompt(opening, f"\n{first}", turns=tuple(turns[1:]))
        if has_image
        else Prompt("", f"{opening}{first}", has_image=False, turns=tuple(turns[1:]))
    )


def next_turn(user: Message) -> str:
    """Returns the text of a user's turn, which follows the end-of-sequence id of the
    answer before it.
    """
    return f"USER: {user.content} ASSISTANT:"


@dataclass(frozen=True)
class Task:
    """One task: how its text becomes a prompt, and the published decoding settings. In
    training, `answer_prefix` is the text between prompt and answer.
    """

    name: str
    render: Callable[[str], Prompt]
    max_new_tokens: int
    min_new_tokens: int
    beams: int
    length_penalty: float
    answer_prefix: str
    help: str


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "caption", _caption, 30, 8, 5, 1.0, " ", "describe the image; the text is a free prompt"
        ),
        Task("vqa", _vqa, 10, 1, 5, 0.0, " ", "answer a question shortly"),
        Task("ground", _ground, 30, 1, 5, 1.0, "", "find the phrase and answer with its box"),
        Task("chat", _chat, 128, 1, 1, 1.0, " ", "answer an instruction in sentences"),
    )
}


def render(task: str, text: str) -> Prompt:
    """Renders user text for a task. White space is folded, except in chat, whose
    training text has line breaks. Raises `PromptError` for an unknown task, empty
    text or invalid Unicode.
    """
    if task not in TASKS:
        raise PromptError(f"unknown task {task!r}; choose one of: {', '.join(TASKS)}")
    return TASKS[task].render(checked_text(text))


def checked_text(text: str) -> str:
    """Returns user text without surrounding white space. Raises `PromptError` if
    nothing is left or the text is not valid Unicode.
    """
    if not text.strip():
        raise PromptError('the prompt is empty; say what to do, for example "describe"')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt is not valid Unicode at character {error.start}; re-enter it as UTF-8"
        ) from None
    return text.strip()
