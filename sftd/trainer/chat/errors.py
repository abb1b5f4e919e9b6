"""Errors of the preparation tools."""


class PrepareError(Exception):
    """An error that the user can fix.

    The message has the problem, its place and the fix. The tool prints only the message to standard error and exits with
    code 2.
    """


class ChatError(Exception):
    """A conversation cannot be used. The caller adds file and line and raises a PrepareError."""


def rewritten_answer(turn: int, when: str = "when other turns follow") -> ChatError:
    """The template's text of an answer differs from the model's output. `turn` counts from 0."""
    return ChatError(
        f"the chat template changes more than whitespace in the assistant's message {turn + 1} {when} (some templates cut "
        "the reasoning out of earlier answers), so the text lacks the model's output. Train the message in a separate row "
        "(--rewritten split), leave it out (--rewritten mask), or give the content as the template renders it"
    )


def left_out(turn: int, what: str) -> ChatError:
    """The template leaves out a part of an answer."""
    return ChatError(
        f"the chat template leaves out {what} of the assistant's message {turn + 1}, so the model would not learn it. Use a "
        "model folder whose chat template supports it, or remove it from the message"
    )


def without_reasoning(turn: int, tag: str) -> ChatError:
    """An answer lacks reasoning, but the template's generation prompt opens it."""
    return ChatError(
        f"the chat template's generation prompt opens reasoning (<{tag}>), but the assistant's message {turn + 1} has none, "
        "so it differs from the model's output. Give the message reasoning_content, or reasoning from "
        f"<{tag}> to </{tag}> in its content; or train it as the template shows it, without --rewritten split"
    )
